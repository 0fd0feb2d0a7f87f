"""Records of real datasets to chats: a function for each kind of dataset.

A record is what one row, line or group of files holds, by name; `FIELDS` says which entry means what. Words of a
dataset are passed on as they are: text that looks like a special token is the processor's to handle.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dualtoken.core.errors import UserError
from dualtoken.core.images import ImageError, fit_image, image_bytes, read_image
from dualtoken.data.chat import ChatSample, Message, Picture
from dualtoken.data.record_files import Record, Skipped, downloads

# What a converter asks for -> entries of a record that may hold it, the first found is taken.
FIELDS: dict[str, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp", "image", "img", "image_path", "img_path", "file_name"),
    "text": ("txt", "text", "caption", "prompt"),
    "class": ("class",),
    "images": ("images",),
    "texts": ("texts",),
    "turns": ("conversations", "messages"),
    "before": ("original_image", "src_img", "source_img"),
    "instruction": ("edit_prompt", "edited_prompt_list", "instruction"),
    "after": ("edited_image", "edited_img", "target_img"),
}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARK = re.compile(r"\n*(<image>|<\|image\|>)\n*")  # where a picture stands in a turn: LLaVA's way, DocOwl's way
ASKED = ["describe the picture"]


@dataclass
class SourceConfig:
    """One dataset of `--data.sources`, and how its records become chats (docs/data.md).

    Args:
        format: webdataset, folder, parquet, llava, cauldron, edit, obelics, text, or codes (shards of `encode`).
        path: a file, a folder, braces "cc12m/{0000..1242}.tar", a glob "cc12m/*.tar", or "hub:OWNER/NAME".
        weight: how often the mixture takes a chat from here, against the weights of the other sources.
        name: what pictures are called by where their codes are stored; "" = the path.
        task: of captioned pictures: "caption", they are looked at, or "text_to_image", they are drawn.
        prompts: what the user says, one of them for each chat: how a caption is asked for; "draw {}" around the words
            of a drawing; what a document or a text replies to. [] = the format's own.
        captions: of class folders, what is said of a picture.
        columns: image, text, images, texts, turns, before, instruction, after -> the dataset's own name for it.
        images: where paths of pictures begin, or the folder that img2dataset made of addresses; "" = beside the file.
        classes: of class folders, a file of lines "FOLDER name, other names"; "" = the folder is the name.
        pictures: of a document, at most so many; it ends before the next one. 0 = all.
        characters: longer plain texts are cut into pieces.
        parts: shards a file is dealt into; 0 = one a file, in a folder of pictures one for every 1000.
        subset: of a dataset of the hub; split: of it.
    """

    format: str
    path: str
    weight: float = 1.0
    name: str = ""
    task: str = "caption"
    prompts: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=lambda: ["a photo of a {}"])
    columns: dict[str, str] = field(default_factory=dict)
    images: str = ""
    classes: str = ""
    pictures: int = 0
    characters: int = 4000
    parts: int = 0
    subset: str = ""
    split: str = "train"


class PictureReader:
    """Bytes, a path or a Hugging Face image {"bytes", "path"} -> a picture of side `size`.

    A picture of a file is called `label`/path, so that it is one picture however many chats show it.
    """

    def __init__(self, size: int, folder: str, label: str):
        self.size, self.folder, self.label = size, Path(folder), label

    @cached_property
    def _downloads(self) -> dict[str, str]:
        return downloads(self.folder)

    def __call__(self, value: Any, name: str) -> Picture:
        """Raises ImageError, beginning with the picture's name, where it cannot be read."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and "://" in value:
            if value not in self._downloads:
                raise ImageError(f"{name}: not fetched ({value}); give `images` the folder img2dataset made of it")
            value = self._downloads[value]
        if isinstance(value, str):
            name, value = f"{self.label}/{value}", self.folder / value
        if not isinstance(value, (bytes, Path)) or not value:
            raise ImageError(f"{name}: no picture in it")
        return Picture(name, image=image_bytes(fit_image(read_image(value, name), self.size)))


