"""What the semantic codes still know: zero-shot classification and retrieval (paper Table 1, left half).

Every number stands beside that of the continuous, unquantised teacher on the same pictures.

Shapes: B batch, C width, L classes.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from dualtoken.core.images import to_float
from dualtoken.tokenizer.encoder import ImageTextEncoder, tokenize
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer

Embed = Callable[[Tensor], Tensor]  # images [B, 3, H, W] -> unit vectors [B, C]

TEMPLATES = ("a {}",)


def quantized_embed(tokenizer: DualTokenVisionTokenizer) -> Embed:
    """Images -> unit vectors, through the semantic codes."""

    def embed(images: Tensor) -> Tensor:
        codes = tokenizer.encode(images)
        return F.normalize(tokenizer.pool(tokenizer.semantic.lookup(codes.semantic)), dim=-1)

    return embed


@torch.no_grad()
def embed_all(embed: Embed, device: torch.device, batches: Iterable[Tensor]) -> Tensor:
    """Unit vectors of uint8 batches [B, 3, S, S], joined to [M, C], on the CPU."""
    return torch.cat([embed(to_float(pixels.to(device))).cpu() for pixels in batches])


@torch.no_grad()
def embed_texts(encoder: ImageTextEncoder, text_tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Unit vectors of texts, [len(texts), C], on the CPU."""
    parts = [texts[first : first + 256] for first in range(0, len(texts), 256)]
    return torch.cat([encoder.embed_text(tokenize(text_tokenizer, p).to(encoder.device)).cpu() for p in parts])


def class_vectors(
    encoder: ImageTextEncoder,
    text_tokenizer: PreTrainedTokenizerFast,
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> Tensor:
    """Unit vectors [L, C] of class names, averaged over prompt templates with a place "{}"."""
    vectors = [embed_texts(encoder, text_tokenizer, [t.format(n) for n in names]) for t in templates]
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


def retrieval(images: Tensor, texts: Tensor, captions: Sequence[str]) -> tuple[float, float]:
    """R@1 of text to image and of image to text; unit vectors [M, C], pair i belongs together.

    A picture whose caption is equal to the wanted one counts as right.
    """
    numbers = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    same = torch.tensor([numbers[text] for text in captions])
    scores = texts @ images.t()
    text_to_image = (same[scores.argmax(1)] == same).float().mean()
    image_to_text = (same[scores.argmax(0)] == same).float().mean()
    return float(text_to_image), float(image_to_text)
