"""`dualtoken encode | decode | reconstruct`: pictures to codes and back; `app/bulk.py` for shards of them."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from tqdm import tqdm

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.files import whole_or_not_at_all
from dualtoken.core.images import to_bytes, to_float, to_picture
from dualtoken.data.images import Batch, ImageFolder, read_in_order
from dualtoken.eval.report import table
from dualtoken.tokenizer.presets import open_tokenizer
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer
from dualtoken.tokenizer.tokenizer import reconstruct as through_codes


def encode(
    path: str,
    output: str | None = None,
    model: str = "mini",
    batch_size: int = 64,
    workers: int = 4,
    precision: Literal["no", "bf16", "fp16"] = "no",
    engine: Literal["local", "ray"] = "local",
    processes: int = 0,
) -> None:
    """Turn pictures into codes of both vocabularies: a few into one file, shards of them into shards of codes.

    Shards go on where a killed run stopped, and are shared out under `accelerate launch`.

    Args:
        path: a picture, or a folder with pictures in it and its subfolders; or webdataset shards, as a folder of tars
            or a pattern such as "data/{000..099}.tar".
        output: of pictures, the file of codes (16 bits a code, with the pictures' names; codes.safetensors where not
            given); of shards, the folder for the shards of codes.
        model: directory of a tokenizer, or a preset.
        batch_size: pictures at once.
        workers: of shards: processes that decode pictures; 0 = none beside this one.
        precision: of shards: of the tokenizer's matrix products ("no": float32).
        engine: of shards: "local" (this process, or those of `accelerate launch`) or "ray" (a Ray cluster).
        processes: of engine ray: actors at once; 0 = one for each GPU of the cluster, without GPUs for each CPU.
    """
    from dualtoken.app import bulk  # accelerate and webdataset, which a picture does not need

    jobs = bulk.find_jobs(path, output)
    if not jobs:
        if engine != "local":
            raise UserError(f"--engine {engine}: is for shards, and {path} has no tar in it")
        return _encode_pictures(path, output or "codes.safetensors", model, batch_size)
    config = bulk.BulkConfig(model, batch_size, workers, precision)
    if engine == "local":
        return bulk.encode_shards(jobs, output, config)
    from dualtoken.app.bulk_ray import encode_with_ray

    encode_with_ray(jobs, output, config, processes)


def _encode_pictures(path: str, output: str, model: str, batch_size: int) -> None:
    tokenizer = _open(model)
    parts, names = [], []
    for batch, relative in _pictures(path, tokenizer, batch_size):
        parts.append(_encode(tokenizer, batch))
        names += relative
    codes = DualCodes.cat(parts)
    with whole_or_not_at_all(Path(output)) as draft:
        codes.save(draft, names)
    print(f"{len(codes)} pictures -> {output} ({Path(output).stat().st_size:,} bytes)")


def decode(path: str, output: str = "out", model: str = "mini", batch_size: int = 64) -> None:
    """Turn codes back into pictures.

    Args:
        path: a file written by encode, or shards of codes: one, a folder or a pattern.
        output: folder for the pictures, PNG under the names they had; beside them the texts of shards.
        model: the tokenizer that made the codes: a directory, or a preset.
        batch_size: pictures at once.
    """
    writer = PictureWriter(output)
    if path.endswith(".tar") or Path(path).is_dir():
        from dualtoken.app.shards import decode_shards

        count = decode_shards(path, writer, _open(model), batch_size)
    else:
        count = _decode_file(path, writer, model, batch_size)
    print(f"{count} pictures -> {output}")


@torch.inference_mode()
def _decode_file(path: str, writer: "PictureWriter", model: str, batch_size: int) -> int:
    codes, names = DualCodes.load(path)
    if len(names) != len(codes):
        raise UserError(f"{path}: {len(codes)} pictures but {len(names)} names in it; encode the pictures again")
    tokenizer = _open(model)
    for first in tqdm(range(0, len(codes), batch_size), desc="batches", disable=None):
        part = codes[first : first + batch_size].to(tokenizer.device)
        writer.write(tokenizer.decode(part), names[first : first + batch_size])
    return len(codes)


def reconstruct(path: str, output: str = "out", model: str = "mini", batch_size: int = 64) -> None:
    """Put pictures through their codes and write what comes back.

    Args:
        path: a picture, or a folder with pictures in it and its subfolders.
        output: folder for the reconstructions, PNG under the pictures' names.
        model: directory of a tokenizer, or a preset.
        batch_size: pictures at once.
    """
    tokenizer = _open(model)
    writer, rows = PictureWriter(output), []
    for batch, names in _pictures(path, tokenizer, batch_size):
        found = through_codes(tokenizer, to_float(batch.images).to(tokenizer.device)).cpu()
        error = (to_bytes(found).float() - batch.images.float()).square().mean((1, 2, 3)).clamp_min(1e-3)
        rows += [(name, float(20 * torch.log10(255 / e.sqrt()))) for name, e in zip(names, error, strict=True)]
        writer.write(found, names)
    print(table(("picture", "PSNR [dB]"), rows[:20]))
    if len(rows) > 20:
        print(f"... and {len(rows) - 20} more")
    print(f"{len(rows)} pictures -> {output}, mean PSNR {sum(r[1] for r in rows) / len(rows):.2f} dB")


def _open(model: str) -> DualTokenVisionTokenizer:
    return open_tokenizer(model).to("cuda" if torch.cuda.is_available() else "cpu")


def _pictures(path: str, tokenizer: DualTokenVisionTokenizer, batch_size: int) -> Iterator[tuple[Batch, list[str]]]:
    """Batches of the pictures that can be read, with their names below `path`."""
    source = ImageFolder(path, tokenizer.image_size, "PATH")
    for batch in read_in_order(source, len(source), batch_size, []):
        yield batch, [Path(n).name if n == str(path) else Path(n).relative_to(path).as_posix() for n in batch.names]


@torch.inference_mode()
def _encode(tokenizer: DualTokenVisionTokenizer, batch: Batch) -> DualCodes:
    return tokenizer.encode(to_float(batch.images).to(tokenizer.device)).to("cpu")


class PictureWriter:
    """Writes pictures below a folder as PNG; two names that differ only in their suffix do not meet."""

    def __init__(self, folder: str):
        self.folder, self.taken = Path(folder), set()

    def write(self, images: torch.Tensor, names: list[str]) -> list[Path]:
        """Images [B, 3, H, W] in [-1, 1] -> files. Raises UserError for a name that leads out of the folder."""
        return [self._write(image, name) for image, name in zip(images, names, strict=True)]

    def _write(self, image: torch.Tensor, name: str) -> Path:
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts:
            raise UserError(f"picture name {name!r} in the codes leads out of --output: encode the pictures again")
        place = self.folder / pure.with_suffix(".png")
        if place in self.taken:
            place = self.folder / f"{pure}.png"
        self.taken.add(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        to_picture(image).save(place)
        return place
