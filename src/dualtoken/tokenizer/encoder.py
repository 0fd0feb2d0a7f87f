"""A contrastive image-text encoder (SigLIP; Zhai et al., 2023): the "pretrained backbone" of the miniature.

Image tower: any timm ViT. Text tower: transformers' SigLIP text model. Both end in one joint space, in which a
picture and its caption are near. The tokenizer starts from the image tower and keeps it as its frozen teacher.

Shapes: B batch, T text length, C width.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, SiglipTextConfig, SiglipTextModel

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import StrictModel
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig


@dataclass
class TextConfig:
    """The text tower: `length` tokens a caption (longer ones are cut), `vocab_size` at most."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    length: int = 32
    vocab_size: int = 512


class ImageTextConfig(PreTrainedConfig):
    """Sizes of an image-text encoder: a `BackboneConfig` and a `TextConfig` as dicts."""

    model_type = "dualtoken-encoder"

    def __init__(self, backbone: dict | None = None, text: dict | None = None, **kwargs):
        self.backbone = backbone or asdict(BackboneConfig())
        self.text = text or asdict(TextConfig())
        super().__init__(**kwargs)


class ImageTextEncoder(StrictModel):
    """Images and captions into one space of width C."""

    config_class = ImageTextConfig
    main_input_name = "images"

    def __init__(self, config: ImageTextConfig):
        super().__init__(config)
        self.backbone = Backbone(BackboneConfig(**config.backbone))
        text = TextConfig(**config.text)
        self.text = SiglipTextModel(
            SiglipTextConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.width,
                intermediate_size=4 * text.width,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                max_position_embeddings=text.length,
                projection_size=self.backbone.width,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=1,
            )
        )
        # SigLIP's start: temperature 10, and a bias for one match among many
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        self.post_init()

    def embed_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> unit vectors [B, C]."""
        return F.normalize(self.backbone(images), dim=-1)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token numbers [B, T], padded to the full length -> unit vectors [B, C]."""
        return F.normalize(self.text(input_ids=ids).pooler_output, dim=-1)

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Unit vectors [B, C] and [B', C] -> match logits [B, B']."""
        return image @ text.t() * self.logit_scale.exp() + self.logit_bias

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Match logits [B, B'] of images [B, 3, H, W] and captions [B', T]."""
        return self.logits(self.embed_image(images), self.embed_text(ids))


def train_text_tokenizer(captions: Iterable[str], config: TextConfig) -> PreTrainedTokenizerFast:
    """A lower-case byte-pair tokenizer of at most `config.vocab_size` tokens, learnt from captions."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=config.length,
    )


def load_text_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer stored beside an encoder. Raises UserError where there is none."""
    if not (Path(directory) / "tokenizer.json").is_file():
        raise UserError(f"{directory}: no tokenizer.json in it; give the directory of an image-text encoder")
    return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Captions -> token numbers [B, T], cut or padded to the full length."""
    out = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return out["input_ids"]
