"""What an image source gives: one sample, whatever it was read or drawn from."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Sample:
    """One picture with its caption."""

    image: Tensor  # uint8 [3, S, S], RGB
    caption: str
    label: int  # index into the source's `classes`, -1 where unknown
    name: str
