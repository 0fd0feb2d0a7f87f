"""What the semantic codes still know: zero-shot classification and retrieval (paper Table 1, left half).

Every number stands beside that of the continuous, unquantised teacher on the same pictures.

Shapes: B batch, C width, L classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dualtoken.core.codes import DualCodes
from dualtoken.eval.prompts import TEMPLATES, Template
from dualtoken.tokenizer.encoder import ImageTextEncoder, TextTokenizer, tokenize
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer

Embed = Callable[[Tensor], Tensor]  # images [B, 3, H, W] -> unit vectors [B, C]


def quantized_embed(tokenizer: DualTokenVisionTokenizer) -> Embed:
    """Images -> unit vectors, through the semantic codes."""
    return lambda images: embed_codes(tokenizer, tokenizer.encode(images))


def embed_codes(tokenizer: DualTokenVisionTokenizer, codes: DualCodes) -> Tensor:
    """Unit vectors [B, C] of pictures by their semantic codes."""
    return F.normalize(tokenizer.pool(tokenizer.semantic.lookup(codes.semantic)), dim=-1)


@torch.no_grad()
def embed_texts(encoder: ImageTextEncoder, text_tokenizer: TextTokenizer, texts: list[str]) -> Tensor:
    """Unit vectors of texts, [len(texts), C], on the CPU."""
    parts = [texts[first : first + 256] for first in range(0, len(texts), 256)]
    return torch.cat([encoder.embed_text(tokenize(text_tokenizer, p).to(encoder.device)).cpu() for p in parts])


def class_vectors(
    encoder: ImageTextEncoder,
    text_tokenizer: TextTokenizer,
    names: Sequence[str],
    templates: Sequence[Template] = TEMPLATES,
) -> Tensor:
    """Unit vectors [L, C] of class names, averaged over prompt templates."""
    filled = [[t(n) if callable(t) else t.replace("{}", n) for n in names] for t in templates]
    vectors = [embed_texts(encoder, text_tokenizer, texts) for texts in filled]
    return F.normalize(torch.stack(vectors).mean(0), dim=-1)


def accuracy(images: Tensor, classes: Tensor, labels: Tensor) -> float:
    """Share of images [M, C] whose nearest class [L, C] is their label [M]."""
    return float(((images @ classes.t()).argmax(1) == labels).float().mean())


def factor_accuracy(images: Tensor, classes: Tensor, labels: Tensor, groups: Sequence[Sequence[int]]) -> float:
    """Accuracy on one factor of joint classes: `groups[g]` are the classes that share its value number g.

    A value's score is the mean of its classes' logits; labels [M] are values.
    """
    scores = images @ classes.t()
    by_value = torch.stack([scores[:, list(group)].mean(1) for group in groups], 1)
    return float((by_value.argmax(1) == labels).float().mean())


def retrieval(images: Tensor, texts: Tensor, captions: Sequence[Sequence[str]]) -> tuple[float, float]:
    """R@1 of text to image and of image to text.

    Args: unit vectors of images [M, C] and of all their texts [T, C], image by image; captions: those texts by image.

    A text is right if its image is nearest, an image if any of its texts is. Where several images have equal captions,
    each of these images and texts is right for the others.
    """
    numbers: dict[tuple[str, ...], int] = {}
    of_image = torch.tensor([numbers.setdefault(tuple(of_one), len(numbers)) for of_one in captions])
    of_text = of_image.repeat_interleave(torch.tensor([len(of_one) for of_one in captions]))
    scores = texts @ images.t()
    text_to_image = (of_image[scores.argmax(1)] == of_text).float().mean()
    image_to_text = (of_text[scores.argmax(0)] == of_image).float().mean()
    return float(text_to_image), float(image_to_text)
