"""`dualtoken eval reconstruction | zero-shot | retrieval`."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualtoken.core.errors import UserError
from dualtoken.core.images import FIT, to_float
from dualtoken.data.captions import CaptionedImages
from dualtoken.data.images import Batch, DataConfig, open_source, read_in_order
from dualtoken.data.scenes import scene
from dualtoken.eval.prompts import class_names, prompt_templates
from dualtoken.eval.reconstruction import evaluate_reconstruction
from dualtoken.eval.report import table, write_json
from dualtoken.eval.scene_factors import FACTORS, SceneFactors
from dualtoken.eval.zero_shot import accuracy, class_vectors, embed_texts, quantized_embed
from dualtoken.eval.zero_shot import retrieval as retrieval_at_1
from dualtoken.tokenizer.encoder import ImageTextEncoder, TextTokenizer
from dualtoken.tokenizer.initial import open_backbone
from dualtoken.tokenizer.presets import BUNDLED, open_tokenizer, scale_of
from dualtoken.tokenizer.pretrained import open_image_text
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer
from dualtoken.training.perceptual import LPIPS

MEASURED = {  # how each number of `reconstruction` comes about
    "psnr": "torchmetrics, on 8-bit pictures, mean of the pictures' values",
    "ssim": "torchmetrics, Gaussian window of 11, borders included, on 8-bit pictures",
    "lpips": "our LPIPS on 8-bit pictures",
    "fid": "torchmetrics with torch-fidelity's Inception, which resizes to 299 px as TensorFlow does",
    "teacher_frechet": "Frechet distance of the teacher's pooled features; no FID",
    "pixel_usage": "share of the codes met at least once, at any depth",
    "semantic_usage": "share of the codes met at least once, at any depth",
}


@dataclass
class _Seen:
    """Pictures that were looked at, one after the other; the pictures themselves are let go of."""

    vectors: dict[str, Tensor]  # unit vectors [M, C] from the semantic codes and from the continuous teacher
    labels: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@dataclass
class _Opened:
    """What a comparison of codes with their teacher needs."""

    tokenizer: DualTokenVisionTokenizer
    teacher: ImageTextEncoder
    texts: TextTokenizer

    @torch.no_grad()
    def look(self, batches: Iterable[Batch]) -> _Seen:
        """Embed all pictures in both ways."""
        embeds = {"codes": quantized_embed(self.tokenizer), "teacher": self.teacher.embed_image}
        parts: dict[str, list[Tensor]] = {who: [] for who in embeds}
        seen = _Seen({})
        for batch in batches:
            images = to_float(batch.images.to(self.teacher.device))
            for who, embed in embeds.items():
                parts[who].append(embed(images).cpu())
            seen.labels += batch.labels.tolist()
            seen.captions += batch.captions
            seen.names += batch.names
        seen.vectors = {who: torch.cat(found) for who, found in parts.items()}
        return seen


def _open(model: str, encoder: str | None) -> _Opened:
    tokenizer = open_tokenizer(model).to(_device())
    pair = open_image_text(_encoder(model, encoder))
    opened = _Opened(tokenizer, pair.encoder.to(_device()), pair.tokenizer)
    width = opened.teacher.backbone.pooled_width
    if tokenizer.image_size != opened.teacher.backbone.image_size or tokenizer.backbone.pooled_width != width:
        raise UserError(
            f"--encoder {encoder} takes {opened.teacher.backbone.image_size} px and gives features of width {width}, "
            f"--model {model} {tokenizer.image_size} px and {tokenizer.backbone.pooled_width}: give the encoder that "
            "the tokenizer started from"
        )
    return opened


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
        encoder: the teacher, for the Frechet distance in its features, as in zero-shot; a preset brings its own.
        lpips_net: "vgg" or "alex".
        lpips_weights: torchvision's file of that network; without it no LPIPS.
        inception_weights: torch-fidelity's Inception file; without it no FID.
        output: JSON file to write, with a page to read (.html) beside it.
    """
    tokenizer = open_tokenizer(model).to(_device())
    encoder = encoder or (model if model in BUNDLED else None)
    source = open_source(DataConfig(data), tokenizer.image_size, "test", "--data")
    skipped: list[str] = []
    result = evaluate_reconstruction(
        tokenizer,
        (b.images for b in read_in_order(source, images, batch_size, skipped)),
        open_backbone(encoder) if encoder else None,
        LPIPS(lpips_net, lpips_weights).to(_device()) if lpips_weights else None,
        inception_weights,
    )
    rows = [(name, value) for name, value in asdict(result).items()]
    print(table(("measure", model), rows))
    how = {name: text for name, text in MEASURED.items() if getattr(result, name) is not None}
    if lpips_weights:
        how["lpips"] += f", {lpips_net} by {Path(lpips_weights).name}"
    protocol = _protocol(tokenizer.image_size, result.images, reference="the same pictures, cropped alike", **how)
    found = {
        "model": model,
        "scale": scale_of(tokenizer),
        "data": data,
        **asdict(result),
        "protocol": protocol,
        "skipped": skipped,
    }
    write_json(output, found)
    return found


