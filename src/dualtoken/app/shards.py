"""Shards: `dualtoken data inspect`, `dualtoken data scenes`, and `dualtoken decode` of shards of codes."""

import io
import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError, at_least_one
from dualtoken.core.files import whole_or_not_at_all
from dualtoken.core.images import ImageError, fit_image, image_bytes, read_image, to_bytes, to_picture
from dualtoken.data.code_shards import HEADER, CodeSample, CodeShard, DamagedShard
from dualtoken.data.scenes import Scenes
from dualtoken.data.tar_shards import Skipped, TarIndex, add_file, find_shards, index_tar
from dualtoken.eval.report import table
from dualtoken.tokenizer.fingerprint import fingerprint
from dualtoken.tokenizer.presets import open_tokenizer
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer

SIDE = 256  # px, of pictures in the grid of a shard of pictures
TEXTS = 5  # printed


def inspect(path: str, output: str | None = None, number: int = 16, model: str = "mini") -> None:
    """Show what is in shards of pictures or of codes.

    Args:
        path: a shard, a folder of shards, or a pattern.
        output: folder for grid.png, a grid of the first pictures with their texts; none where not given.
        number: pictures in the grid.
        model: the tokenizer that made the codes, a directory or a preset; for the grid of shards of codes.
    """
    shards = find_shards(path, "PATH")
    if not shards:
        raise UserError(f"PATH {path}: no tar; give a shard, a folder of shards, or a pattern")
    indices = {name: index_tar(shard) for name, shard in shards.items()}
    header = ("shard", "kind", "pictures", "texts", "skipped", "bytes", "codes a picture")
    print(table(header, [_row(name, shards[name], index) for name, index in indices.items()]))
    for name, index in indices.items():
        if index.damage:
            print(f"damaged: {name}: {index.damage}")
    formats = {CodeShard(shards[n], "PATH").format for n, index in indices.items() if HEADER in index.bare}
    for form in formats:
        print(f"codes of tokenizer {form.tokenizer}: pixel {form.pixel[0]} x {form.pixel[1]} of {form.codebooks[0]}, "
              f"semantic {form.semantic[0]} x {form.semantic[1]} of {form.codebooks[1]}")  # fmt: skip
    samples = itertools.chain.from_iterable(_samples(shards[name], index) for name, index in indices.items())
    first = list(itertools.islice(samples, max(number, TEXTS)))
    for key, _, text in first[:TEXTS]:
        print(f"  {key}: {text or '(no text)'}")
    if output is not None:
        _draw(Path(output), first[:number], model, [shards[name] for name in indices if HEADER in indices[name].bare])


