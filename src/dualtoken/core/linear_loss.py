"""Cross-entropy of a large linear classifier whose logits are never whole in memory.

At 3B a step of stage 4 has some ten thousand rows before eight classifiers of 16384 and one of 151936 classes: whole
logits, their softmax and its gradient would take tens of GB. Here they are made a few rows at a time and made again
going back (one product in four is done twice). `torch.nn.functional.linear_cross_entropy` with options does without
the second time, but rounds the sum to 16 bits under autocast, needs bare weights (adapters and 4-bit layers have
none), and is not in all versions of torch that we take.

Shapes: M rows, W width, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SMALL = 2**22  # logits that are kept for the way back: so few take less room than making them again takes time
CHUNK = 2**26  # logits held at once, 256 MiB in float32


def classification_loss(
    classify: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    classes: int,
    small: int = SMALL,
    chunk: int = CHUNK,
) -> Tensor:
    """Cross-entropy summed over rows: classify(x [M, W]) -> logits [M, K], target int64 [M] -> scalar, float32.

    Args: classify: any module or function, row by row; classes: K.
    """
    if len(x) * classes <= small:
        return _loss(classify, x, target)
    rows = max(1, chunk // classes)
    parts = [
        checkpoint(_loss, classify, some, wanted, use_reentrant=False)
        for some, wanted in zip(x.split(rows), target.split(rows), strict=True)
    ]
    return torch.stack(parts).sum()


def _loss(classify: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(classify(x).float(), target, reduction="sum")
