"""What the codes of a tokenizer carry: use, entropy per depth, and what one vocabulary or a label says of the other.

All numbers come from counts that are as large after one picture as after a million. Information is in bits.

Shapes: B pictures, N positions, D depth, K codebook size, C code width, G groups of codes, L labels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from dualtoken.core.codes import DualCodes
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer

GROUPS = 1024  # a table of more pairs than this squared could not be filled: 16384 x 16384 pairs are 268 million


def entropy(counts: Tensor) -> Tensor:
    """Bits of counts [..., K] -> [...]."""
    share = counts.double() / counts.sum(-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share).sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def mutual_information(table: Tensor) -> float:
    """Bits that the row says of the column, of how often they met, [R, S]."""
    return max(0.0, float(entropy(table.sum(0)) + entropy(table.sum(1)) - entropy(table.flatten())))


@dataclass(frozen=True)
class Information:
    """Mutual information in bits, and what the same counts give where there is none, as few counts look like some."""

    bits: float
    by_chance: float
    at_most: float  # the smaller of both entropies


class PairCounts:
    """How often two things met, and how often they would by chance."""

    def __init__(self, rows: int, columns: int):
        self.met = torch.zeros(rows, columns, dtype=torch.int64)
        self.by_chance = torch.zeros_like(self.met)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Pairs of pictures, int64 [B, N] each; for chance those of a picture and the next one of the batch.

        The batches must come in random order, else the next picture is like this one.
        """
        self._count(self.met, first, second)
        if len(first) > 1:
            self._count(self.by_chance, first, second.roll(1, 0))

    def _count(self, table: Tensor, first: Tensor, second: Tensor) -> None:
        pairs = (first * table.shape[1] + second).flatten()
        table += torch.bincount(pairs, minlength=table.numel()).view_as(table)

    @property
    def information(self) -> Information:
        """What the counts say."""
        at_most = min(float(entropy(self.met.sum(axis))) for axis in (0, 1))
        return Information(mutual_information(self.met), mutual_information(self.by_chance), at_most)


def code_groups(quantizer: nn.Module, groups: int = GROUPS, seed: int = 0) -> Tensor:
    """Group of each code of the first depth, int64 [K]: itself if there are few, else by k-means of their vectors."""
    size = quantizer.config.codebook_size
    if size <= groups:
        return torch.arange(size)
    device = next((p.device for p in (*quantizer.parameters(), *quantizer.buffers())), torch.device("cpu"))
    with torch.no_grad():
        vectors = quantizer.lookup(torch.arange(size, device=device)[:, None]).float().cpu().numpy()
    found = MiniBatchKMeans(groups, random_state=seed, batch_size=4 * groups, n_init=1).fit_predict(vectors)
    return torch.from_numpy(found).long()


@dataclass(frozen=True)
class Vocabulary:
    """Use of one vocabulary by depth, each [D]; `used` is the share of its codes met at any depth."""

    codebook_size: int
    used: float
    usage: list[float]  # share of the codes met at each depth
    entropy: list[float]  # bits; log2 K if all codes are met alike
    perplexity: list[float]  # 2 ** entropy


class CodebookStatistics:
    """Counts over the codes of many pictures, given batch by batch in random order.

    Args: labels: L, how many labels there are; groups: of codes, where pairs are counted.
    """

    def __init__(self, tokenizer: DualTokenVisionTokenizer, labels: int = 0, groups: int = GROUPS, seed: int = 0):
        self.quantizers = {name: getattr(tokenizer, name).quantizer for name in ("pixel", "semantic")}
        self.positions = tokenizer.positions
        self.counts, self.groups = {}, {}
        for name, quantizer in self.quantizers.items():
            self.counts[name] = torch.zeros(quantizer.config.depth, quantizer.config.codebook_size, dtype=torch.int64)
            self.groups[name] = code_groups(quantizer, groups, seed)
        sizes = {name: int(found.max()) + 1 for name, found in self.groups.items()}
        self.pairs = PairCounts(sizes["pixel"], sizes["semantic"])
        self.labels = {name: PairCounts(size, labels) for name, size in sizes.items()} if labels else {}
        self.pictures = self.labelled = 0

    def add(self, codes: DualCodes, labels: Tensor | None = None) -> None:
        """Codes of B pictures, and their labels [B], -1 for none."""
        codes = codes.to("cpu")
        first = {}
        for name, counts in self.counts.items():
            found = getattr(codes, name)
            for depth, row in enumerate(counts):
                row += torch.bincount(found[..., depth].flatten(), minlength=len(row))
            # A class token's code stands before the N positions that both vocabularies have
            first[name] = self.groups[name][found[:, -self.positions :, 0]]
        self.pairs.add(first["pixel"], first["semantic"])
        self.pictures += len(codes)
        known = labels >= 0 if labels is not None else torch.zeros(len(codes), dtype=torch.bool)
        if self.labels and known.any():
            self.labelled += int(known.sum())
            spread = labels[known][:, None].expand(-1, self.positions)
            for name, pairs in self.labels.items():
                pairs.add(first[name][known], spread)

    def vocabulary(self, name: str) -> Vocabulary:
        """Use of "pixel" or "semantic"."""
        counts, quantizer = self.counts[name], self.quantizers[name]
        bits = entropy(counts)
        met = (counts > 0).any(0) if quantizer.shared else counts > 0
        return Vocabulary(
            counts.shape[1],
            float(met.float().mean()),
            (counts > 0).float().mean(1).tolist(),
            bits.tolist(),
            (2**bits).tolist(),
        )

    def result(self) -> dict[str, Any]:
        """Everything: vocabularies by name, `between` them, and `labels` by vocabulary (empty without labels)."""
        return {
            "vocabularies": {name: self.vocabulary(name) for name in self.counts},
            "between": self.pairs.information,
            "labels": {name: pairs.information for name, pairs in self.labels.items()} if self.labelled else {},
        }
