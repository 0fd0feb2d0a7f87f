"""Pictures in requests and replies: data URLs, with limits that are checked before a picture is decoded.

No path that a request names is ever opened, and only four formats are decoded, by Pillow's own readers.
"""

import base64
import binascii
import io
from dataclasses import dataclass

from PIL import Image

from dualtoken.app.http_errors import ApiError
from dualtoken.app.http_remote import RemoteError, fetch
from dualtoken.core.images import ImageError, read_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow knows more, some of which start other programs


@dataclass
class PictureLimits:
    """What pictures of requests may be.

    Args:
        max_pixels: width x height, read from the header before the picture is decoded.
        max_bytes: of a file.
        allow_urls: whether addresses are fetched.
    """

    max_pixels: int = 16_000_000
    max_bytes: int = 20_000_000
    allow_urls: bool = False


def open_picture(data: bytes, field: str, limits: PictureLimits) -> Image.Image:
    """The bytes of a file as upright RGB. Raises ApiError naming `field`."""
    try:
        return read_image(data, field, FORMATS, limits.max_pixels)
    except ImageError as error:
        raise ApiError(400, str(error), field, "invalid_image") from None


def open_url(url: str, field: str, limits: PictureLimits) -> Image.Image:
    """The picture of a data URL, or of an address where these are allowed. Raises ApiError naming `field`."""
    if url[:5].lower() == "data:":
        return open_picture(_data(url, field), field, limits)
    scheme = url.split(":", 1)[0].lower() if ":" in url[:10] else ""
    if scheme not in ("http", "https"):
        raise ApiError(400, f"{field}: give a data URL (data:image/png;base64,...); paths are not opened", field)
    if not limits.allow_urls:
        raise ApiError(400, f"{field}: addresses are not fetched by this server; give a data URL", field)
    try:
        return open_picture(fetch(url, limits.max_bytes), field, limits)
    except RemoteError as error:
        raise ApiError(400, f"{field}: {error}", field, "invalid_image_url") from None


def _data(url: str, field: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(400, f"{field}: a data URL begins with data:image/png;base64,", field)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{field}: what follows ';base64,' is not base64", field) from None


def to_base64(picture: Image.Image, kind: str = "png") -> str:
    """A picture as the base64 text of a file of a kind ("png", "jpeg", "webp")."""
    file = io.BytesIO()
    picture.save(file, kind.upper(), **{} if kind == "png" else {"quality": 95})
    return base64.b64encode(file.getvalue()).decode()


def to_data_url(picture: Image.Image, kind: str = "png") -> str:
    """A picture as a data URL."""
    return f"data:image/{kind};base64,{to_base64(picture, kind)}"
