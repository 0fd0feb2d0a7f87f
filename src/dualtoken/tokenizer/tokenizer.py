"""The vision tokenizer: image -> pixel and semantic codes -> image, and meaning (paper section 3.2, Fig. 4b).

    images -- backbone -- layer 6  -- pixel branch ---- decoder -- images
                  |
                  +------ layer 26 -- semantic branch -- last blocks, norm, pooling -- pooled feature

Shapes: B batch, N positions, P class or register tokens of the backbone (0 for SigLIP), D depth, C width.
"""

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import StrictModel
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig
from dualtoken.tokenizer.branch import Branch, BranchConfig, BranchOutput
from dualtoken.tokenizer.decoder import Decoder, DecoderConfig
from dualtoken.tokenizer.image_processor import DualTokenImageProcessor
from dualtoken.tokenizer.pixel_encoder import PixelEncoder, PixelEncoderConfig
from dualtoken.tokenizer.quantizer import QuantizerConfig


class DualTokenVisionConfig(PreTrainedConfig):
    """Everything needed to build the tokenizer: the dataclasses of its parts, as dicts.

    Args: pixel_encoder: None = pixel features are a layer of the backbone; else the convolutional encoder of their
        own in the dual-encoder baseline (appendix F.4).
    """

    model_type = "dualtoken-tokenizer"

    def __init__(
        self,
        backbone: dict | None = None,
        pixel: dict | None = None,
        semantic: dict | None = None,
        decoder: dict | None = None,
        pixel_encoder: dict | None = None,
        **kwargs,
    ):
        self.backbone = backbone or asdict(BackboneConfig())
        self.pixel = pixel or asdict(BranchConfig())
        self.semantic = semantic or asdict(BranchConfig())
        self.decoder = decoder or asdict(DecoderConfig())
        self.pixel_encoder = pixel_encoder
        super().__init__(**kwargs)


@dataclass
class TokenizerOutput:
    """A training pass."""

    images: Tensor  # [B, 3, H, W], reconstructed, about -1 to 1
    pixel: BranchOutput  # features [B, N, C]
    semantic: BranchOutput  # features [B, P + N, C]
    pooled: Tensor  # [B, C], from the quantised semantic features


def branch_config(config: dict) -> BranchConfig:
    """A branch of `DualTokenVisionConfig` as its dataclass."""
    return BranchConfig(**config | {"quantizer": QuantizerConfig(**config["quantizer"])})


