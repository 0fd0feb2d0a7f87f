"""A contrastive image-text encoder (SigLIP; Zhai et al., 2023): the "pretrained backbone" of the miniature.

Image tower: any timm ViT. Text tower: a small SigLIP text model of our own, or a pretrained one (`text_tower.py`).
Both end in one joint space, in which a picture and its caption are near. The tokenizer starts from the image tower
and keeps it as its frozen teacher.

Shapes: B batch, T text length, C width.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import StrictModel
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig
from dualtoken.tokenizer.text_tower import TextConfig, build_text_tower, embed_ids, import_open_clip

TextTokenizer = PreTrainedTokenizerBase | Callable[[list[str]], Tensor]  # transformers', or one of open_clip
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


class ImageTextConfig(PreTrainedConfig):
    """Sizes of an image-text encoder: a `BackboneConfig` as a dict, and the dict of a text tower."""

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
        self.text = build_text_tower(config.text, self.backbone.pooled_width)
        # SigLIP's start: temperature 10, and a bias for one match among many
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # A text tower of open_clip; its mask is not stored either, and one that is not causal has none.
        if hasattr(module, "build_causal_mask") and module.attn_mask is not None:
            module.attn_mask = module.build_causal_mask()

    def embed_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> unit vectors [B, C]."""
        return F.normalize(self.backbone(images), dim=-1)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token numbers [B, T], padded to the full length -> unit vectors [B, C]."""
        return F.normalize(embed_ids(self.text, ids), dim=-1)

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


def load_text_tokenizer(directory: str | Path) -> TextTokenizer:
    """The tokenizer stored beside an encoder. Raises UserError where there is none."""
    config = Path(directory) / "config.json"
    written = json.loads(config.read_text()) if config.is_file() else {}
    return text_tokenizer(written.get("text") or {}, Path(directory))


def text_tokenizer(text: dict[str, Any], files: Path) -> TextTokenizer:
    """The tokenizer of a text tower by its dict, from the files of a directory.

    Raises UserError where the files are not there, or cannot be read.
    """
    kind = text.get("kind", "dualtoken")
    if kind == "open_clip":
        return _open_clip_tokenizer(text["config"]["text_cfg"], files)
    needed = TOKENIZER_FILES[:1] if kind == "dualtoken" else TOKENIZER_FILES
    if not any((files / name).is_file() for name in needed):
        raise UserError(f"{files}: no {' or '.join(needed)} in it; give the directory of an image-text encoder")
    if kind == "dualtoken":
        return PreTrainedTokenizerFast.from_pretrained(files, local_files_only=True)
    try:
        found = AutoTokenizer.from_pretrained(files, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        remedy = ": pip install sentencepiece" if isinstance(error, ImportError) else ""
        line = str(error).strip().partition("\n")[0][:150]
        raise UserError(f"{files}: its text tokenizer cannot be read ({line}){remedy}") from None
    found.model_max_length = text["length"]  # some published files say "no limit"
    return found


def _open_clip_tokenizer(text: dict[str, Any], files: Path) -> TextTokenizer:
    """As open_clip.get_tokenizer chooses it from a text_cfg, but never from a hub: its name there is not followed."""
    tokenizer = import_open_clip("the text tokenizer").tokenizer
    length, options = text.get("context_length", 77), text.get("tokenizer_kwargs") or {}
    name = text.get("hf_tokenizer_name")
    if not name:
        return tokenizer.SimpleTokenizer(context_length=length, **options)
    if not any((files / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(
            f"{files}: no text tokenizer in it; put tokenizer.json, tokenizer_config.json and special_tokens_map.json "
            f"of https://huggingface.co/{name} beside the weights"
        )
    options = options | {"tokenizer_mode": text.get("tokenizer_mode"), "local_files_only": True}
    return tokenizer.HFTokenizer(str(files), context_length=length, **options)


def tokenize(tokenizer: TextTokenizer, texts: list[str]) -> Tensor:
    """Captions -> token numbers [B, T], cut or padded to the full length."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer(texts)
    out = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return out["input_ids"]
