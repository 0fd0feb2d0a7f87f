"""Pictures in, tensors for the tokenizer out, and the way back."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature

from dualtoken.core.errors import UserError
from dualtoken.core.images import fit_image, image_bytes, read_image, to_float, to_picture

CHANNELS = (1, 3, 4)
Picture = Image.Image | str | Path | bytes | np.ndarray | Tensor


class DualTokenImageProcessor(BaseImageProcessor):
    """Any picture -> its largest centred square at `size` pixels, float32 in [-1, 1]; `postprocess` inverts."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers' name and type)

    def __init__(self, size: int = 256, **kwargs):
        super().__init__(**kwargs)
        self.size = size

    def preprocess(self, images: Picture | list[Picture], return_tensors: str = "pt", **kwargs) -> BatchFeature:
        """Pictures, paths, bytes or uint8 arrays [H, W], [H, W, C], [C, H, W] with C of 1, 3, 4 -> pixel_values.

        pixel_values: float32 [B, 3, size, size] in [-1, 1].

        Raises ImageError for a file that cannot be read, UserError for an array of another kind.
        """
        listed = images if isinstance(images, (list, tuple)) else [images]
        pixels = [image_bytes(fit_image(self._open(image), self.size)) for image in listed]
        return BatchFeature({"pixel_values": to_float(torch.stack(pixels))}, tensor_type=return_tensors)

    def postprocess(self, images: Tensor) -> list[Image.Image]:
        """Images [B, 3, H, W] in [-1, 1] -> pictures."""
        return [to_picture(image) for image in images]

    def _open(self, image: Picture) -> Image.Image:
        return read_image(_from_array(image) if isinstance(image, (Tensor, np.ndarray)) else image)


def _from_array(array: Tensor | np.ndarray) -> Image.Image:
    kind, sizes = str(array.dtype).removeprefix("torch."), list(array.shape)
    channels = [place for place in (-1, 0) if len(sizes) == 3 and sizes[place] in CHANNELS]
    if kind != "uint8" or 0 in sizes or not (channels or len(sizes) == 2):
        raise UserError(f"picture: {kind} array {sizes}; give uint8 [H, W], [H, W, C] or [C, H, W] with C of 1, 3, 4")
    values = array.cpu().numpy() if isinstance(array, Tensor) else array
    values = np.moveaxis(values, channels[0], -1) if channels else values
    return Image.fromarray(values[..., 0] if channels and values.shape[-1] == 1 else values)
