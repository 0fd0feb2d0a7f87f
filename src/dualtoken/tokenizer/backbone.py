"""The vision backbone: any timm ViT, tapped after any block and entered again after any block.

Layer k is the output of the k-th transformer block, counted from 1 (`hidden_states[k]` in transformers' terms);
layer 0 is the embedded image. The paper taps layer 6 (pixel) and 26 (semantic) of So400m's 27 blocks; the blocks
after the semantic layer, the final norm and the pooling head run on the quantised features (section 3.2).

Shapes: B batch, N positions, C width.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import HybridEmbed
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize

from dualtoken.core.errors import UserError


@dataclass
class BackboneConfig:
    """A timm model by name, keyword overrides for other sizes, and where its features are taken.

    Args:
        name: any timm vision transformer, e.g. "vit_so400m_patch16_siglip_256"; empty where an encoder brings its own.
        overrides: keywords of the timm model, e.g. {"embed_dim": 128, "depth": 8, "num_heads": 4}.
        stem: widths of a stem of 3x3 convolutions in place of the patch projection, last one = embed_dim. One that
            changes the width halves the side, one that keeps it does not: (32, 32, 64, 128, 128) is of patch 8.
            Empty: the model's own patch embedding.
        pixel_layer, semantic_layer: the taps; None = first quarter and penultimate.
        projection: width of a linear projection of the pooled feature into the space of a text tower (CLIP, DFN,
            EVA-02, ViTamin); 0 = none (SigLIP).
        mean, std: of the color channels as the pretrained weights want them, for values in [0, 1]; None = 0.5, our own.
    """

    name: str = "vit_so400m_patch16_siglip_256"
    overrides: dict[str, Any] = field(default_factory=dict)
    stem: tuple[int, ...] = ()
    pixel_layer: int | None = None
    semantic_layer: int | None = None
    projection: int = 0
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


class Backbone(nn.Module):
    """A timm ViT that can be left after any block and entered again.

    Raises UserError for a name timm does not know, a model that is no plain ViT, or a tap outside its blocks.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        if not timm.is_model(config.name):
            near = ", ".join(timm.list_models(f"*{config.name[:12]}*")[:3]) or "see timm.list_models()"
            raise UserError(f"backbone name {config.name!r} is not a timm model; near it: {near}")
        overrides = dict(config.overrides)
        if config.stem:
            overrides["embed_layer"] = partial(_stem_embed, widths=tuple(config.stem))
            overrides["patch_size"] = 2 ** _stem_strides(config.stem).count(2)
        self.vit = timm.create_model(config.name, pretrained=False, num_classes=config.projection, **overrides)
        if not all(hasattr(self.vit, part) for part in ("patch_embed", "_pos_embed", "blocks", "norm")):
            raise UserError(f"backbone {config.name!r} is not a vision transformer with blocks; choose a ViT")
        self.layers = len(self.vit.blocks)
        self.pixel_layer = config.pixel_layer or max(1, self.layers // 4)
        self.semantic_layer = config.semantic_layer or self.layers - 1
        for option in ("pixel_layer", "semantic_layer"):
            if not 1 <= getattr(self, option) <= self.layers:
                raise UserError(
                    f"{option}={getattr(self, option)} is outside the {self.layers} blocks of {config.name}"
                )
        self.width: int = self.vit.embed_dim
        self.pooled_width: int = config.projection or self.width
        self.prefix: int = self.vit.num_prefix_tokens  # class and register tokens before the N positions
        self.grid: int = self.vit.patch_embed.grid_size[0]
        self.image_size: int = self.vit.patch_embed.img_size[0]
        if (config.mean is None) != (config.std is None):
            raise UserError(f"mean={config.mean} and std={config.std}: give both or none")
        # The same shift and scale for our images, which are 2 x - 1 of values x in [0, 1]
        self._mean = [2 * v - 1 for v in config.mean or ()]
        self._std = [2 * v for v in config.std or ()]
        self._rotary = type(self.vit).__name__ == "Eva"  # Eva's position embedding also gives the blocks a rope

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, 3, H, W] in [-1, 1] -> layer 0 [B, prefix + N, C], and the rope of Eva models (else None)."""
        side = tuple(images.shape[-2:])
        if side != (self.image_size, self.image_size):
            raise UserError(
                f"images of {side[0]} x {side[1]} given to a backbone of {self.image_size} x {self.image_size}: "
                "resize them with the model's image processor"
            )
        vit = self.vit
        embedded = vit._pos_embed(vit.patch_embed(self._normalize(images)))
        x, rope = embedded if self._rotary else (embedded, None)
        if not self._rotary:  # Eva's position embedding drops patches itself
            x = vit.patch_drop(x)
        return vit.norm_pre(x), rope

    def run(self, x: Tensor, first: int, last: int, rope: Tensor | None = None) -> Tensor:
        """Blocks first+1 .. last: layer `first` in, layer `last` out, both [B, prefix + N, C]."""
        for block in self.vit.blocks[first:last]:
            x = block(x, rope=rope) if self._rotary else block(x)
        return x

    def taps(self, images: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """Features after the given layers (ascending), each [B, prefix + N, C], in one pass."""
        if list(layers) != sorted(layers) or not all(0 <= k <= self.layers for k in layers):
            raise UserError(f"layers {layers} must ascend and lie between 0 and {self.layers}")
        (x, rope), at, found = self.embed(images), 0, []
        for layer in layers:
            x, at = self.run(x, at, layer, rope), layer
            found.append(x)
        return found

    def pool(self, x: Tensor, layer: int) -> Tensor:
        """Enter after `layer` with [B, prefix + N, C]: remaining blocks, norm, pooling head, projection -> [B, C]."""
        rope = self.vit.rope.get_embed() if self._rotary and self.vit.rope is not None else None
        x = self.vit.norm(self.run(x, layer, self.layers, rope))
        return self.vit.forward_head(x)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> pooled features [B, C], the plain pass of the timm model."""
        return self.vit(self._normalize(images))

    def _normalize(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] as the weights want them; the one place where mean and std are applied."""
        return normalize(images, self._mean, self._std) if self._mean else images


def _stem_strides(widths: tuple[int, ...]) -> tuple[int, ...]:
    """2 for a convolution that changes the width, 1 for one that keeps it."""
    return tuple(1 if i and widths[i] == widths[i - 1] else 2 for i in range(len(widths)))


class Stem(nn.Module):
    """3x3 convolutions [B, 3, H, W] -> [B, C, h, h]; those that keep the width are residual and start at zero.

    So training can start from a shallow stem, which finds colors at once, and grow a deep one, which finds shapes
    (`grow_stem` of train-encoder). Trained deep from the first step, it had shapes right in 97 % of pictures and
    colors at chance (LOG.md).
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...]):
        super().__init__()
        self.num_features = widths[-1]  # HybridEmbed asks for it
        self.strides = _stem_strides(widths)
        inputs = (in_channels, *widths[:-1])
        sizes = list(zip(inputs, widths, self.strides, strict=True))
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, 3, s, padding=1) for i, o, s in sizes)
        self.norms = nn.ModuleList(nn.GroupNorm(1, i) if n else nn.Identity() for n, i in enumerate(inputs))
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            if stride == 1:
                nn.init.zeros_(convolution.weight)

    def residual_parameters(self) -> list[nn.Parameter]:
        """Those of the convolutions around which the input skips."""
        return [p for c, s in zip(self.convolutions, self.strides, strict=True) if s == 1 for p in c.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.convolutions, self.norms, self.strides, strict=True)
        for number, (convolution, norm, stride) in enumerate(parts):
            y = convolution(F.gelu(norm(x)) if number else x)
            x = x + y if stride == 1 else y
        return x


