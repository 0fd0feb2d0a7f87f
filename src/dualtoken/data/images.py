"""Where training pictures come from, and which of them make up a step.

A source gives sample number `index`; a step's batch is a function of (seed, step, rank) alone. So a run needs no
state but its step to go on exactly, and the number of loading processes does not change what is learnt.
"""

import atexit
import itertools
import multiprocessing.util
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dualtoken.core.errors import UserError, at_least_one
from dualtoken.core.images import ImageError, fit_image, image_bytes, list_images, read_image
from dualtoken.data.tar_shards import Place, find_shards, index_tar

# Photographs in scikit-image's wheel, color first
NOWHERE = Place(-1, -1)
DIGITS = 6  # of a class's number in a shard
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "motorcycle_left.png",
    "ihc.png",
    "camera.png",
    "coins.png",
    "moon.png",
    "grass.png",
    "gravel.png",
    "brick.png",
)


@dataclass
class Sample:
    """One picture with its caption."""

    image: Tensor  # uint8 [3, S, S], RGB
    caption: str
    label: int  # index into the source's `classes`, -1 where unknown
    name: str


@dataclass
class Batch:
    """Pictures of one step, and the files that could not be read in making it."""

    images: Tensor  # uint8 [B, 3, S, S]
    captions: list[str]
    labels: Tensor  # int64 [B]
    names: list[str]
    skipped: list[str] = field(default_factory=list)


@dataclass
class DataConfig:
    """Training pictures.

    Args:
        source: "scenes" (the bundled world), a folder (class folders are labels, `name.txt` beside a picture is
            its caption), webdataset shards ("data/{000..099}.tar", "data/*.tar" or their folder), or "photographs"
            (those scikit-image ships).
        batch_size: pictures of a batch, over all processes.
        workers: loading processes; 0 = in the training process.
        seed: of the bundled world.
    """

    source: str = "scenes"
    batch_size: int = 64
    workers: int = 0
    seed: int = 0


class Source(Protocol):
    """Pictures by number. `endless` sources have no length; a file that cannot be read raises ImageError.

    damaged: parts of the source that are lost as a whole, "NAME: reason" each.
    """

    endless: bool
    classes: tuple[str, ...]
    damaged: Sequence[str]

    def __getitem__(self, index: int) -> Sample: ...


class ImageFolder:
    """Pictures below a folder, sorted by path; the first level of subfolders, if any, gives the labels."""

    endless = False
    damaged = ()

    def __init__(self, path: str | Path, size: int, option: str = "--data.source"):
        self.root, self.size = Path(path), size
        self.files = list_images(path, option)
        first = [f.relative_to(self.root).parts for f in self.files if f != self.root]
        self.classes = tuple(sorted({parts[0] for parts in first if len(parts) > 1}))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        parts = file.relative_to(self.root).parts
        label = self.classes.index(parts[0]) if len(parts) > 1 else -1
        text = file.with_suffix(".txt")
        caption = text.read_text(errors="replace").strip() if text.is_file() else ""
        if not caption and label >= 0:
            caption = f"a {self.classes[label].replace('_', ' ')}"
        return Sample(image_bytes(fit_image(read_image(file), self.size)), caption, label, str(file))


def photographs(size: int) -> ImageFolder:
    """The photographs that scikit-image ships, without captions or labels."""
    import skimage

    source = ImageFolder(skimage.data_dir, size)
    source.files = [source.root / name for name in PHOTOGRAPHS]
    return source


class Shards:
    """Webdataset shards (local tar files): a picture and, with the same base name, `.txt` and `.cls`.

    Tar headers are read once at the start; a shard that is cut off gives the samples before the cut, and is
    listed in `damaged`. Raises UserError where no shard holds a picture.

    Args: pattern: see `find_shards`.
    """

    endless = False
    beside = ("txt", "cls")

    def __init__(self, pattern: str, size: int, option: str = "--data.source"):
        self.size, self.damaged = size, []
        self.shards = list(find_shards(pattern, option).values())
        numbers, places, keys = [], [], []  # arrays a shard: there may be many millions of pictures
        for number, shard in enumerate(self.shards):
            index = index_tar(shard)
            if index.damage:
                self.damaged.append(f"{shard}: {index.damage}")
            found = [sample for sample in index.samples if sample.picture]
            if not found:
                continue
            numbers.append(np.full(len(found), number, np.int32))
            keys.append(np.array([sample.key.encode() for sample in found]))
            places.append(np.array(
                [[sample.picture, *(sample.parts.get(name, NOWHERE) for name in self.beside)] for sample in found]
            ))  # fmt: skip
        if not numbers:
            raise UserError(f"{option} {pattern}: no picture in {len(self.shards)} shards")
        self.numbers, self.places, self.keys = map(np.concatenate, (numbers, places, keys))
        labelled = np.flatnonzero(self.places[:, 2, 1] >= 0)
        labels = [self._label(int(at)) for at in labelled]
        self.classes = tuple(str(i) for i in range(max(labels, default=-1) + 1))

    def _read(self, index: int, part: int) -> bytes:
        """A file of a sample (0 the picture, 1 its text, 2 its class), empty where it has none."""
        place = Place(*self.places[index, part].tolist())
        if place.size < 0:
            return b""
        with open(self.shards[self.numbers[index]], "rb") as opened:
            return place.read(opened)

    def _label(self, index: int) -> int:
        """The class of a sample, -1 where there is none that is a number; one of more digits is no class's."""
        found = self._read(index, 2).strip()
        return int(found) if found.isdigit() and len(found) <= DIGITS else -1

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        name = f"{self.shards[self.numbers[index]]}:{self.keys[index].decode()}"
        picture = read_image(self._read(index, 0), name)
        caption = self._read(index, 1).decode(errors="replace").strip()
        return Sample(image_bytes(fit_image(picture, self.size)), caption, self._label(index), name)