def zero_shot(
    model: str = "mini",
    encoder: str | None = None,
    data: str = "scenes",
    classes: str | None = None,
    templates: str | None = None,
    images: int = 500,
    batch_size: int = 50,
    output: str | None = None,
) -> dict[str, Any]:
    """Zero-shot accuracy of the pooled feature made from semantic codes, beside the continuous teacher.

    Args:
        model: directory of a tokenizer, or a preset.
        encoder: the image-text encoder that the tokenizer started from; a preset brings its own. A directory
            (train-encoder's, a Hugging Face SigLIP or CLIP model, or open_clip's), NAME=FILE (an open_clip
            architecture and its weights), or hf-hub:ORG/NAME, which alone is fetched.
        data: "scenes" (unseen ones of one object: every factor, color and shape jointly), or a folder with a subfolder
            a class.
        classes: names for the folders: "imagenet" (folders named by WordNet id or number), or a file with a name a line
            in the folders' order; without it a folder's own name.
        templates: "openai" (80 prompts, as published zero-shot numbers use), "simple" (7), a text with {}, or a file of
            such; without it "a {}".
        images: how many, at most, spread over all classes; ImageNet's validation set has 50000.
        output: JSON file to write, with a page to read (.html) beside it.
    """
    opened = _open(model, encoder)
    source = open_source(DataConfig(data), opened.tokenizer.image_size, "test", "--data")
    if not source.classes:
        raise UserError(f"--data {data}: no class folders in it; zero-shot needs a folder a class")
    names, prompts = class_names(classes, source.classes), prompt_templates(templates)
    skipped: list[str] = []
    seen = opened.look(read_in_order(source, images, batch_size, skipped, labelled=True))
    labels, vectors = torch.tensor(seen.labels), seen.vectors
    of_classes = class_vectors(opened.teacher, opened.texts, names, prompts)
    overall = "jointly" if data == "scenes" else "accuracy"  # color and shape of a scene
    found = {overall: {who: accuracy(v, of_classes, labels) for who, v in vectors.items()}}
    if data == "scenes":
        truths = [scene(int(name.rsplit("-", 1)[1]), "test") for name in seen.names]
        factors = SceneFactors(opened.teacher, opened.texts)
        by_factor = {who: factors.accuracy(v, truths) for who, v in vectors.items()}
        found |= {name: {who: by_factor[who][name] for who in vectors} for name in FACTORS}
    rows = [(name, v["codes"], v["teacher"]) for name, v in found.items()]
    print(f"zero-shot accuracy, {len(labels)} pictures, {len(names)} classes, {len(prompts)} prompts a class")
    protocol = _protocol(
        opened.tokenizer.image_size, len(labels), prompts=templates or "a {}", prompts_a_class=len(prompts),
        score="cosine with the mean of a class's prompts; accuracy of the nearest class",
    )  # fmt: skip
    print(table(("factor", "semantic codes", "continuous teacher"), rows))
    result = {"model": model, "data": data, "images": len(labels), "classes": len(names), **found}
    result |= {"scale": scale_of(opened.tokenizer), "protocol": protocol, "skipped": skipped}
    write_json(output, result)
    return result


