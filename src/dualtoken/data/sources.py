"""Real datasets as chats in shards: image-text pairs, conversations, edits, documents, plain text.

A shard is read from front to back, in the same order every time; what cannot be used of it is named and passed over.
Chats carry their pictures as bytes of the wanted size, made when the chat is reached.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from braceexpand import braceexpand  # of webdataset

from dualtoken.core.errors import UserError
from dualtoken.core.images import list_images
from dualtoken.data.chat import ChatSample
from dualtoken.data.code_shards import CodeShards
from dualtoken.data.record_files import (
    READERS,
    Entry,
    Skipped,
    hub_records,
    kind_of,
    open_hub,
    table_columns,
)
from dualtoken.data.records import (
    FIELDS,
    Converter,
    PictureReader,
    SourceConfig,
    candidates,
    captioned,
    conversation,
    document,
    edit,
    plain_text,
    rounds,
)

OPTION = "--data.sources"
HUB, CODES = "hub:", "codes"
TASKS = ("caption", "text_to_image")
PICTURES = 1000  # of a folder, in a shard
WILD = "*?[{"  # what makes a path a pattern


class ShardedSource(Protocol):
    """Chats in shards that are read from front to back."""

    shards: list[str]

    def read(self, shard: str) -> Iterator[ChatSample | Skipped]: ...


@dataclass(frozen=True)
class Format:
    """How the records of a dataset become chats.

    Args: convert; ends: of the files that a folder is searched for; needs: fields each record must have;
        may: fields it may have.
    """

    convert: Converter
    ends: tuple[str, ...]
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()


TABLE, JSON = (".parquet",), (".json", ".jsonl", ".json.gz", ".jsonl.gz")
FORMATS = {
    "webdataset": Format(captioned, (".tar", ".tar.gz", ".tgz"), ("image", "text")),
    "folder": Format(captioned, JSON, ("image", "text")),
    "parquet": Format(captioned, TABLE, ("image", "text")),
    "llava": Format(conversation, JSON, ("turns",), ("image", "images")),
    "cauldron": Format(rounds, TABLE, ("texts",), ("images",)),
    "edit": Format(edit, TABLE, ("before", "instruction", "after")),
    "obelics": Format(document, TABLE, ("images", "texts")),
    "text": Format(plain_text, (*JSON, *TABLE, ".txt"), (), ("text", "turns", "image", "images")),
}


class Files:
    """Files of records, each of them a shard, or dealt into `config.parts` of them.

    Raises UserError where there is no file, one of an unknown kind, or a table without the columns that are needed.
    """

    def __init__(self, config: SourceConfig, size: int):
        self.config, self.format = config, FORMATS[config.format]
        self.root, files = _find(config.path, self.format.ends)
        for file in files:
            if kind_of(file) is None:
                raise UserError(f"{OPTION} {file}: cannot read it; files end with {', '.join(READERS)}")
        fields = (*self.format.needs, *self.format.may)
        self._wanted = {entry for name in fields for entry in candidates(name, config)}
        self._check_columns(files[0])
        parts = max(1, config.parts)
        self._places = {_part(file, k, parts): (file, k, parts) for file in files for k in range(parts)}
        self.shards = list(self._places)
        folders = dict.fromkeys(config.images or str(Path(file).parent) for file in files)
        self._pictures = {folder: PictureReader(size, folder, config.name or folder) for folder in folders}

    def read(self, shard: str) -> Iterator[ChatSample | Skipped]:
        """Chats of a shard in order. Raises UserError for a shard that is not one of `shards`."""
        folder = self.config.images or str(Path(_place(self._places, shard)[0]).parent)
        yield from _chats(self._records(shard), self.format.convert, self._pictures[folder], self.config)

    def _records(self, shard: str) -> Iterator[Entry]:
        """Every parts-th record of a file, called by source, file and key."""
        file, part, parts = _place(self._places, shard)
        label = file
        if self.config.name:
            label = f"{self.config.name}/{Path(file).relative_to(self.root).as_posix()}"
        for number, entry in enumerate(READERS[kind_of(file)](file, self._wanted)):
            if number % parts == part:
                yield entry if isinstance(entry, Skipped) else (f"{label}/{entry[0]}", entry[1])

    def _check_columns(self, file: str) -> None:
        found = table_columns(file) if kind_of(file) == ".parquet" else []
        for name in self.format.needs if found else ():
            tried = candidates(name, self.config)
            if not set(tried) & set(found):
                raise UserError(
                    f"{OPTION} {file}: no column for {name} (looked for {', '.join(tried)}); it has "
                    f"{', '.join(found)}: name one with columns.{name}"
                )


class Folder:
    """Pictures below a folder: `x.txt` beside `x.jpg` is its caption, else the first subfolder its class.

    Shards take every n-th picture, so that each has all classes.
    """

    def __init__(self, config: SourceConfig, size: int):
        self.config, self.root = config, Path(config.path)
        self.files = list_images(self.root, OPTION)
        parts = config.parts or -(-len(self.files) // PICTURES)
        self._places = {_part(config.path, k, parts): (k, parts) for k in range(parts)}
        self.shards = list(self._places)
        self._classes = _class_names(config.classes) if config.classes else {}
        self._label = config.name or config.path.rstrip("/")
        self._pictures = PictureReader(size, config.path, self._label)

    def read(self, shard: str) -> Iterator[ChatSample | Skipped]:
        """Chats of a shard in order. Raises UserError for a shard that is not one of `shards`."""
        part, parts = _place(self._places, shard)
        yield from _chats(map(self._record, self.files[part::parts]), captioned, self._pictures, self.config)

    def _record(self, file: Path) -> Entry:
        path = file.relative_to(self.root)
        record = {"image": path.as_posix()}
        beside = file.with_suffix(".txt")
        if beside.is_file():
            record["text"] = beside.read_text(encoding="utf-8", errors="replace")
        elif len(path.parts) > 1:
            record["class"] = self._classes.get(path.parts[0], path.parts[0].replace("_", " "))
        return f"{self._label}/{path.as_posix()}", record


class Hub:
    """A dataset of the Hugging Face hub, streamed; its data files are the shards."""

    def __init__(self, config: SourceConfig, size: int):
        self.config, self.format = config, FORMATS[config.format]
        self._dataset = open_hub(config.path.removeprefix(HUB), config.subset, config.split, OPTION)
        count = self._dataset.num_shards
        begin = "/".join(part for part in (config.path, config.subset, config.split) if part)
        self._places = {_part(begin, k, count): k for k in range(count)}
        self.shards = list(self._places)
        self._begin = begin
        self._pictures = PictureReader(size, config.images or ".", config.name or config.images or config.path)

    def read(self, shard: str) -> Iterator[ChatSample | Skipped]:
        """Chats of a shard in order. Raises UserError for a shard that is not one of `shards`."""
        yield from _chats(self._records(shard), self.format.convert, self._pictures, self.config)

    def _records(self, shard: str) -> Iterator[Entry]:
        number = _place(self._places, shard)
        label = f"{self.config.name or self._begin}/{number:05d}"
        for entry in hub_records(self._dataset, number, shard):
            yield entry if isinstance(entry, Skipped) else (f"{label}/{entry[0]}", entry[1])


def open_source(config: SourceConfig, size: int, tokenizer: str | None = None) -> ShardedSource:
    """The chats of one line of a recipe, with pictures of side `size`.

    Args: tokenizer: fingerprint that stored codes must be of; None = any.
    Raises UserError, naming `--data.sources`, for an unknown format or option, and where there is no file.
    """
    codes = config.format == CODES  # shards that `dualtoken encode` wrote
    if config.format not in FORMATS and not codes:
        raise UserError(f"{OPTION}: unknown format {config.format!r}; the formats are {', '.join([*FORMATS, CODES])}")
    if config.task not in TASKS:
        raise UserError(f"{OPTION} {config.path}: unknown task {config.task!r}; the tasks are {', '.join(TASKS)}")
    if unknown := [name for name in config.columns if name not in FIELDS]:
        raise UserError(f"{OPTION} {config.path}: unknown columns {', '.join(unknown)}; give {', '.join(FIELDS)}")
    drawn = config.task == "text_to_image" and (codes or FORMATS[config.format].convert is captioned)
    bad = [prompt for prompt in config.prompts if "{}" not in prompt]
    if drawn and bad:
        raise UserError(f"{OPTION} {config.path}: prompt {bad[0]!r} has no {{}} where the caption goes")
    if codes:
        return CodeShards(config.path, config.task, config.prompts, tokenizer, OPTION)
    if not config.captions:
        raise UserError(f"{OPTION} {config.path}: captions are empty; give at least one, or leave them out")
    if config.characters < 1 or min(config.parts, config.pictures) < 0:
        raise UserError(f"{OPTION} {config.path}: characters must be above 0, parts and pictures not below")
    if config.images and not Path(config.images).is_dir():
        raise UserError(f"{OPTION} {config.path}: no folder {config.images}, where its pictures should be (images)")
    if config.path.startswith(HUB):
        return Hub(config, size)
    if config.format == "folder" and Path(config.path).is_dir():
        listed = Path(config.path) / "metadata.jsonl"
        if not listed.is_file():
            if deeper := next(Path(config.path).glob(f"[!.]*/{listed.name}"), None):
                raise UserError(f"{OPTION} {config.path}: {deeper} tells of pictures; give {deeper.parent} as path")
            return Folder(config, size)
        config = replace(config, path=str(listed))
    return Files(config, size)


def _chats(
    entries: Iterator[Entry], convert: Converter, pictures: PictureReader, config: SourceConfig
) -> Iterator[ChatSample | Skipped]:
    for entry in entries:
        if isinstance(entry, Skipped):
            yield entry
            continue
        name, record = entry
        try:
            yield from convert(record, name, pictures, config)
        except UserError as error:
            yield Skipped(str(error))


def _find(path: str, ends: tuple[str, ...]) -> tuple[str, list[str]]:
    """The folder that a path or pattern begins with, and the files it stands for, sorted."""
    if Path(path).is_dir():
        found = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and kind_of(p.name) in ends)
        if not found:
            raise UserError(f"{OPTION} {path}: no file in it that ends with {', '.join(ends)}")
        return path, found
    fixed = path[: min((path.index(c) for c in WILD if c in path), default=len(path))]
    files: list[str] = []
    try:
        expanded = list(braceexpand(path))
    except ValueError as error:
        raise UserError(f"{OPTION} {path}: {error}") from None
    for one in expanded:
        matches = sorted(glob.glob(one, recursive=True)) if any(c in one for c in "*?[") else [one]
        missing = [match for match in matches or [one] if not Path(match).is_file()]
        if missing:
            raise UserError(f"{OPTION} {path}: no file {missing[0]}")
        files += matches
    return fixed[: fixed.rfind("/") + 1] or ".", list(dict.fromkeys(files))


def _class_names(path: str) -> dict[str, str]:
    """Lines "FOLDER name, other names" -> name by folder."""
    if not Path(path).is_file():
        raise UserError(f'{OPTION}: no file {path}; classes should be lines "n01440764 tench, Tinca tinca"')
    lines = (line.split(maxsplit=1) for line in Path(path).read_text(encoding="utf-8").splitlines())
    return {pair[0]: pair[1].split(",")[0].strip() for pair in lines if len(pair) == 2}


def _part(name: str, part: int, parts: int) -> str:
    return name if parts == 1 else f"{name}#{part:05d}-of-{parts:05d}"


def _place(places: dict[str, Any], shard: str) -> Any:
    if shard not in places:
        raise UserError(f"{OPTION}: no shard {shard}; there are {len(places)}, from {next(iter(places))}")
    return places[shard]
