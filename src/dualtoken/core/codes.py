"""The two code maps of a batch of images, in memory and on disk."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualtoken.core.checkpoint import disk_errors
from dualtoken.core.errors import UserError


@dataclass
class DualCodes:
    """Codes of B images: N positions, D depths, in two vocabularies.

    On disk they take 2 bytes a code: an image of 256 positions at depth 4 is 4 KiB.
    """

    pixel: Tensor  # int64 [B, N, D]
    semantic: Tensor  # int64 [B, N', D]; N' = N, or N + 1 for a backbone with a class token

    def __len__(self) -> int:
        return len(self.pixel)

    def __getitem__(self, index: int | slice | Tensor) -> "DualCodes":
        """Some of the images; a number keeps the batch dimension."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        return DualCodes(self.pixel[index], self.semantic[index])

    def to(self, device: torch.device | str) -> "DualCodes":
        return DualCodes(self.pixel.to(device), self.semantic.to(device))

    @staticmethod
    def cat(parts: "list[DualCodes]") -> "DualCodes":
        """Join batches."""
        return DualCodes(torch.cat([p.pixel for p in parts]), torch.cat([p.semantic for p in parts]))

    def save(self, path: str | Path, names: list[str] | None = None) -> None:
        """Write as uint16 safetensors, with the names of the images.

        Raises UserError for a code above 65535, OSError where it cannot be written.
        """
        tensors = {"pixel": self.pixel, "semantic": self.semantic}
        for name, codes in tensors.items():
            if codes.numel() and int(codes.max()) > 65535:
                raise UserError(f"{name} codes reach {int(codes.max())}; 16 bits hold codebooks of up to 65536 rows")
        metadata = {"format": "dualtoken-codes-1", "names": "\n".join(names or [])}
        with disk_errors():
            save_file({k: v.to(torch.uint16).contiguous().cpu() for k, v in tensors.items()}, path, metadata)

    @staticmethod
    def load(path: str | Path) -> "tuple[DualCodes, list[str]]":
        """What `save` wrote, and the names. Raises UserError where the file holds no codes."""
        try:
            with safe_open(path, "pt") as opened:
                names = (opened.metadata() or {}).get("names", "")
                parts = [opened.get_tensor(k).to(torch.int64) for k in ("pixel", "semantic")]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: no file of codes written by `dualtoken encode` ({error})") from None
        return DualCodes(*parts), names.split("\n") if names else []
