"""`dualtoken eval reconstruction | zero-shot | retrieval`."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from dualtoken.core.errors import UserError
from dualtoken.data.images import Batch, DataConfig, Source, open_source, read_in_order
from dualtoken.data.scenes import scene
from dualtoken.eval.reconstruction import evaluate_reconstruction
from dualtoken.eval.report import table, write_json
from dualtoken.eval.scene_factors import FACTORS, SceneFactors
from dualtoken.eval.zero_shot import (
    accuracy,
    class_vectors,
    embed_all,
    embed_texts,
    quantized_embed,
)
from dualtoken.eval.zero_shot import retrieval as retrieval_at_1
from dualtoken.tokenizer.encoder import ImageTextEncoder, load_text_tokenizer
from dualtoken.tokenizer.presets import BUNDLED, encoder_directory, open_encoder, open_tokenizer
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer
from dualtoken.training.perceptual import LPIPS


@dataclass
class _Opened:
    """What a comparison of codes with their teacher needs."""

    tokenizer: DualTokenVisionTokenizer
    teacher: ImageTextEncoder
    texts: PreTrainedTokenizerFast
    source: Source

    def embed(self, batches: list[Batch]) -> dict[str, torch.Tensor]:
        """Unit vectors [M, C] of all pictures, from the semantic codes and from the continuous teacher."""
        embeds = {"codes": quantized_embed(self.tokenizer), "teacher": self.teacher.embed_image}
        return {who: embed_all(e, self.teacher.device, (b.images for b in batches)) for who, e in embeds.items()}


def _open(model: str, encoder: str | None, data: str) -> _Opened:
    tokenizer, teacher = open_tokenizer(model).to(_device()), _teacher(model, encoder, needed=True)
    texts = load_text_tokenizer(encoder_directory(encoder or model))
    return _Opened(tokenizer, teacher, texts, open_source(DataConfig(data), tokenizer.image_size, "test", "--data"))


def reconstruction(
    model: str = "mini",
    data: str = "scenes",
    images: int = 500,
    encoder: str | None = None,
    lpips_net: str = "vgg",
    lpips_weights: str | None = None,
    inception_weights: str | None = None,
    batch_size: int = 50,
    output: str | None = None,
) -> dict[str, Any]:
    """Measure how pictures come back from their codes.

    Args:
        model: directory of a tokenizer, or a preset.
        data: "scenes" (unseen ones), a folder of pictures, or webdataset shards.
        images: how many, at most.
        encoder: the teacher, for the Frechet distance in its features; a preset brings its own.
        lpips_net: "vgg" or "alex".
        lpips_weights: torchvision's file of that network; without it no LPIPS.
        inception_weights: torch-fidelity's Inception file; without it no FID.
        output: JSON file to write.
    """
    tokenizer = open_tokenizer(model).to(_device())
    teacher = _teacher(model, encoder)
    source = open_source(DataConfig(data), tokenizer.image_size, "test", "--data")
    skipped: list[str] = []
    result = evaluate_reconstruction(
        tokenizer,
        (b.images for b in read_in_order(source, images, batch_size, skipped)),
        teacher.backbone if teacher is not None else None,
        LPIPS(lpips_net, lpips_weights).to(_device()) if lpips_weights else None,
        inception_weights,
    )
    rows = [(name, value) for name, value in asdict(result).items()]
    print(table(("measure", model), rows))
    found = {"model": model, "data": data, **asdict(result), "skipped": skipped}
    write_json(output, found)
    return found


def zero_shot(
    model: str = "mini",
    encoder: str | None = None,
    data: str = "scenes",
    images: int = 500,
    batch_size: int = 50,
    output: str | None = None,
) -> dict[str, Any]:
    """Zero-shot accuracy of the pooled feature made from semantic codes, beside the continuous teacher.

    Args:
        model: directory of a tokenizer, or a preset.
        encoder: directory of its image-text encoder; a preset brings its own.
        data: "scenes" (unseen ones of one object: every factor, color and shape jointly), or a folder with a subfolder
            a class.
        images: how many, at most.
        output: JSON file to write.
    """
    opened = _open(model, encoder, data)
    teacher, texts, source = opened.teacher, opened.texts, opened.source
    if not source.classes:
        raise UserError(f"--data {data}: no class folders in it; zero-shot needs a folder a class")
    skipped: list[str] = []
    batches = list(read_in_order(source, images, batch_size, skipped, labelled=True))
    labels = torch.cat([b.labels for b in batches])
    names = [name.replace("_", " ") for name in source.classes]
    classes = class_vectors(teacher, texts, names)
    vectors = opened.embed(batches)
    overall = "jointly" if data == "scenes" else "accuracy"  # color and shape of a scene
    found = {overall: {who: accuracy(v, classes, labels) for who, v in vectors.items()}}
    if data == "scenes":
        truths = [scene(int(name.rsplit("-", 1)[1]), "test") for b in batches for name in b.names]
        factors = SceneFactors(teacher, texts)
        by_factor = {who: factors.accuracy(v, truths) for who, v in vectors.items()}
        found |= {name: {who: by_factor[who][name] for who in vectors} for name in FACTORS}
    rows = [(name, v["codes"], v["teacher"]) for name, v in found.items()]
    print(f"zero-shot accuracy, {len(labels)} pictures, {len(names)} classes")
    print(table(("factor", "semantic codes", "continuous teacher"), rows))
    result = {"model": model, "data": data, "images": len(labels), "classes": len(names), **found, "skipped": skipped}
    write_json(output, result)
    return result


def retrieval(
    model: str = "mini",
    encoder: str | None = None,
    data: str = "scenes",
    images: int = 500,
    batch_size: int = 50,
    output: str | None = None,
) -> dict[str, Any]:
    """Image-text retrieval R@1 both ways from semantic codes, beside the continuous teacher.

    Args:
        model: directory of a tokenizer, or a preset.
        encoder: directory of its image-text encoder; a preset brings its own.
        data: "scenes" (unseen ones), a folder with captions in .txt files, or shards with captions.
        images: how many, at most.
        output: JSON file to write.
    """
    opened = _open(model, encoder, data)
    teacher, texts, source = opened.teacher, opened.texts, opened.source
    skipped: list[str] = []
    batches = list(read_in_order(source, images, batch_size, skipped))
    captions = [caption for b in batches for caption in b.captions]
    if not any(captions):
        raise UserError(f"--data {data}: no captions; put NAME.txt beside each picture NAME.jpg")
    written = torch.cat([embed_texts(teacher, texts, b.captions) for b in batches])
    vectors = opened.embed(batches)
    both = {who: retrieval_at_1(v, written, captions) for who, v in vectors.items()}
    found = {
        name: {who: value[i] for who, value in both.items()}
        for i, name in enumerate(("text_to_image", "image_to_text"))
    }
    print(f"retrieval R@1 among {len(captions)} pairs")
    print(table(("direction", "semantic codes", "continuous teacher"), [(n, *v.values()) for n, v in found.items()]))
    result = {"model": model, "data": data, "images": len(captions), **found, "skipped": skipped}
    write_json(output, result)
    return result


def _teacher(model: str, encoder: str | None, needed: bool = False) -> ImageTextEncoder | None:
    """The image-text encoder that is named, or that comes with a preset; else None, or an error where `needed`."""
    if encoder is None and model in BUNDLED:
        encoder = model
    if encoder is None and needed:
        raise UserError(
            f"--encoder is needed with --model {model}: the directory of the image-text encoder it started from"
        )
    return None if encoder is None else open_encoder(encoder).to(_device())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
