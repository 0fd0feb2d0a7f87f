"""`dualtoken info`: what a model directory or preset holds, and what a model of a shape by name would."""

import json
import math
from pathlib import Path

from torch import nn

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import check_directory
from dualtoken.eval.report import table
from dualtoken.mllm.config import DualTokenConfig
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.mllm.presets import SHAPES, mllm_directory, open_mllm
from dualtoken.mllm.projector import two_layers
from dualtoken.tokenizer.encoder import ImageTextConfig, ImageTextEncoder
from dualtoken.tokenizer.presets import (
    BUNDLED,
    encoder_directory,
    meta_tokenizer,
    open_encoder,
    open_tokenizer,
    shapes,
    tokenizer_directory,
)
from dualtoken.tokenizer.tokenizer import DualTokenVisionConfig, DualTokenVisionTokenizer

GIB = 2**30


def info(model: str) -> None:
    """Print parameters by part, sizes, taps and codes of a model.

    Args:
        model: a preset, the directory of a tokenizer, image-text encoder or multimodal model, or a shape by name, which
            is counted without weights: a tokenizer's recipe (siglip-l-256, ...), paper-3b, paper-7b, gpu-0.5b, gpu-1.5b
    """
    if model in SHAPES:
        built = SHAPES[model].build()
        _mllm(model, built)
        print("\n" + _appendix_d(built))
        print(f"\nmemory of its training: dualtoken plan {SHAPES[model].recipe}")
        return
    if model in shapes():
        _tokenizer(model, meta_tokenizer(model))
        return
    if model in BUNDLED:
        _tokenizer(tokenizer_directory(model), open_tokenizer(model))
        print()
        _encoder(encoder_directory(model), open_encoder(model))
        print()
        _mllm(mllm_directory(model), open_mllm(model)[0])
        return
    if not Path(model).exists():
        known = ", ".join([*BUNDLED, *shapes(), *SHAPES])
        raise UserError(f"MODEL {model}: no such directory, and no preset or shape (known: {known})")
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


def _tokenizer(name: Path | str, model: DualTokenVisionTokenizer) -> None:
    backbone = model.backbone
    print(f"vision tokenizer {name}\n")
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
        sizes = f"{q.kind} of {q.codebook_size} codes, width {q.code_dim}, depth {q.depth}"
        rows.append((name, f"layer {layer}, {sizes}: {bits} bits an image"))
    stored = 2 * sum(model.positions * getattr(model, n).quantizer.config.depth for n in ("pixel", "semantic"))
    rows.append(("an image", f"{math.ceil(total / 8)} bytes of information, {stored} bytes on disk (16 bits a code)"))
    held = (16 * _count(model) + 4 * _count(backbone)) / GIB  # float32 weights, gradients, two moments; the teacher
    rows.append(("training", f"{held:.1f} GiB of weights, gradients, AdamW's moments and teacher, activations on top"))
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


def _appendix_d(model: DualTokenForConditionalGeneration) -> str:
    """What the second vocabulary adds, beside appendix D's numbers for the 3B model."""
    hidden, width = model.config.text_config.hidden_size, model.feature_width
    one = two_layers(width, hidden, hidden)
    head = model.semantic_head
    rows = [
        ("projector", _count(model.projector.joint) - _count(one), "2.1 M"),
        ("a visual head: blocks and classifiers", _count(head.blocks) + _count(head.classifiers), "258 M"),
        ("its generation projector and input layer", _count(head.projector) + _count(head.embed_in), None),
        ("its code embeddings (VQEmbedding)", _count(head.embedding), "16 M"),
    ]
    total = sum(added for _, added, _ in rows)
    rows = [(name, f"{added:,}", paper) for name, added, paper in rows]
    rows.append(("all, as a share of the LLM", f"{100 * total / _count(model.llm):.2f} %", "8.93 % of 3B"))
    return table(("added by the second vocabulary", "here", "appendix D (3B)"), rows)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _parameters(model: nn.Module) -> str:
    """Table of parameters and buffers by part."""
    rows = [
        (name, f"{sum(p.numel() for p in part.parameters()):,}", f"{sum(b.numel() for b in part.buffers()):,}")
        for name, part in model.named_children()
    ]
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers())
    return table(("part", "parameters", "buffers"), [*rows, ("all", f"{parameters:,}", f"{buffers:,}")])