def _stem_embed(
    img_size: int, in_chans: int, embed_dim: int, widths: tuple[int, ...], patch_size: int, **unused: Any
) -> HybridEmbed:
    """Patch embedding by a `Stem`, called by timm with its own keywords."""
    if widths[-1] != embed_dim:
        raise UserError(f"the last width of stem, {widths[-1]}, must equal the backbone's embed_dim, {embed_dim}")
    return HybridEmbed(
        Stem(in_chans, widths),
        img_size=img_size,
        feature_size=(img_size // patch_size,) * 2,
        in_chans=in_chans,
        embed_dim=embed_dim,
        proj=False,
    )


def map_transformers_keys(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of transformers' SigLIP or CLIP image tower under timm's names, query, key and value joined.

    Args: state: the state_dict (with or without the prefix "vision_model."); layers: number of blocks.
    Raises KeyError for a missing key, and UserError listing every key that was not used.
    """
    source = {key.removeprefix("vision_model."): value for key, value in state.items()}
    clip = "embeddings.class_embedding" in source  # CLIP: a class token and a norm before the blocks, no pooling head
    head, mapped = "head.attention.", {}
    table = {"patch_embed.proj.weight": "embeddings.patch_embedding.weight"}
    parts = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    head_parts = {
        "proj": "attention.out_proj",
        "norm": "layernorm",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        table[f"norm.{kind}"] = f"post_layernorm.{kind}"
        for layer in range(layers):
            ours, theirs = f"blocks.{layer}", f"encoder.layers.{layer}"
            table |= {f"{ours}.{a}.{kind}": f"{theirs}.{b}.{kind}" for a, b in parts.items()}
            joined = [source.pop(f"{theirs}.self_attn.{name}_proj.{kind}") for name in "qkv"]
            mapped[f"{ours}.attn.qkv.{kind}"] = torch.cat(joined)
        if clip:
            table[f"norm_pre.{kind}"] = f"pre_layrnorm.{kind}"
            continue
        table |= {f"attn_pool.{a}.{kind}": f"head.{b}.{kind}" for a, b in head_parts.items()}
        query, rest = source.pop(f"{head}in_proj_{kind}").tensor_split([source["head.probe"].shape[-1]])
        mapped[f"attn_pool.q.{kind}"], mapped[f"attn_pool.kv.{kind}"] = query, rest
    mapped["pos_embed"] = source.pop("embeddings.position_embedding.weight")[None]
    if clip:
        mapped["cls_token"] = source.pop("embeddings.class_embedding")[None, None]
    else:
        mapped["attn_pool.latent"] = source.pop("head.probe")
        table["patch_embed.proj.bias"] = "embeddings.patch_embedding.bias"
    mapped |= {ours: source.pop(theirs) for ours, theirs in table.items()}
    source.pop("embeddings.position_ids", None)
    if source:
        raise UserError(f"the weights hold keys that the backbone has no place for: {sorted(source)[:5]}")
    return mapped