class DualTokenVisionTokenizer(StrictModel):
    """Images [B, 3, H, W] in [-1, 1] to codes of two vocabularies and back.

    Class and register tokens of a backbone go through the semantic branch as extra positions, first in line; the
    pixel branch and the language model never see them.
    """

    config_class = DualTokenVisionConfig
    main_input_name = "images"

    def __init__(self, config: DualTokenVisionConfig):
        super().__init__(config)
        self.backbone = Backbone(BackboneConfig(**config.backbone))
        pixel, semantic = branch_config(config.pixel), branch_config(config.semantic)
        self.pixel = Branch(self.backbone.width, pixel)
        self.joined = semantic.joined
        if self.joined:
            _check_joined(self.backbone, pixel, config.pixel_encoder is not None)
            self.__dict__["semantic"] = self.pixel  # not registered: its weights are there once, as the pixel branch's
        else:
            self.semantic = Branch(self.backbone.width, semantic)
        self.decoder = Decoder(self.backbone.width, self.backbone.grid, DecoderConfig(**config.decoder))
        self.pixel_encoder = None
        if config.pixel_encoder is not None:
            sizes = self.backbone.image_size, self.backbone.grid, self.backbone.width
            self.pixel_encoder = PixelEncoder(*sizes, PixelEncoderConfig(**config.pixel_encoder))
        self.post_init()

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.backbone.image_size

    @property
    def positions(self) -> int:
        """N, code positions of an image."""
        return self.backbone.grid**2

    def encode(self, images: Tensor) -> DualCodes:
        """Images [B, 3, H, W] -> codes, pixel int64 [B, N, D] and semantic int64 [B, P + N, D]."""
        pixel, shortcut, semantic = self._taps(images)
        codes = self.pixel.encode(pixel, shortcut)
        return DualCodes(codes, codes.clone() if self.joined else self.semantic.encode(semantic))

    def features(self, codes: DualCodes) -> tuple[Tensor, Tensor]:
        """Codes -> features after quantisation: pixel [B, N, C] and semantic [B, P + N, C]."""
        return self.pixel.lookup(codes.pixel), self.semantic.lookup(codes.semantic)

    def decode(self, codes: DualCodes) -> Tensor:
        """Codes -> images [B, 3, H, W], clamped to [-1, 1]. Only the pixel codes are looked at."""
        return self.decoder(self.pixel.lookup(codes.pixel)).clamp(-1, 1)

    def pool(self, semantic: Tensor) -> Tensor:
        """Semantic features [B, P + N, C] -> pooled feature [B, C], in the space of the backbone's text tower."""
        return self.backbone.pool(semantic, self.backbone.semantic_layer)

    def speed_up_decoder(self, channels_last: bool = True, compiled: bool = False) -> None:
        """Lay the decoder out for quick convolutions; pictures stay the same but for rounding.

        Args:
            channels_last: the channels of a pixel lie side by side in memory, as tensor cores want them.
            compiled: through torch.compile, once for each batch size (half a minute at first).
        """
        if channels_last:
            self.decoder.to(memory_format=torch.channels_last)
        if compiled:
            self.decoder.compile(dynamic=False)

    def drop_tower(self) -> None:
        """Keep what `features` needs and let go of the rest: training on stored codes needs no vision tower."""
        self.backbone = self.decoder = self.pixel_encoder = None
        for branch in (self.pixel, self.semantic):
            branch.pre = branch.shortcut = None

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct images [B, 3, H, W] with gradients; in training mode EMA codebooks take a step."""
        pixel_features, shortcut, semantic_features = self._taps(images)
        pixel = self.pixel(pixel_features, shortcut)
        if self.joined:  # what moves the codebook counts once
            none = pixel.commitment.new_zeros(())
            semantic = replace(pixel, commitment=none, codebook_loss=none)
        else:
            semantic = self.semantic(semantic_features)
        return TokenizerOutput(self.decoder(pixel.features), pixel, semantic, self.pool(semantic.features))

    def _taps(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Features for the pixel branch, for its shortcut (or None), and for the semantic branch, in one pass."""
        prefix = self.backbone.prefix
        wanted = {"semantic": self.backbone.semantic_layer}
        if self.pixel_encoder is None:
            wanted["pixel"] = self.backbone.pixel_layer
        if self.pixel.shortcut is not None:
            wanted["shortcut"] = self.pixel.shortcut_layer
        layers = tuple(sorted(set(wanted.values())))
        found = dict(zip(layers, self.backbone.taps(images, layers), strict=True))
        shortcut = found[wanted["shortcut"]][:, prefix:] if "shortcut" in wanted else None
        pixel = found[wanted["pixel"]][:, prefix:] if "pixel" in wanted else self.pixel_encoder(images)
        return pixel, shortcut, found[wanted["semantic"]]


def _check_joined(backbone: Backbone, pixel: BranchConfig, own_encoder: bool) -> None:
    """Raise UserError where one codebook cannot serve for both."""
    if backbone.pixel_layer != backbone.semantic_layer:
        raise UserError(
            f"semantic.joined: one codebook needs one layer, backbone.pixel_layer is {backbone.pixel_layer} and "
            f"backbone.semantic_layer {backbone.semantic_layer}: give both the same number"
        )
    if backbone.prefix or own_encoder or pixel.shortcut_scale:
        raise UserError("semantic.joined: not for backbones with class tokens, nor with a pixel_encoder or a shortcut")


@torch.no_grad()
def reconstruct(tokenizer: DualTokenVisionTokenizer, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] through codes and back, clamped to [-1, 1]."""
    return tokenizer.decode(tokenizer.encode(images))


AutoConfig.register(DualTokenVisionConfig.model_type, DualTokenVisionConfig, exist_ok=True)
AutoModel.register(DualTokenVisionConfig, DualTokenVisionTokenizer, exist_ok=True)
# One class, on Pillow, under both names of back ends: else transformers warns that it has to fall back.
_PROCESSORS = dict.fromkeys(("pil", "torchvision"), DualTokenImageProcessor)
AutoImageProcessor.register(DualTokenVisionConfig, image_processor_classes=_PROCESSORS, exist_ok=True)
