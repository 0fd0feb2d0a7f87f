"""Tar shards as webdataset lays them out: which there are, what is in one, and writing one.

The files of a sample stand side by side under one key: `000017.jpg`, `000017.txt`. Headers are read without the
content, so that a part can be read by its place. A shard that is cut off gives what stands before the cut.
"""

import glob
import io
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import webdataset.shardlists
import webdataset.tariterators

from dualtoken.core.errors import UserError
from dualtoken.core.images import IMAGE_SUFFIXES

BLOCK = 512  # bytes; a tar is made of these and ends with one of zeros


@dataclass(frozen=True)
class Skipped:
    """Something that could not be used: its name, a colon and why."""

    what: str


class Place(NamedTuple):
    """Where a file lies in a shard, in bytes."""

    offset: int
    size: int

    def read(self, shard: BinaryIO) -> bytes:
        """The content. Raises OSError where the shard has become shorter since its headers were read."""
        shard.seek(self.offset)
        content = shard.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{shard.name}: {len(content)} bytes at {self.offset}, {self.size} expected")
        return content


class TarSample(NamedTuple):
    """The files under one key, by suffix in lower case without its first dot."""

    key: str
    parts: dict[str, Place]

    @property
    def picture(self) -> Place | None:
        """Its first picture."""
        return next((place for suffix, place in self.parts.items() if f".{suffix}" in IMAGE_SUFFIXES), None)


@dataclass
class TarIndex:
    """What the headers of a shard say."""

    samples: list[TarSample] = field(default_factory=list)
    bare: dict[str, Place] = field(default_factory=dict)  # files without a suffix
    damage: str = ""  # why it is not whole


def index_tar(path: str | Path) -> TarIndex:
    """Read the headers of an uncompressed tar; a damaged one is said in the result. Raises OSError for no file."""
    index, grouped, length = TarIndex(), {}, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"ends inside {member.name}")
                key, suffix = webdataset.tariterators.base_plus_ext(member.name)
                place = Place(member.offset_data, member.size)
                if member.isfile() and key:
                    grouped.setdefault(key, {})[suffix.lower()] = place
                elif member.isfile():
                    index.bare[member.name] = place
            end = tar.offset
        with open(path, "rb") as shard:  # tarfile takes a cut between two files for the end
            shard.seek(end)
            if shard.read(BLOCK) != bytes(BLOCK):
                raise tarfile.ReadError(f"no end mark at byte {end:,}")
    except (tarfile.TarError, ValueError) as error:
        index.damage = f"cut off or damaged: {error}"
    index.samples = [TarSample(key, parts) for key, parts in grouped.items()]
    return index


def find_shards(path: str, option: str) -> dict[str, Path]:
    """Tar files by name, in order, of a folder and its subfolders (name: path below it) or of a pattern.

    A pattern has braces or stars: "data/{000..099}.tar", "data/*.tar". Empty where `path` is something else, such
    as a picture. Raises UserError for a shard that is missing, and for two of one name.
    """
    if Path(path).is_dir():
        return {p.relative_to(path).as_posix(): p for p in sorted(Path(path).rglob("*.tar")) if p.is_file()}
    if not path.endswith(".tar"):
        return {}
    found: dict[str, Path] = {}
    for name in [path] if Path(path).is_file() else webdataset.shardlists.expand_urls(path):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) and not Path(name).is_file() else [name]
        for place in map(Path, matches):
            if not place.is_file():
                raise UserError(f"{option} {path}: no shard {place}")
            if place.name in found:
                raise UserError(f"{option} {path}: {found[place.name]} and {place} have one name; give their folder")
            found[place.name] = place
    if not found:
        raise UserError(f"{option} {path}: no shard fits")
    return found


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file to a tar, of no date and no owner, so that equal content gives equal bytes."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))