def scenes(output: str, images: int = 40000, size: int = 48, shard_size: int = 1000, seed: int = 0) -> None:
    """Write drawn scenes as webdataset shards, PNG with captions: a data set to try things with, of any length.

    A shard that is there is kept, so that an interrupted command goes on.

    Args:
        output: folder of the shards.
        images: how many.
        size: side in pixels.
        shard_size: pictures in a shard.
        seed: another world with the same rules.
    """
    if min(images, size, shard_size) < 1:
        raise UserError("--images, --size and --shard_size: give numbers above 0")
    drawn, shards = Scenes(size, seed=seed), -(-images // shard_size)
    for number in tqdm(range(shards), "shards", disable=None):
        place = Path(output) / f"{number:05d}.tar"
        if place.is_file():
            continue
        with whole_or_not_at_all(place) as draft, tarfile.open(draft, "w") as tar:
            for index in range(number * shard_size, min(images, (number + 1) * shard_size)):
                sample, file = drawn[index], io.BytesIO()
                to_picture(sample.image).save(file, "PNG")
                add_file(tar, f"{index:08d}.png", file.getvalue())
                add_file(tar, f"{index:08d}.txt", sample.caption.encode())
    print(f"written: {images} pictures in {shards} shards of {output}")


def _row(name: str, shard: Path, index: TarIndex) -> tuple:
    """A row of the table; what was skipped is known of shards of codes with a summary."""
    holds_codes = HEADER in index.bare
    used = [s.parts for s in index.samples if ("codes" in s.parts if holds_codes else s.picture)]
    texts = sum("txt" in parts or "json" in parts for parts in used)
    kind = ("codes" if holds_codes else "pictures") + (", damaged" if index.damage else "")
    skipped, summary = None, shard.with_suffix(".json")
    if holds_codes and summary.is_file():
        skipped = len(json.loads(summary.read_text()).get("skipped", []))
    size = used[0]["codes"].size if holds_codes and used else None
    return name, kind, len(used), texts, skipped, f"{shard.stat().st_size:,}", size


def _samples(shard: Path, index: TarIndex) -> Iterator[tuple[str, DualCodes | Tensor, str]]:
    """Key, codes or uint8 [3, S, S], and text of what can be read; says what cannot."""
    found = _code_samples(shard) if HEADER in index.bare else _picture_samples(shard, index)
    for sample in found:
        if isinstance(sample, Skipped):
            print(f"skipped: {sample.what}")
        else:
            yield sample


def _code_samples(shard: Path) -> Iterator[tuple[str, DualCodes, str] | Skipped]:
    for sample in CodeShard(shard, "PATH"):
        yield (sample.key, sample.codes, sample.text) if isinstance(sample, CodeSample) else sample


def _picture_samples(shard: Path, index: TarIndex) -> Iterator[tuple[str, Tensor, str] | Skipped]:
    with open(shard, "rb") as opened:
        for sample in index.samples:
            if not sample.picture:
                continue
            text = sample.parts["txt"].read(opened).decode(errors="replace").strip() if "txt" in sample.parts else ""
            try:
                picture = read_image(sample.picture.read(opened), sample.key)
            except ImageError as error:
                yield Skipped(f"{shard}:{error}")
                continue
            yield sample.key, image_bytes(fit_image(picture, SIDE)), text


@torch.inference_mode()
def _draw(folder: Path, samples: Sequence[tuple[str, DualCodes | Tensor, str]], model: str, coded: list[Path]) -> None:
    """Write the grid; codes are decoded first. Raises UserError where the model did not make them."""
    from dualtoken.app.figures import draw_grid

    if not samples:
        raise UserError("--output: no picture that could be read, so there is no grid")
    tokenizer = open_tokenizer(model) if any(isinstance(shown, DualCodes) for _, shown, _ in samples) else None
    if tokenizer:
        mark = fingerprint(tokenizer)
        for shard in coded:
            CodeShard(shard, "PATH").check_tokenizer(mark)
    pictures = [to_bytes(tokenizer.decode(s)[0]) if isinstance(s, DualCodes) else s for _, s, _ in samples]
    folder.mkdir(parents=True, exist_ok=True)
    place = draw_grid(folder / "grid.png", pictures, [f"{key}: {text}" if text else key for key, _, text in samples])
    print(f"written: {place}")


@torch.inference_mode()
def decode_shards(path: str, writer, tokenizer: DualTokenVisionTokenizer, batch_size: int) -> int:
    """Write the pictures of shards of codes below the writer's folder, with their texts beside them; how many.

    Of several shards each has a folder of its name. Raises UserError where the tokenizer did not make the codes.
    """
    found = find_shards(path, "PATH")
    if not found:
        raise UserError(f"PATH {path}: no tar in it; give a file or shards written by `dualtoken encode`")
    at_least_one(batch_size=batch_size)
    shards = {}
    for name, shard in found.items():
        try:
            shards[name.removesuffix(".tar")] = CodeShard(shard, "PATH")
        except DamagedShard as error:
            print(f"skipped: {error}")
    if not shards:
        raise UserError(f"PATH {path}: none of its {len(found)} shards can be read")
    mark, count = fingerprint(tokenizer), 0
    for shard in shards.values():
        shard.check_tokenizer(mark)
    with tqdm(desc="pictures", total=sum(map(len, shards.values())), disable=None) as progress:
        for name, shard in shards.items():
            prefix = f"{name}/" if len(found) > 1 else ""
            for samples in _batched(_usable(shard), batch_size):
                codes = DualCodes.cat([sample.codes for sample in samples]).to(tokenizer.device)
                places = writer.write(tokenizer.decode(codes), [prefix + sample.key for sample in samples])
                for sample, place in zip(samples, places, strict=True):
                    if sample.text:
                        place.with_suffix(".txt").write_text(sample.text + "\n")
                count += len(samples)
                progress.update(len(samples))
    return count


def _usable(shard: CodeShard) -> Iterator[CodeSample]:
    for sample in shard:
        if isinstance(sample, Skipped):
            print(f"skipped: {sample.what}")
        else:
            yield sample


def _batched(samples: Iterator[CodeSample], size: int) -> Iterator[list[CodeSample]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch
