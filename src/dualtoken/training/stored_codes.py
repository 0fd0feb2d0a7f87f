"""Codes of a pool of pictures, made once and kept: the MLLM then trains without the vision tower.

Written in files of some thousand pictures, each whole or not there, so a stopped run goes on with the next file.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dualtoken.core.codes import DualCodes
from dualtoken.core.distributed import is_main
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_float
from dualtoken.data.chat import Picture, StoredCodes
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer

PER_FILE, BATCH = 4096, 64
PROBE = 4  # pictures encoded again to see that stored codes are of this tokenizer


def picture_bytes(picture: Picture, size: int) -> Tensor:
    """uint8 [3, size, size] of a picture that has no codes. Raises UserError where it holds neither."""
    if picture.image is not None:
        return picture.image
    if picture.drawing is None:
        raise UserError(f"picture {picture.name} has neither pixels nor codes")
    return torch.from_numpy(picture.drawing.render(size)).permute(2, 0, 1).contiguous()


@torch.no_grad()
def encode_pictures(tokenizer: DualTokenVisionTokenizer, pictures: Sequence[Picture]) -> DualCodes:
    """Codes of pictures, in batches, on the tokenizer's device; returned on the CPU.

    An edited picture keeps the codes of the picture before at every position whose pixels are the same. Attention
    would change nearly half of them, so that what an edit leaves alone could not be learnt as a copy.
    """
    parts = []
    for start in range(0, len(pictures), BATCH):
        parts.append(_encode(tokenizer, [pictures[i] for i in range(start, min(start + BATCH, len(pictures)))]))
    return DualCodes.cat([codes for codes, _ in parts])


def _encode(tokenizer: DualTokenVisionTokenizer, pictures: list[Picture]) -> tuple[DualCodes, Tensor]:
    """Codes of some pictures on the CPU, and the pictures, uint8 [B, 3, S, S]."""
    images = torch.stack([picture_bytes(picture, tokenizer.image_size) for picture in pictures])
    codes = tokenizer.encode(to_float(images.to(tokenizer.device))).to("cpu")
    edited = [i for i, picture in enumerate(pictures) if picture.edited is not None]
    if edited:
        before, images_before = _encode(tokenizer, [pictures[i].edited for i in edited])
        changed = changed_positions(images_before, images[edited], codes.pixel.shape[1])[..., None]
        codes.pixel[edited] = torch.where(changed, codes.pixel[edited], before.pixel)
        own, theirs = (c[:, -changed.shape[1] :] for c in (codes.semantic[edited], before.semantic))
        codes.semantic[edited, -changed.shape[1] :] = torch.where(changed, own, theirs)
    return codes, images


def changed_positions(before: Tensor, after: Tensor, positions: int) -> Tensor:
    """Where two pictures differ: uint8 [B, 3, S, S] each -> bool [B, N], N positions in rows of sqrt(N)."""
    unequal = (before != after).any(1, keepdim=True).float()
    return F.adaptive_max_pool2d(unequal, math.isqrt(positions)).flatten(1).bool()


def store_codes(tokenizer: DualTokenVisionTokenizer, pictures: Sequence[Picture], folder: Path) -> StoredCodes:
    """Encode what `folder` does not hold yet (main process only), and read all of it.

    Raises UserError where the folder holds another pool, or codes of another tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = {folder / f"{start:09d}.safetensors": start for start in range(0, len(pictures), PER_FILE)}
    if is_main():
        _check(tokenizer, pictures, folder, places)
    for place, start in tqdm(places.items(), desc="codes", unit=" files", disable=None if is_main() else True):
        if place.exists() or not is_main():
            continue
        part = [pictures[i] for i in range(start, min(start + PER_FILE, len(pictures)))]
        draft = place.with_suffix(".draft")
        encode_pictures(tokenizer, part).save(draft, [picture.name for picture in part])
        draft.rename(place)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return load_codes(folder)


def _check(
    tokenizer: DualTokenVisionTokenizer, pictures: Sequence[Picture], folder: Path, places: dict[Path, int]
) -> None:
    """Raise UserError where files of the folder do not belong to these pictures, or to this tokenizer."""
    remedy = "give another folder, or remove this one to encode again"
    for file in sorted(folder.glob("*.safetensors")):
        if file not in places:
            raise UserError(f"--data.codes {folder}: {file.name} is of another pool than these {len(pictures)} "
                            f"pictures; {remedy}")  # fmt: skip
        codes, names = DualCodes.load(file)
        start, stop = places[file], min(places[file] + PER_FILE, len(pictures))
        ends = [pictures[start].name, pictures[stop - 1].name]
        if len(names) != stop - start or [names[0], names[-1]] != ends:
            raise UserError(
                f"--data.codes {folder}: {file.name} has codes of {len(names)} pictures, {names[0]} to {names[-1]}, "
                f"this pool needs {stop - start}, {ends[0]} to {ends[1]}; {remedy}"
            )
        if start == 0:
            few = min(PROBE, stop)
            again = encode_pictures(tokenizer, [pictures[i] for i in range(few)])
            for name in ("pixel", "semantic"):
                stored, now = getattr(codes, name)[:few], getattr(again, name)
                # Other hardware may round some codes differently; another tokenizer gives others nearly everywhere.
                if stored.shape != now.shape or (stored[..., 0] == now[..., 0]).float().mean() < 0.5:
                    raise UserError(
                        f"--data.codes {folder}: its {name} codes are of another vision tokenizer; {remedy}"
                    )


def load_codes(folder: Path) -> StoredCodes:
    """What `store_codes` wrote. Raises UserError where there is nothing."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"--data.codes {folder}: no file of codes in it")
    parts = [DualCodes.load(file) for file in files]
    return StoredCodes(DualCodes.cat([codes for codes, _ in parts]), [name for _, names in parts for name in names])