Converter = Callable[[Record, str, PictureReader, SourceConfig], Iterator[ChatSample | Skipped]]


def captioned(record: Record, name: str, read: PictureReader, config: SourceConfig) -> Iterator[ChatSample]:
    """A picture and words about it: to be described or to be drawn, as `config.task` says."""
    kind = _optional(record, "class", config)
    if kind is not None and _optional(record, "text", config) is None:
        text = _pick(config.captions, name).replace("{}", str(kind))
    else:
        text = _words(_required(record, "text", config, name), name)
    picture = read(_required(record, "image", config, name), name)
    if config.task == "caption":
        asked: tuple[str | Picture, ...] = (picture, _pick(config.prompts or ASKED, name))
        said: tuple[str | Picture, ...] = (text,)
    else:
        asked, said = (_pick(config.prompts or ["{}"], name).replace("{}", text),), (picture,)
    yield ChatSample((Message("user", asked), Message("assistant", said)), config.task, name)


def conversation(record: Record, name: str, read: PictureReader, config: SourceConfig) -> Iterator[ChatSample]:
    """Turns of LLaVA ("from", "value") or of a chat ("role", "content"), pictures where `<image>` stands."""
    images = _optional(record, "images", config)
    images = _optional(record, "image", config) if images is None else images
    yield _chat(_list(_required(record, "turns", config, name), "turns", name), images, name, read)


def rounds(record: Record, name: str, read: PictureReader, config: SourceConfig) -> Iterator[ChatSample]:
    """Cauldron: rounds of "user" and "assistant" about all pictures, which come first."""
    turns = []
    for one in _list(_required(record, "texts", config, name), "texts", name):
        one = one if isinstance(one, dict) else {}
        turns += [{"role": role, "content": one.get(role)} for role in ("user", "assistant")]
    yield _chat(turns, _optional(record, "images", config), name, read)


def edit(record: Record, name: str, read: PictureReader, config: SourceConfig) -> Iterator[ChatSample]:
    """A picture, what to do with it, and what came of it. Words first, as in `scene_chat`."""
    words = _words(_required(record, "instruction", config, name), name)
    before = read(_required(record, "before", config, name), f"{name}/before")
    after = replace(read(_required(record, "after", config, name), f"{name}/after"), edited=before)
    yield ChatSample((Message("user", (words, before)), Message("assistant", (after,))), "edit", name)


def document(record: Record, name: str, read: PictureReader, config: SourceConfig) -> Iterator[ChatSample | Skipped]:
    """OBELICS: texts and pictures in turn, all told by the assistant. Pictures that cannot be read are left out."""
    images, texts = (_list(_required(record, key, config, name), key, name) for key in ("images", "texts"))
    if len(images) != len(texts):
        raise UserError(f"{name}: {len(images)} images but {len(texts)} texts: they should come in turn")
    told: list[str | Picture] = []
    shown = 0
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        if image is not None and shown == config.pictures > 0:
            break
        if isinstance(text, str) and text.strip():
            if told and isinstance(told[-1], str):  # the picture between them was left out
                text = f"{told.pop()}\n\n{text}"
            told.append(text)
        if image is not None:
            try:
                told.append(read(image, f"{name}/{place}"))
                shown += 1
            except ImageError as error:
                yield Skipped(str(error))
    if not shown:
        raise UserError(f"{name}: none of its pictures can be used")
    yield _told(tuple(told), "interleaved", name, config)


def plain_text(record: Record, name: str, read: PictureReader, config: SourceConfig) -> Iterator[ChatSample]:
    """Words alone: a chat, or a text that the assistant tells, in pieces of at most `config.characters`."""
    if _optional(record, "turns", config) is not None:
        yield from conversation(record, name, read, config)
        return
    pieces = _pieces(_words(_required(record, "text", config, name), name), config.characters)
    for number, piece in enumerate(pieces):
        yield _told((piece,), "text", name if number == 0 else f"{name}/{number}", config)


def _told(parts: tuple[str | Picture, ...], task: str, name: str, config: SourceConfig) -> ChatSample:
    """What the assistant tells, in reply to a prompt where the recipe has some."""
    asked = (Message("user", (_pick(config.prompts, name),)),) if config.prompts else ()
    return ChatSample((*asked, Message("assistant", parts)), task, name)


def _chat(turns: list[Any], images: Any, name: str, read: PictureReader) -> ChatSample:
    """Turns with as many pictures as there are; those that no mark stands for open the user's first turn."""
    listed = images if isinstance(images, list) else [images]
    pictures = [read(image, f"{name}/{i}") for i, image in enumerate(x for x in listed if x not in (None, ""))]
    said = [_turn(turn, name) for turn in turns]
    while said and said[-1][0] != "assistant":  # nothing would be learnt of it
        said.pop()
    if not said:
        raise UserError(f"{name}: the assistant says nothing")
    marks = sum(len(MARK.findall(text)) for _, text in said) if pictures else 0
    if marks > len(pictures):
        raise UserError(f"{name}: the text has places for {marks} pictures, there are {len(pictures)}")
    waiting = list(pictures)
    messages = []
    for role, text in said:
        content: list[str | Picture] = []
        if role == "user" and not any(m.role == "user" for m in messages):
            content, waiting = list(waiting[: len(pictures) - marks]), waiting[len(pictures) - marks :]
        for place, piece in enumerate(MARK.split(text) if pictures else [text]):
            if place % 2:
                content.append(waiting.pop(0))
            elif piece:
                content.append(piece)
        messages.append(Message(role, tuple(content)))
    sample = ChatSample(tuple(messages), "vqa" if pictures else "text", name)
    if len(sample.pictures) != len(pictures):
        raise UserError(f"{name}: {len(pictures)} pictures but no turn of the user to show them in")
    return sample


def _turn(turn: Any, name: str) -> tuple[Any, str]:
    """(role, text) of one turn; content in parts, as transformers writes it, becomes text with marks."""
    turn = turn if isinstance(turn, dict) else {}
    role, text = (turn.get(new, turn.get(old)) for new, old in (("role", "from"), ("content", "value")))
    if isinstance(text, list):
        parts = [part if isinstance(part, dict) else {} for part in text]
        text = "".join("<image>" if part.get("type") == "image" else str(part.get("text") or "") for part in parts)
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str) or not text.strip():
        raise UserError(f"{name}: a turn needs one of {', '.join(ROLES)}, and words ({role!r}: {str(text)[:80]!r})")
    return ROLES[role], text


def candidates(name: str, config: SourceConfig) -> tuple[str, ...]:
    """Entries of a record that may hold the field `name`."""
    return (config.columns[name],) if name in config.columns else FIELDS[name]


def _optional(record: Record, name: str, config: SourceConfig) -> Any:
    return next((record[key] for key in candidates(name, config) if record.get(key) is not None), None)


def _required(record: Record, name: str, config: SourceConfig, of: str) -> Any:
    found = _optional(record, name, config)
    if found is None:
        tried = ", ".join(candidates(name, config))
        raise UserError(f"{of}: no {name} (looked for {tried}); it has {', '.join(record) or 'nothing'}")
    return found


def _list(value: Any, what: str, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{name}: {what} is no list but a {type(value).__name__}")
    return value


def _words(value: Any, name: str) -> str:
    """A text; of several, one, chosen by the record's name."""
    several = [one for one in value if isinstance(one, str) and one.strip()] if isinstance(value, list) else [value]
    text = _pick(several, name) if several else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{name}: no words in its text")
    return text.strip()


def _pick(options: list[Any], name: str) -> Any:
    """One of some, the same for a name at any time."""
    return options[zlib.crc32(name.encode()) % len(options)]


def _pieces(text: str, most: int) -> Iterator[str]:
    """A text cut behind lines, else behind words, so that no piece is longer than `most` characters."""
    start = 0
    while start < len(text):
        end = start + most
        if end < len(text):
            ends = (text.rfind(mark, start + most // 2, end) + 1 for mark in ("\n", " "))
            end = next((e for e in ends if e > 0), end)
        if piece := text[start:end].strip():
            yield piece
        start = end
