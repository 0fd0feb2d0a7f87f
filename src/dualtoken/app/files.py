"""`dualtoken encode | decode | reconstruct`: pictures of a file or folder to codes and back."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch
from tqdm import tqdm

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_bytes, to_float, to_picture
from dualtoken.data.images import Batch, ImageFolder, read_in_order
from dualtoken.eval.report import table
from dualtoken.tokenizer.presets import open_tokenizer
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer
from dualtoken.tokenizer.tokenizer import reconstruct as through_codes


def encode(path: str, output: str = "codes.safetensors", model: str = "mini", batch_size: int = 64) -> None:
    """Turn pictures into codes of both vocabularies.

    Args:
        path: a picture, or a folder with pictures in it and its subfolders.
        output: file of codes to write: 16 bits a code, with the pictures' names.
        model: directory of a tokenizer, or a preset.
        batch_size: pictures at once.
    """
    tokenizer = _open(model)
    parts, names = [], []
    for batch, relative in _pictures(path, tokenizer, batch_size):
        parts.append(_encode(tokenizer, batch))
        names += relative
    codes = DualCodes.cat(parts)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    codes.save(output, names)
    print(f"{len(codes)} pictures -> {output} ({Path(output).stat().st_size:,} bytes)")


def decode(path: str, output: str = "out", model: str = "mini", batch_size: int = 64) -> None:
    """Turn a file of codes back into pictures.

    Args:
        path: a file written by encode.
        output: folder for the pictures, PNG under the names they had.
        model: the tokenizer that made the codes: a directory, or a preset.
        batch_size: pictures at once.
    """
    codes, names = DualCodes.load(path)
    if len(names) != len(codes):
        raise UserError(f"{path}: {len(codes)} pictures but {len(names)} names in it; encode the pictures again")
    tokenizer = _open(model)
    writer = _Writer(output)
    with torch.inference_mode():
        for first in tqdm(range(0, len(codes), batch_size), desc="batches", disable=None):
            part = codes[first : first + batch_size].to(tokenizer.device)
            writer.write(tokenizer.decode(part), names[first : first + batch_size])
    print(f"{len(codes)} pictures -> {output}")


def reconstruct(path: str, output: str = "out", model: str = "mini", batch_size: int = 64) -> None:
    """Put pictures through their codes and write what comes back.

    Args:
        path: a picture, or a folder with pictures in it and its subfolders.
        output: folder for the reconstructions, PNG under the pictures' names.
        model: directory of a tokenizer, or a preset.
        batch_size: pictures at once.
    """
    tokenizer = _open(model)
    writer, rows = _Writer(output), []
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


class _Writer:
    """Writes pictures below a folder as PNG; two names that differ only in their suffix do not meet."""

    def __init__(self, folder: str):
        self.folder, self.taken = Path(folder), set()

    def write(self, images: torch.Tensor, names: list[str]) -> None:
        """Images [B, 3, H, W] in [-1, 1]. Raises UserError for a name that leads out of the folder."""
        for image, name in zip(images, names, strict=True):
            pure = PurePosixPath(name)
            if not name or pure.is_absolute() or ".." in pure.parts:
                raise UserError(f"picture name {name!r} in the codes leads out of --output: encode the pictures again")
            place = self.folder / pure.with_suffix(".png")
            if place in self.taken:
                place = self.folder / f"{pure}.png"
            self.taken.add(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            to_picture(image).save(place)
