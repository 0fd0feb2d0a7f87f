"""A visual head: from the LLM's hidden state to the D residual codes of a position (paper section 3.3, eq. 5).

The model holds two, `pixel_head` and `semantic_head`. Depth 1 sees the projected hidden state, depth d > 1 the sum
of the embeddings of the codes before it; a causal transformer runs over the depths, and every depth has its own
classifier.

Shapes: M positions, D depth, H width of the LLM, W width of the head, K codebook size.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualtoken.core.errors import UserError
from dualtoken.core.linear_loss import SMALL, classification_loss
from dualtoken.mllm.projector import two_layers
from dualtoken.tokenizer.branch import AttentionCache, GatedMLP

PIECE = 1024  # positions at once where activations are computed again


@dataclass
class VisualHeadConfig:
    """Sizes of a head; the defaults give the paper's 258 M at D = 4 and K = 16384 (docs/decisions.md).

    Args:
        width: of the depth transformer.
        embed_dim: of the code embeddings ("VQEmbedding", 16 M in appendix D).
        gated: a gated MLP in each block; else two layers of four times the width around an exact GELU, as VILA-U's.
        shared_embedding: one table of code embeddings for all depths, right where they share a codebook.
        shared_classifier: one for all depths, as VILA-U's.
        linear_projector: one layer in place of two in the generation projector, as VILA-U's.
    """

    codebook_size: int = 16384
    depth: int = 4
    width: int = 2048
    layers: int = 3
    heads: int = 16
    embed_dim: int = 1024
    gated: bool = True
    shared_embedding: bool = True
    shared_classifier: bool = False
    linear_projector: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"head.width {self.width} must be a multiple of head.heads {self.heads}")


class DepthBlock(nn.Module):
    """Causal self-attention over depths and an MLP, both with the norm before."""

    def __init__(self, width: int, heads: int, gated: bool):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = GatedMLP(width) if gated else plain_mlp(width)

    def forward(self, x: Tensor, cache: AttentionCache | None = None) -> Tensor:
        """x [M, D, W] -> the same, all depths at once; with a cache x [M, 1, W] is the next depth."""
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, -1))
        if cache is not None:
            k, v = cache.extend(k, v)
        scores = (
            q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        )  # a few depths: three times a fused kernel's speed on CPU
        if cache is None:
            scores = scores + torch.full_like(scores[0, 0], -torch.inf).triu(1)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def plain_mlp(width: int) -> nn.Sequential:
    """LayerNorm, then two layers around an exact GELU."""
    layers = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    return nn.Sequential(nn.LayerNorm(width, eps=1e-6), *layers)


@dataclass
class DepthState:
    """Where step-wise prediction of a position stands: caches by layer, and the sum of code embeddings so far."""

    caches: list[AttentionCache]
    depth: int = 0
    embeds: Tensor | None = None  # [M, embed_dim]


class VisualHead(nn.Module):
    """Generation projector, depth transformer, classifiers; `forward` and `step` give the same logits."""

    def __init__(self, hidden: int, config: VisualHeadConfig):
        super().__init__()
        self.config, self.recompute = config, False  # keep what goes into `loss`, compute the rest again going back
        linear = config.linear_projector
        self.projector = nn.Linear(hidden, config.width) if linear else two_layers(hidden, config.width, config.width)
        tables = 1 if config.shared_embedding else config.depth
        self.embedding = nn.Embedding(tables * config.codebook_size, config.embed_dim)
        self.embed_in = nn.Linear(config.embed_dim, config.width)
        self.positions = nn.Parameter(torch.zeros(config.depth, config.width))
        self.blocks = nn.ModuleList(DepthBlock(config.width, config.heads, config.gated) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        shared = config.shared_classifier
        self.classifiers = nn.ModuleList(
            nn.Linear(config.width, config.codebook_size, bias=shared) for _ in range(1 if shared else config.depth)
        )
        nn.init.normal_(self.embedding.weight, std=config.embed_dim**-0.5)
        nn.init.normal_(self.positions, std=0.02)

    @torch.no_grad()
    def start_from(self, rows: Tensor) -> None:
        """Begin with code embeddings and classifiers that are projections at random of a codebook's rows [K, C]."""
        for table in (self.embedding.weight, *(layer.weight for layer in self.classifiers)):
            projected = rows.float() @ torch.randn(rows.shape[1], table.shape[1], device=rows.device)
            table.copy_((projected * (table.float().std() / projected.std())).to(table))

    def features(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced states of all depths: hidden [M, H], codes [M, D] -> [M, D, W], before the classifiers."""
        depths = torch.arange(codes.shape[1] - 1, device=codes.device)
        before = self.embed(codes[:, :-1], depths).cumsum(1)  # eq. 5
        x = torch.cat([self.projector(hidden)[:, None], self.embed_in(before)], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def embed(self, codes: Tensor, depth: int | Tensor) -> Tensor:
        """Embeddings [..., E] of codes [...] at depths counted from 0."""
        return self.embedding(codes if self.config.shared_embedding else codes + depth * self.config.codebook_size)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Logits [M, D, K] of codes [M, D] given hidden [M, H] and the codes before each depth."""
        x = self.features(hidden, codes)
        return torch.stack([self.classify(x[:, d], d) for d in range(self.config.depth)], 1)

    def classify(self, x: Tensor, depth: int) -> Tensor:
        """States [M, W] of a depth, counted from 0 -> logits [M, K]."""
        return self.classifiers[0 if self.config.shared_classifier else depth](x)

    def loss(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Cross-entropy by depth [D] (eq. 7), summed over the M positions; logits [M, D, K] are never whole.

        With `recompute` only hidden and codes are kept, and all else is made again going back, a few positions at a
        time: a second head then adds nothing to the peak.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return self._loss(hidden, codes)
        pieces = zip(hidden.split(PIECE), codes.split(PIECE), strict=True)
        return torch.stack([checkpoint(self._loss, *piece, use_reentrant=False) for piece in pieces]).sum(0)

    def _loss(self, hidden: Tensor, codes: Tensor) -> Tensor:
        x, classes = self.features(hidden, codes), self.config.codebook_size
        small = PIECE * classes if self.recompute else SMALL  # pieces keep their logits: they are made again anyway
        return torch.stack([
            classification_loss(partial(self.classify, depth=d), x[:, d], codes[:, d], classes, small)
            for d in range(self.config.depth)
        ])  # fmt: skip

    def start(self) -> DepthState:
        """State before depth 1."""
        return DepthState([AttentionCache() for _ in self.blocks])

    def step(self, state: DepthState, given: Tensor) -> Tensor:
        """Logits [M, K] of the next depth; `given` is hidden [M, H] at depth 1, then the codes [M] just chosen."""
        if state.depth == 0:
            x = self.projector(given)
        else:
            chosen = self.embed(given, state.depth - 1)
            state.embeds = chosen if state.embeds is None else state.embeds + chosen
            x = self.embed_in(state.embeds)
        x = (x + self.positions[state.depth])[:, None]
        for block, cache in zip(self.blocks, state.caches, strict=True):
            x = block(x, cache)
        state.depth += 1
        return self.classify(self.norm(x[:, 0]), state.depth - 1)
