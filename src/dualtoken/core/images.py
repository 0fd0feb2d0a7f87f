"""Reading pictures of any kind into one kind: RGB, 8 bit, upright.

CMYK, 16-bit, palette, grey, transparent and EXIF-rotated files are all used as what they show; a file that cannot
be read raises `ImageError` with its name, so that long work can skip and count it.
"""

import io
import os
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dualtoken.core.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


class ImageError(UserError):
    """A file that is no readable picture; the text begins with its name."""


def read_image(
    source: str | Path | bytes | Image.Image,
    name: str = "",
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Open a picture as upright 8-bit RGB; the first frame of an animation, transparency over white.

    Args:
        source: a path, the bytes of a file, or an open picture.
        name: what to call bytes in an error.
        formats: Pillow's names of those to try; None = all that it knows.
        max_pixels: width x height of a file, judged before it is decoded.
    Raises ImageError where the file is missing, damaged, no picture, or beyond the limit (Pillow's: about 179 Mpx).
    """
    name = name or (str(source) if isinstance(source, str | Path) else getattr(source, "filename", "")) or "image"
    try:
        if isinstance(source, Image.Image):
            source.load()  # of Image.open, its file is read only now
            return _as_rgb(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as opened:
                if max_pixels is not None and opened.width * opened.height > max_pixels:
                    raise ImageError(f"{name}: {opened.width} x {opened.height} pixels, more than {max_pixels:,}")
                opened.load()
                return _as_rgb(opened)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        kinds = f": give {', '.join(formats)}" if formats else ""
        raise ImageError(f"{name}: not a picture that Pillow can read{kinds}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} Mpx; make it smaller") from None
    except ImageError:
        raise
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise ImageError(f"{name}: damaged picture ({error or type(error).__name__})") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # a picture whose EXIF cannot be read, or written again, is used as it lies
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bit (or more) grey, which Pillow would clip at 255
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(np.nan_to_num(values).max()), 1e-9)
        image = Image.fromarray((np.nan_to_num(values) / top * 255.0).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


FIT = "largest centered square, resized by Pillow's antialiased bicubic filter"  # what `fit_image` does, for reports


def fit_image(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square, resized to `size` with an antialiased bicubic filter."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def image_bytes(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def to_bytes(images: Tensor) -> Tensor:
    """Float [..., 3, H, W], clamped to [-1, 1] -> uint8."""
    return ((images.float().clamp(-1, 1) + 1.0) * 127.5 + 0.5).to(torch.uint8)


def to_picture(image: Tensor) -> Image.Image:
    """Float [3, H, W] in [-1, 1] or uint8 [3, H, W] -> picture."""
    pixels = image if image.dtype == torch.uint8 else to_bytes(image)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG file whole or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        picture.save(draft, format="PNG")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def list_images(path: str | Path, option: str) -> list[Path]:
    """Picture files of a folder and its subfolders, sorted; or the one file given.

    Raises UserError naming `option` where there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{option} {path}: no such file or folder")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"{option} {path}: no picture in it (looked for {', '.join(IMAGE_SUFFIXES)})")
    return found