def open_source(config: DataConfig, size: int, split: str = "train", option: str = "--data.source") -> Source:
    """The source that `config.source` names, with pictures of side `size`; `option` is named in errors."""
    from dualtoken.data.scenes import Scenes  # scenes builds on this file

    if config.source == "scenes":
        return Scenes(size, split, config.seed)
    if config.source == "photographs":
        return photographs(size)
    if find_shards(config.source, option):
        return Shards(config.source, size, option)
    return ImageFolder(config.source, size, option)


def collate(samples: list[Sample], skipped: list[str]) -> Batch:
    """Samples of one size as a batch."""
    return Batch(
        images=torch.stack([s.image for s in samples]),
        captions=[s.caption for s in samples],
        labels=torch.tensor([s.label for s in samples]),
        names=[s.name for s in samples],
        skipped=skipped,
    )


def read_in_order(
    source: Source, images: int, batch_size: int, skipped: list[str], labelled: bool = False
) -> Iterator[Batch]:
    """Up to `images` pictures in the source's order, each once; with `labelled` only those that have a label.

    Of a longer source they are spread evenly, so that a folder of classes gives some of each; where one cannot be used,
    those in between fill up.
    Files that cannot be read are left out and named in `skipped`. Raises UserError where no picture is left, and for
    numbers below 1.
    """
    at_least_one(images=images, batch_size=batch_size)
    total = images if source.endless else min(images, len(source))
    indices: Iterator[int] = itertools.count()
    if not source.endless:
        spread = dict.fromkeys(i * len(source) // total for i in range(total))
        indices = itertools.chain(spread, (i for i in range(len(source)) if i not in spread))
    held: list[Sample] = []
    taken = 0
    with tqdm(total=total, desc="pictures", disable=None) as progress:
        for index in indices:
            if taken == total:
                break
            try:
                sample = source[index]
            except ImageError as error:
                skipped.append(str(error))
                continue
            if labelled and sample.label < 0:
                continue
            held.append(sample)
            taken += 1
            progress.update()
            if len(held) == batch_size:
                yield collate(held, [])
                held = []
        if held:
            yield collate(held, [])
    if skipped:
        print(f"skipped {len(skipped)} pictures that could not be read, the first: {skipped[0]}")
    if not taken:
        raise UserError("no picture could be used" + (f", the first: {skipped[0]}" if skipped else ""))


class StepBatches(Dataset):
    """Batch number `step` of one process out of `world_size`, as a function of its arguments alone."""

    def __init__(self, source: Source, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._order: tuple[int, np.ndarray] | None = None

    def __getitem__(self, step: int) -> Batch:
        start = (step * self.world_size + self.rank) * self.batch_size
        samples, skipped = [], []
        for place in range(start, start + self.batch_size):
            for attempt in range(100):
                try:
                    samples.append(self.source[self._index(place, attempt)])
                    break
                except ImageError as error:
                    skipped.append(str(error))
            else:
                raise UserError(f"100 pictures in a row could not be read, the last: {skipped[-1]}")
        return collate(samples, skipped)

    def _index(self, place: int, attempt: int) -> int:
        """Sample at a place of the endless sequence of epochs; attempts after the first draw a substitute."""
        if self.source.endless:
            return self.seed * 2**40 + place
        length = len(self.source)
        if attempt:
            return int(np.random.default_rng((self.seed, place, attempt)).integers(length))
        epoch, at = divmod(place, length)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(length))
        return int(self._order[1][at])


def outlive_sigterm(_: int) -> None:
    """A loading process ends with the one it loads for, which may have a step to finish when SIGTERM comes to all."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_loading() -> None:
    """At the end of Python, before multiprocessing sends SIGTERM to its children and waits for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call the killed ones an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


atexit.register(_end_loading)  # called before that of multiprocessing.util, which is registered by its import


class _Told(Dataset):
    """A dataset that gives a UserError in place of an item: the loader would wrap it in a traceback."""

    def __init__(self, batches: Dataset):
        self.batches = batches

    def __getitem__(self, step: int) -> Any:
        try:
            return self.batches[step]
        except UserError as error:
            return error


def _given(item: Any) -> Any:
    if isinstance(item, UserError):
        raise item
    return item


def step_batches(batches: Dataset, start: int, stop: int, workers: int) -> Iterator[Any]:
    """Batches start .. stop - 1 of a dataset of steps in order, made ahead by `workers` processes."""
    loader = DataLoader(
        _Told(batches),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=outlive_sigterm,
        generator=torch.Generator().manual_seed(0),  # otherwise the loader draws from the global random state
    )
    return map(_given, iter(loader))