def retrieval(
    model: str = "mini",
    encoder: str | None = None,
    data: str = "scenes",
    captions: str | None = None,
    split_file: str | None = None,
    images: int | None = None,
    batch_size: int = 50,
    output: str | None = None,
) -> dict[str, Any]:
    """Image-text retrieval R@1 both ways from semantic codes, beside the continuous teacher.

    Args:
        model: directory of a tokenizer, or a preset.
        encoder: the image-text encoder that the tokenizer started from; a preset brings its own. A directory
            (train-encoder's, a Hugging Face SigLIP or CLIP model, or open_clip's), NAME=FILE (an open_clip
            architecture and its weights), or hf-hub:ORG/NAME, which alone is fetched.
        data: "scenes" (unseen ones), a folder with captions in .txt files, or shards with captions.
        captions: caption file of the pictures in folder `data`, several captions a picture: Flickr8k's captions.txt or
            Flickr8k.token.txt.
        split_file: names of the pictures to use, one a line, as Flickr_8k.testImages.txt (1000 of them).
        images: how many, at most; default: all pictures of a --captions file, 500 of other data (R@1 is the
            higher the fewer there are).
        output: JSON file to write, with a page to read (.html) beside it.
    """
    opened = _open(model, encoder)
    if split_file is not None and captions is None:
        raise UserError(f"--split_file {split_file}: it chooses among the pictures of a --captions file; give that too")
    size, skipped = opened.tokenizer.image_size, []
    if captions is None:
        source = open_source(DataConfig(data), size, "test", "--data")
    else:
        source = CaptionedImages(data, captions, size, split_file)
    if images is None:
        images = 500 if captions is None else len(source)
    seen = opened.look(read_in_order(source, images, batch_size, skipped))
    known = [i for i, caption in enumerate(seen.captions) if caption or captions is not None]
    if not known:
        raise UserError(f"--data {data}: no captions; put NAME.txt beside each picture NAME.jpg, or give --captions")
    written = [[seen.captions[i]] if captions is None else source.captions[seen.names[i]] for i in known]
    texts = embed_texts(opened.teacher, opened.texts, [text for of_one in written for text in of_one])
    both = {who: retrieval_at_1(v[known], texts, written) for who, v in seen.vectors.items()}
    found = {
        name: {who: value[i] for who, value in both.items()}
        for i, name in enumerate(("text_to_image", "image_to_text"))
    }
    print(f"retrieval R@1 among {len(written)} pictures and {len(texts)} captions")
    print(table(("direction", "semantic codes", "continuous teacher"), [(n, *v.values()) for n, v in found.items()]))
    result = {"model": model, "data": data, "images": len(written), "captions": len(texts), **found}
    result["without_caption"] = len(seen.captions) - len(known)  # left out
    if result["without_caption"]:
        print(f"  {result['without_caption']} pictures without a caption were left out")
    score = (
        "cosine among all; an image is right with any of its captions; images whose captions are all equal count as one"
    )
    result |= {"scale": scale_of(opened.tokenizer)}
    result |= {"protocol": _protocol(size, len(written), score=score), "skipped": skipped}
    write_json(output, result)
    return result


def _protocol(size: int, images: int, **more: Any) -> dict[str, Any]:
    """How it was measured, said below the numbers and beside them in the file."""
    found = {"size": size, "images": images, "resize": FIT, **more}
    print("\n".join(f"  {name}: {text}" for name, text in found.items()))
    return found


def _encoder(model: str, encoder: str | None) -> str:
    """The image-text encoder that is named, or that comes with a preset. Raises UserError without either."""
    if encoder is None and model not in BUNDLED:
        raise UserError(f"--encoder is needed with --model {model}: the image-text encoder it started from")
    return encoder or model


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
