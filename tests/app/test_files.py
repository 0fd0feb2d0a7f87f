import numpy as np
import pytest
import torch
from PIL import Image

from dualtoken.app.files import decode, encode, reconstruct
from dualtoken.app.info import info
from dualtoken.cli import main
from dualtoken.core.codes import DualCodes
from dualtoken.core.images import to_picture
from dualtoken.data.scenes import Scenes
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "a.bmp", "sub/b.jpg")):
        to_picture(Scenes(96, "test")[i].image).save(pictures / name)
    (pictures / "bad.png").write_text("no picture")
    return pictures


def test_folder_to_codes_to_pictures_equals_reconstruct(folder, tmp_path, capsys):
    encode(str(folder), str(tmp_path / "c/codes.safetensors"), batch_size=2)
    assert "skipped 1" in capsys.readouterr().out
    codes, names = DualCodes.load(tmp_path / "c/codes.safetensors")
    assert sorted(names) == ["a.bmp", "a.png", "sub/b.jpg"] and codes.pixel.shape == (3, 36, 4)
    decode(str(tmp_path / "c/codes.safetensors"), str(tmp_path / "one"))
    reconstruct(str(folder), str(tmp_path / "two"))
    one, two = ({p.relative_to(tmp_path / n): p for p in (tmp_path / n).rglob("*.png")} for n in ("one", "two"))
    assert len(one) == 3 and one.keys() == two.keys()  # a.png and a.bmp do not overwrite each other
    assert all(np.array_equal(Image.open(one[k]), Image.open(two[k])) for k in one)
    wanted = np.array(Image.open(folder / "a.png").resize((48, 48), Image.Resampling.BICUBIC), float)
    errors = [np.abs(np.array(Image.open(path), float) - wanted).mean() for path in one.values()]
    assert min(errors) < 10 < max(errors)  # one of them is that picture, another is not
    assert "mean PSNR" in capsys.readouterr().out


def test_one_file(folder, tmp_path):
    encode(str(folder / "sub/b.jpg"), str(tmp_path / "c.safetensors"))
    assert DualCodes.load(tmp_path / "c.safetensors")[1] == ["b.jpg"]


def test_codes_of_another_model_or_with_hostile_names_are_refused(tmp_path, capsys):
    big = DualCodes(torch.full((1, 36, 4), 5000), torch.zeros(1, 36, 4, dtype=torch.int64))
    big.save(tmp_path / "big", ["a.png"])
    assert main(["decode", str(tmp_path / "big"), "--output", str(tmp_path / "o")]) == 2
    assert "wrong model?" in capsys.readouterr().err
    few = DualCodes(torch.zeros(1, 4, 2, dtype=torch.int64), torch.zeros(1, 4, 2, dtype=torch.int64))
    few.save(tmp_path / "few", ["a.png"])
    assert main(["decode", str(tmp_path / "few"), "--output", str(tmp_path / "o")]) == 2
    assert "4 positions" in capsys.readouterr().err
    good = DualCodes(torch.zeros(1, 36, 4, dtype=torch.int64), torch.zeros(1, 36, 4, dtype=torch.int64))
    for name in ("../out.png", "/etc/out.png"):
        good.save(tmp_path / "good", [name])
        assert main(["decode", str(tmp_path / "good"), "--output", str(tmp_path / "o")]) == 2
        assert "leads out of --output" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_a_text_file_is_one_line(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("hello")
    assert main(["encode", str(tmp_path / "notes.txt")]) == 2
    assert "notes.txt: not a picture" in capsys.readouterr().err.splitlines()[-1]


def test_info_counts_parameters_of_presets_and_directories(tmp_path, capsys):
    model = tiny.tokenizer()
    model.save_pretrained(tmp_path / "t")
    tiny.encoder().save_pretrained(tmp_path / "e")
    for name in (str(tmp_path / "t"), str(tmp_path / "e"), "mini"):
        info(name)
    text = capsys.readouterr().out
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text and "decoder" in text and "bits an image" in text
    assert main(["info", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
