import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dualtoken
from dualtoken.app.prompt import Model, Pictures, Story
from dualtoken.mllm.assistant import Assistant, user
from tests.app.serving import alike, png
from tests.generation.lively import lively


@pytest.fixture(scope="module")
def model():
    return Model(Assistant(*lively()))


def test_importing_is_quick_and_errors_are_the_packages_own():
    code = "import sys, dualtoken; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(dualtoken.UserError, match="model nowhere: no such directory"):
        dualtoken.load("nowhere")


def test_a_model_is_loaded_by_its_directory(model, tmp_path):
    assistant = model.assistant
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    loaded = dualtoken.load(tmp_path, "cpu")
    assert isinstance(loaded, Model) and alike(loaded.draw("a star", seed=3), model.draw("a star", seed=3))


@pytest.mark.parametrize("shape", [(20, 16), (20, 16, 1), (1, 20, 16)])
def test_gray_arrays_of_every_layout_are_the_same_picture(model, shape):
    values = np.arange(320, dtype=np.uint8).reshape(20, 16)
    wanted = model.encode(np.stack([values] * 3, -1))
    for array in (values.reshape(shape), torch.from_numpy(values).view(shape)):
        assert torch.equal(model.encode(array).pixel, wanted.pixel)


def test_one_picture_or_several(model, tmp_path):
    one, two = model.draw("a star", seed=3), model.draw("a star", 2, seed=2)
    assert isinstance(one, Image.Image) and isinstance(two, Pictures) and alike(two[1], one)
    assert not alike(model.draw("a star", seed=3, guidance=1.0, pixel={"top_k": 2}), one)
    sheet = Image.open(io.BytesIO(two._repr_png_()))
    assert sheet.size == (16 + 4 + 16, 16) and np.array_equal(sheet.crop((0, 0, 16, 16)), two[0])
    (tmp_path / "x.png").write_bytes(png())
    path = str(tmp_path / "x.png")
    assert alike(model.edit(path, "a star", seed=1), model.edit(png(), "a star", 1, seed=1)[0])
    assert alike(model.reconstruct(path), model.reconstruct([png(), png("blue")])[0])
    assert model.encode(path).pixel.shape == (1, 4, 2)


def test_it_answers_and_tells(model):
    wanted = model.assistant.ask([[user(png(), "what is it ?")]], max_new_tokens=6)[0]
    assert model.ask(png(), "what is it ?", max_new_tokens=6) == wanted
    assert isinstance(model.ask(None, "hi", max_new_tokens=2), str)
    assert isinstance(model.tell("tell a story", max_images=1), Story)
    shown = Story(["a <b>", Image.new("RGB", (2, 2))])._repr_html_()
    assert "a &lt;b&gt;" in shown and shown.count("data:image/png;base64,") == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.draw(""), "prompt ''"),
        (lambda m: m.draw("x", 0), "number 0"),
        (lambda m: m.draw("x", guidence=2), "unknown option guidence"),
        (lambda m: m.draw("x", pixel={"topk": 2}), "pixel: unknown topk"),
        (lambda m: m.ask("nowhere.png", "x"), "nowhere.png: no such file"),
        (lambda m: m.ask(3, "x"), "picture of type int"),
        (lambda m: m.reconstruct([]), "give at least one"),
        (lambda m: m.edit(None, "x"), "picture: 0 given"),
        (lambda m: m.edit([png(), png()], "x"), "picture: 2 given"),
        (lambda m: m.draw("x", seed=2**64), "seed 18446744073709551616: give at least 0"),
        (lambda m: m.draw("x", seed="a"), "seed 'a'"),
        (lambda m: m.draw("x", seed=1.5), "seed 1.5"),
        (lambda m: m.draw("x", seed=None), "seed None"),
        (lambda m: m.draw("x", "2"), "number '2'"),
        (lambda m: m.draw("x", 2.5), "number 2.5"),
        (lambda m: m.draw("x", guidance="3"), "guidance '3': give a finite number"),
        (lambda m: m.draw("x", guidance=float("nan")), "guidance nan"),
        (lambda m: m.draw("x", guidance=float("inf")), "guidance inf"),
        (lambda m: m.draw("x", pixel=0.5), "pixel 0.5: give a dict"),
        (lambda m: m.draw("x", pixel={"temperature": "a"}), "temperature 'a'"),
        (lambda m: m.draw("x", pixel={"temperature": float("nan")}), "temperature nan"),
        (lambda m: m.draw("x", pixel={"top_k": 1.5}), "top_k 1.5"),
        (lambda m: m.ask(png(), "x", max_new_tokens="3"), "max_new_tokens '3'"),
        (lambda m: m.tell("x", max_images="3"), "max_images '3'"),
        (lambda m: m.reconstruct(np.zeros((20, 20, 3))), r"float64 array \[20, 20, 3\]; give uint8"),
        (lambda m: m.reconstruct(np.zeros((20, 20, 3), np.int64)), "int64 array"),
        (lambda m: m.reconstruct(torch.zeros(3, 20, 20)), "float32 array"),
        (lambda m: m.reconstruct(np.zeros((2, 20, 20, 3), np.uint8)), r"uint8 array \[2, 20, 20, 3\]"),
        (lambda m: m.reconstruct(np.zeros((0, 20, 3), np.uint8)), r"uint8 array \[0, 20, 3\]"),
        (lambda m: m.decode(None), "codes of type NoneType"),
        (lambda m: dualtoken.load(device="gpu"), "device 'gpu': give cpu"),
        (lambda m: dualtoken.load(device="cuda:99"), "device 'cuda:99'"),
    ],
)
def test_mistakes_are_the_packages_own(model, call, words):
    with pytest.raises(dualtoken.UserError, match=words):
        call(model)
