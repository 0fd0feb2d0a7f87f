import html
import json
import re
import shlex
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from dualtoken.app.demo import _own_pictures, demo
from dualtoken.app.figures import code_colors
from dualtoken.app.report import Page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    Image.new("RGB", (90, 60), (200, 30, 30)).save(folder / "mine <b>.png")
    demo(image=str(folder / "mine <b>.png"), output=str(folder / "out"), images=60)
    return folder / "out"


def test_the_report_is_self_contained_and_shows_every_picture(made):
    page = (made / "index.html").read_text()
    pictures = {p.name for p in made.glob("*.png")}
    assert pictures == {
        *("scenes.png", "photographs.png", "yours.png", "code_maps.png", "neighbors.png", "zero_shot.png"),
        *("zero_shot_yours.png", "answers.png", "answers_yours.png", "drawings.png", "edits.png", "story.png"),
    }
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    HTMLParser().feed(page)


def test_the_printed_command_is_the_whole_one(made):
    command = f"dualtoken demo --image {shlex.quote(str(made.parent / 'mine <b>.png'))} --output {made} --images 60"
    assert f"<code>{html.escape(command)}</code>" in (made / "index.html").read_text()


def test_metrics_are_those_of_the_report(made):
    found = json.loads((made / "metrics.json").read_text())
    page = (made / "index.html").read_text()
    assert f"{found['scenes']['psnr']:.4g}" in page and f"{found['photographs']['psnr']:.4g}" in page
    assert found["neighbors"]["shape"]["semantic"] > found["neighbors"]["shape"]["pixel"]
    assert found["neighbors"]["background"]["pixel"] > found["neighbors"]["background"]["semantic"]


def test_the_model_at_work_is_counted(made):
    found = json.loads((made / "metrics.json").read_text())["model_at_work"]
    page = (made / "index.html").read_text()
    assert found["questions"]["asked"] == 8 and f"{found['questions']['right']} of 8 right" in page
    assert f"{found['drawings']['with semantic codes']} of 12 with semantic codes" in page
    assert f"{found['edits']['good']} of 8 did what was asked" in page


def test_pictures_are_not_blank(made):
    for path in made.glob("*.png"):
        assert len(Image.open(path).convert("RGB").getcolors(1 << 20)) > 30, path.name


def test_near_codes_have_near_colors():
    line = torch.linspace(-1, 1, 50)[:, None] * torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    colors = code_colors(line + 0.001 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0)))
    assert colors.shape == (50, 3) and float((colors[1:, 0] - colors[:-1, 0]).abs().max()) < 0.05


def test_text_in_pages_is_escaped(tmp_path):
    page = Page("<script>")
    page.table(("a",), [("<b>",)])
    page.write(tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert "<script>" not in text and "<b>" not in text


def test_own_pictures_of_like_names_are_all_kept(tmp_path):
    for name in ("Screenshot 2025-01-02 at 10.png", "Screenshot 2025-01-02 at 11.png", "a/b.png", "b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert len(_own_pictures(str(tmp_path))) == 4
