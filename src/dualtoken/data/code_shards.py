"""Shards of codes: webdataset tars that hold codes in place of pictures, 4 KiB a picture at D = 4 and 256 positions.

    __codes__      JSON: the shapes, the codebooks' sizes and the tokenizer (webdataset's readers pass it over)
    000017.txt     what was beside the picture: .txt, .json, .cls
    000017.codes   uint16, little-endian: pixel [N, D], then semantic [N', D']

A sample's codes come last, so that one with codes is whole, also where the shard is cut off.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.files import whole_or_not_at_all
from dualtoken.data.chat import ChatSample, Message, Picture
from dualtoken.data.scene_chat import DESCRIBE
from dualtoken.data.tar_shards import Skipped, TarSample, add_file, find_shards, index_tar

HEADER, NAME = "__codes__", "dualtoken-code-shard-1"
CARRIED = ("txt", "json", "cls")  # what is taken along from beside a picture
PROMPTS = {"caption": DESCRIBE, "text_to_image": "{}"}  # by task, where none is given
TEXT_KEYS = ("caption", "text")  # where a .json has the text


@dataclass(frozen=True)
class CodeFormat:
    """What the codes of a shard are.

    Args:
        pixel, semantic: positions and depths of a picture.
        codebooks: sizes of both; more than 65536 rows raise UserError.
        tokenizer: fingerprint of the tokenizer that made them.
    """

    pixel: tuple[int, int]
    semantic: tuple[int, int]
    codebooks: tuple[int, int]
    tokenizer: str

    def __post_init__(self):
        if max(self.codebooks) > 65536:
            raise UserError(f"a codebook of {max(self.codebooks)} rows; 16 bits hold codebooks of up to 65536 rows")

    @property
    def size(self) -> int:
        """Bytes of a picture's codes."""
        return 2 * (self.pixel[0] * self.pixel[1] + self.semantic[0] * self.semantic[1])

    def pack(self, codes: DualCodes) -> list[bytes]:
        """The content of `.codes` of each picture."""
        joined = torch.cat([codes.pixel.flatten(1), codes.semantic.flatten(1)], 1)
        return [row.tobytes() for row in joined.cpu().numpy().astype("<u2")]

    def unpack(self, content: bytes) -> DualCodes:
        """Codes of one picture. Raises ValueError where they are of another length or outside the codebook."""
        if len(content) != self.size:
            raise ValueError(f"{len(content)} bytes of codes, {self.size} expected")
        flat = torch.from_numpy(np.frombuffer(content, "<u2").astype(np.int64))
        pixel, semantic = flat.split([self.pixel[0] * self.pixel[1], self.semantic[0] * self.semantic[1]])
        for part, rows in zip((pixel, semantic), self.codebooks, strict=True):
            if int(part.max()) >= rows:
                raise ValueError(f"codes reach {int(part.max())}, the codebook has {rows} rows")
        return DualCodes(pixel.view(1, *self.pixel), semantic.view(1, *self.semantic))


class CodeShardWriter(AbstractContextManager):
    """A shard of codes being written: `with CodeShardWriter(path, format) as shard: shard.add(...)`.

    Its place holds the whole shard, or what it held before. The same samples give the same bytes.
    """

    def __init__(self, path: Path, format: CodeFormat):
        self.path, self.format, self._open = path, format, ExitStack()

    def __enter__(self) -> "CodeShardWriter":
        draft = self._open.enter_context(whole_or_not_at_all(self.path))
        self._tar = self._open.enter_context(tarfile.open(draft, "w"))
        add_file(self._tar, HEADER, json.dumps({"format": NAME, **asdict(self.format)}).encode())
        return self

    def add(self, key: str, codes: bytes, beside: dict[str, bytes]) -> None:
        """A picture: its packed codes, and files that were beside it, by suffix."""
        for suffix, content in beside.items():
            add_file(self._tar, f"{key}.{suffix}", content)
        add_file(self._tar, f"{key}.codes", codes)

    def __exit__(self, *error) -> bool | None:
        return self._open.__exit__(*error)


@dataclass(frozen=True)
class CodeSample:
    """The codes of one picture and what was beside it."""

    key: str
    codes: DualCodes  # of one picture
    text: str = ""  # of .txt, else of "caption" or "text" in .json
    details: dict[str, Any] = field(default_factory=dict)  # of .json


class DamagedShard(UserError):
    """A shard that is cut off before it says what is in it."""


