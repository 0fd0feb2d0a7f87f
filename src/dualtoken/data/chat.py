"""One sample type for every task of the multimodal LLM: chat messages made of text and pictures.

Captioning and question answering have the picture in the user's turn, text-to-image in the assistant's, editing one
in each, interleaved documents any number in any order. The loss falls on what the assistant says and draws.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError


class Drawing(Protocol):
    """Something that can be drawn at any size, such as `scenes.Scene`."""

    def render(self, resolution: int): ...


@dataclass(frozen=True)
class Picture:
    """A picture of a chat: drawn when needed, given as bytes, or stored as codes.

    `name` says which picture it is: two pictures of one name are equal, and stored codes are looked up by it.
    `edited` is the picture that it was made of by an edit: where both are equal, so are their codes.
    """

    name: str
    drawing: Drawing | None = None
    image: Tensor | None = None  # uint8 [3, S, S]
    codes: DualCodes | None = None  # of one image
    edited: "Picture | None" = None


@dataclass(frozen=True)
class Message:
    """A turn: who speaks, and text and pictures in order."""

    role: Literal["system", "user", "assistant"]
    content: tuple[str | Picture, ...]


@dataclass(frozen=True)
class ChatSample:
    """A conversation. `task` says which builder made it; `name` is unique in its source."""

    messages: tuple[Message, ...]
    task: str
    name: str

    @property
    def pictures(self) -> list[Picture]:
        """All pictures in reading order."""
        return [part for message in self.messages for part in message.content if isinstance(part, Picture)]

    @property
    def draws(self) -> bool:
        """True where the assistant draws."""
        return any(
            isinstance(part, Picture) for message in self.messages if message.role == "assistant"
            for part in message.content
        )  # fmt: skip


class StoredCodes:
    """Codes of pictures by name, in place of the pictures: 4 KiB an image at D = 4 and 256 positions."""

    def __init__(self, codes: DualCodes, names: list[str]):
        if len(codes) != len(names):
            raise UserError(f"stored codes: {len(codes)} pictures but {len(names)} names")
        self.codes = codes
        self.place = {name: i for i, name in enumerate(names)}

    def fill(self, sample: ChatSample) -> ChatSample:
        """The sample with codes in all its pictures. Raises UserError naming a picture that is not stored."""
        return replace(sample, messages=tuple(replace(m, content=tuple(map(self._fill, m.content)))
                                              for m in sample.messages))  # fmt: skip

    def _fill(self, part: str | Picture) -> str | Picture:
        if isinstance(part, str) or part.codes is not None:
            return part
        if part.name not in self.place:
            raise UserError(f"--data.codes: no codes of picture {part.name}; remove the folder to encode again")
        return replace(part, codes=self.codes[self.place[part.name]])


def by_name(samples: Iterable[ChatSample]) -> dict[str, Picture]:
    """Every picture of some samples once."""
    return {picture.name: picture for sample in samples for picture in sample.pictures}
