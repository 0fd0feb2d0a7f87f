"""`dualtoken info`: what a model directory or preset holds, and what the paper's models would."""

import json
import math
from pathlib import Path

from torch import nn

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import check_directory
from dualtoken.eval.report import table
from dualtoken.mllm.model import DualTokenConfig, DualTokenForConditionalGeneration
from dualtoken.mllm.presets import PAPER_LLMS, mllm_directory, open_mllm, paper_model
from dualtoken.tokenizer.encoder import ImageTextConfig, ImageTextEncoder
from dualtoken.tokenizer.presets import BUNDLED, encoder_directory, open_encoder, open_tokenizer, tokenizer_directory
from dualtoken.tokenizer.tokenizer import DualTokenVisionConfig, DualTokenVisionTokenizer


def info(model: str) -> None:
    """Print parameters by part, sizes, taps and codes of a model.

    Args:
        model: a preset, or the directory of a tokenizer, image-text encoder or multimodal model; "paper-3b" and
            "paper-7b" are counted without weights.
    """
    if model in PAPER_LLMS:
        _mllm(model, paper_model(model))
        return
    if model in BUNDLED:
        _tokenizer(tokenizer_directory(model), open_tokenizer(model))
        print()
        _encoder(encoder_directory(model), open_encoder(model))
        print()
        _mllm(mllm_directory(model), open_mllm(model)[0])
        return
    if not Path(model).exists():
        raise UserError(f"MODEL {model}: no such directory, and no preset (presets: {', '.join(BUNDLED)})")
    directory = check_directory(model, "MODEL")
    kind = json.loads((directory / "config.json").read_text()).get("model_type")
    if kind == DualTokenVisionConfig.model_type:
        _tokenizer(directory, open_tokenizer(model))
    elif kind == ImageTextConfig.model_type:
        _encoder(directory, open_encoder(model))
    elif kind == DualTokenConfig.model_type:
        _mllm(directory, open_mllm(model)[0])
    else:
        raise UserError(
            f"MODEL {model}: holds a {kind!r} model; info knows tokenizers, image-text encoders and multimodal models"
        )


def _tokenizer(directory: Path, model: DualTokenVisionTokenizer) -> None:
    backbone = model.backbone
    print(f"vision tokenizer {directory}\n")
    print(_parameters(model))
    rows = [
        ("image", f"{model.image_size} x {model.image_size} px"),
        ("positions", f"{model.positions} = {backbone.grid} x {backbone.grid}, {backbone.prefix} class tokens"),
        ("backbone", f"{model.config.backbone['name']}, {backbone.layers} blocks of width {backbone.width}"),
    ]
    total = 0
    for name in ("pixel", "semantic"):
        q = getattr(model, name).quantizer.config
        bits = model.positions * q.depth * math.ceil(math.log2(q.codebook_size))
        total += bits
        layer = getattr(backbone, f"{name}_layer")
        rows.append((name, f"layer {layer}, {q.codebook_size} x {q.code_dim}, depth {q.depth}: {bits} bits an image"))
    stored = 2 * sum(model.positions * getattr(model, n).quantizer.config.depth for n in ("pixel", "semantic"))
    rows.append(("an image", f"{math.ceil(total / 8)} bytes of information, {stored} bytes on disk (16 bits a code)"))
    print("\n" + table(("part", "what"), rows))


def _encoder(directory: Path, model: ImageTextEncoder) -> None:
    text = model.config.text
    print(f"image-text encoder {directory}\n")
    print(_parameters(model))
    rows = [
        ("image", f"{model.backbone.image_size} px, {model.backbone.layers} blocks of width {model.backbone.width}"),
        ("text", f"{text['layers']} layers of width {text['width']}, {text['length']} tokens of {text['vocab_size']}"),
    ]
    print("\n" + table(("part", "what"), rows))


def _mllm(name: Path | str, model: DualTokenForConditionalGeneration) -> None:
    config = model.config
    print(f"multimodal model {name}\n")
    print(_parameters(model))
    text, rows = config.text_config, []
    for head in ("pixel", "semantic"):
        sizes = ", ".join(
            f"{part} {sum(p.numel() for p in module.parameters()):,}"
            for part, module in getattr(model, f"{head}_head").named_children()
        )
        rows.append((f"{head} head", sizes))
    rows += [
        ("LLM", f"{text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}, "
                f"{text.vocab_size} tokens, context {text.max_position_embeddings}"),
        ("a picture", f"{config.positions} positions, read as {config.input}, drawn as {config.output}"),
    ]  # fmt: skip
    print("\n" + table(("part", "what"), rows))


def _parameters(model: nn.Module) -> str:
    """Table of parameters and buffers by part."""
    rows = [
        (name, f"{sum(p.numel() for p in part.parameters()):,}", f"{sum(b.numel() for b in part.buffers()):,}")
        for name, part in model.named_children()
    ]
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers())
    return table(("part", "parameters", "buffers"), [*rows, ("all", f"{parameters:,}", f"{buffers:,}")])
