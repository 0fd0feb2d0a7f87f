import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from dualtoken.core.errors import UserError
from dualtoken.core.images import ImageError, fit_image, image_bytes, list_images, read_image, to_bytes, to_float

RED = (200, 30, 40)


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def middle(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.array(image.getpixel((image.width // 2, image.height // 2)))


@pytest.mark.parametrize(
    ("mode", "suffix", "off"),
    [("RGB", "png", 0), ("P", "png", 0), ("CMYK", "jpg", 8), ("RGBA", "webp", 4), ("RGB", "bmp", 0), ("P", "gif", 0)],
)
def test_modes_show_their_color(tmp_path, mode, suffix, off):
    image = Image.new("RGB", (20, 10), RED)
    path = saved(tmp_path, image.quantize() if mode == "P" else image.convert(mode), f"a.{suffix}")
    assert np.abs(middle(path) - RED).max() <= off


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.full((9, 9), 40000, np.uint16)
    path = saved(tmp_path, Image.fromarray(values), "a.png")
    assert np.abs(middle(path) - 40000 / 65535 * 255).max() <= 1


def test_transparency_is_over_white_also_in_a_palette(tmp_path):
    clear = Image.new("RGBA", (8, 8), (*RED, 0))
    assert (middle(saved(tmp_path, clear, "a.png")) == 255).all()
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    path = saved(tmp_path, palette, "b.png", transparency=palette.getpixel((0, 0)))
    assert (middle(path) == 255).all()


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert read_image(saved(tmp_path, image, "a.jpg", exif=exif)).size == (20, 40)


def test_one_pixel_and_very_wide_pictures_fit(tmp_path):
    for size in ((1, 1), (20000, 3), (2, 9000)):
        path = saved(tmp_path, Image.new("RGB", size, RED), "a.png")
        pixels = image_bytes(fit_image(read_image(path), 16))
        assert pixels.shape == (3, 16, 16) and (pixels[0] == RED[0]).all()


def test_what_is_no_picture_raises_with_its_name(tmp_path, monkeypatch):
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:3000])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "text.png", "empty.png", "missing.png"):
        with pytest.raises(ImageError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"cut.png: damaged picture"):
        read_image(Image.open(tmp_path / "cut.png"))
    with pytest.raises(ImageError, match="image: damaged picture"):
        read_image(Image.open(io.BytesIO(whole.getvalue()[:3000])))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"bytes.png: more than"):
        read_image(whole.getvalue(), "bytes.png")


def test_bytes_and_floats_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 1, 256)
    assert torch.equal(to_bytes(to_float(pixels)), pixels)
    assert float(to_float(pixels).min()) == -1 and float(to_float(pixels).max()) == 1


def test_listing_names_the_option(tmp_path):
    with pytest.raises(UserError, match=r"--x .*no such file or folder"):
        list_images(tmp_path / "nowhere", "--x")
    with pytest.raises(UserError, match=r"--x .*no picture in it"):
        list_images(tmp_path, "--x")
    (tmp_path / "b").mkdir()
    for name in ("b/2.PNG", "1.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in list_images(tmp_path, "--x")] == ["1.jpg", "2.PNG"]


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0II*\0\x08\0\0\0"])
def test_pictures_whose_exif_is_cut_off_are_read_as_they_lie(tmp_path, exif):
    Image.new("RGB", (6, 3), "red").save(tmp_path / "a.jpg", dpi=(72, 72), exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (6, 3)


def test_a_rotated_picture_with_a_wrong_tag_is_used(tmp_path):
    tags = Image.Exif()
    tags[0x0112], tags[0x011A] = 6, 72.0
    Image.new("RGB", (6, 3), "red").save(tmp_path / "a.jpg", exif=tags)
    content = (tmp_path / "a.jpg").read_bytes()
    place = content.index(b"Exif\0\0")
    entry = content.index(struct.pack(">H" if content[place + 6 : place + 8] == b"MM" else "<H", 0x011A), place)
    kind = struct.pack(">H" if content[place + 6 : place + 8] == b"MM" else "<H", 2)  # says it is text
    (tmp_path / "a.jpg").write_bytes(content[: entry + 2] + kind + content[entry + 4 :])
    assert read_image(tmp_path / "a.jpg").size in ((6, 3), (3, 6))


def test_any_error_of_pillow_is_a_damaged_picture(tmp_path, monkeypatch):
    Image.new("RGB", (6, 3), "red").save(tmp_path / "a.png")

    def fail(self):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ImageError, match=r"a\.png: damaged picture \(unpack requires"):
        read_image(tmp_path / "a.png")