class CodeShard:
    """A shard of codes, opened by its headers; read with `for sample in shard`.

    Raises UserError for a file that is missing or no shard of codes.
    """

    def __init__(self, path: str | Path, option: str = "SHARD"):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{option} {path}: no such file")
        self.index = index_tar(path)
        if HEADER not in self.index.bare and self.index.damage:
            raise DamagedShard(f"{path}: {self.index.damage}")
        if HEADER not in self.index.bare:
            raise UserError(f"{option} {path}: no shard of codes; write one with `dualtoken encode`")
        with open(path, "rb") as shard:
            header = json.loads(self.index.bare[HEADER].read(shard))
        if header.pop("format", None) != NAME:
            raise UserError(f"{option} {path}: a shard of codes of another version, {NAME} is read here")
        self.format = CodeFormat(**{k: tuple(v) if isinstance(v, list) else v for k, v in header.items()})

    def __len__(self) -> int:
        """Pictures in it."""
        return sum("codes" in sample.parts for sample in self.index.samples)

    def __iter__(self) -> Iterator[CodeSample | Skipped]:
        """Pictures in order, with what cannot be used in its place, and at the end that the shard is cut off."""
        with open(self.path, "rb") as shard:
            for sample in self.index.samples:
                try:
                    yield self._sample(sample, shard)
                except (KeyError, ValueError) as error:
                    reason = "no codes" if isinstance(error, KeyError) else str(error)
                    yield Skipped(f"{self.path}:{sample.key}: {reason}")
        if self.index.damage:
            yield Skipped(f"{self.path}: {self.index.damage}")

    def _sample(self, sample: TarSample, shard) -> CodeSample:
        codes = self.format.unpack(sample.parts["codes"].read(shard))
        details = json.loads(sample.parts["json"].read(shard)) if "json" in sample.parts else {}
        details = details if isinstance(details, dict) else {"json": details}
        if "txt" in sample.parts:
            text = sample.parts["txt"].read(shard).decode(errors="replace")
        else:
            text = next((details[k] for k in TEXT_KEYS if isinstance(details.get(k), str)), "")
        return CodeSample(sample.key, codes, text.strip(), details)

    def check_tokenizer(self, fingerprint: str, option: str = "--model") -> None:
        """Raise UserError where the codes are of another tokenizer than `option`'s."""
        if self.format.tokenizer != fingerprint:
            raise UserError(
                f"{self.path}: codes of tokenizer {self.format.tokenizer}, {option} is tokenizer {fingerprint}; "
                f"give the tokenizer that made them with {option}"
            )


class CodeShards:
    """Shards of codes as a source of chats: the picture is drawn from its text, or its text said of the picture.

    Args:
        pattern: a folder, or a pattern such as "codes/{000..099}.tar".
        task: "caption" (the assistant says the text) or "text_to_image" (the assistant draws it).
        prompts: what the user says, one of them for each chat: what asks for a caption, or "draw {}" around the text.
        tokenizer: fingerprint that the codes must be of; None = any.
    """

    def __init__(
        self,
        pattern: str,
        task: str = "caption",
        prompts: Sequence[str] = (),
        tokenizer: str | None = None,
        option: str = "--data.sources",
    ):
        if task not in PROMPTS:
            raise UserError(f"{option} {pattern}: unknown task {task!r}; the tasks are {', '.join(PROMPTS)}")
        self.shards = [str(path) for path in find_shards(pattern, option).values()]
        if not self.shards:
            raise UserError(f"{option} {pattern}: no tar of codes")
        self.task, self.prompts = task, list(prompts) or [PROMPTS[task]]
        self.tokenizer, self.option = tokenizer, option

    def read(self, shard: str) -> Iterator[ChatSample | Skipped]:
        """Chats of a shard in its order. Raises UserError where its codes are of another tokenizer."""
        try:
            opened = CodeShard(shard, self.option)
        except DamagedShard as error:
            yield Skipped(str(error))
            return
        if self.tokenizer is not None:
            opened.check_tokenizer(self.tokenizer, "--vision_tokenizer")
        for sample in opened:
            if isinstance(sample, Skipped):
                yield sample
            elif not sample.text:
                yield Skipped(f"{shard}:{sample.key}: no text")
            else:
                name = f"{shard}:{sample.key}"
                yield ChatSample(self._messages(Picture(name, codes=sample.codes), sample.text), self.task, name)

    def _messages(self, picture: Picture, text: str) -> tuple[Message, ...]:
        prompt = self.prompts[zlib.crc32(picture.name.encode()) % len(self.prompts)]
        if self.task == "caption":
            return Message("user", (picture, prompt)), Message("assistant", (text,))
        return Message("user", (prompt.replace("{}", text),)), Message("assistant", (picture,))


def open_code_shards(pattern: str, option: str = "--data.sources") -> Iterator[tuple[Picture, str]]:
    """Pictures with their codes, and their texts ("" where there is none), of all shards in order.

    What cannot be read is passed over. Raises UserError for a missing shard, or a tar without codes.
    """
    shards = CodeShards(pattern, option=option).shards
    for path in shards:
        for sample in CodeShard(path, option):
            if isinstance(sample, CodeSample):
                yield Picture(f"{path}:{sample.key}", codes=sample.codes), sample.text
