import html
import inspect
import json
import re
import shlex

import pytest
from PIL import Image

from dualtoken.app import result_page
from dualtoken.app.converse import HeadOptions, story
from dualtoken.app.report import STYLE, Page, typed
from dualtoken.cli import main
from dualtoken.tokenizer.presets import RECIPES, meta_tokenizer, open_tokenizer, scale_of
from tests import tiny


def test_a_page_says_its_scale_and_command_and_suits_phones_and_the_dark(tmp_path):
    page = Page("Title <1>", "mini", "dualtoken demo --image 'a <b>.png'")
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    page.picture(tmp_path / "p.png", "a caption", 'what "it" shows')
    page.write(tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert "<h1>Title &lt;1&gt; (miniature)</h1>" in text and "<title>Title &lt;1&gt; (miniature)</title>" in text
    assert "<code>dualtoken demo --image &#x27;a &lt;b&gt;.png&#x27;</code>" in text
    assert 'alt="what &quot;it&quot; shows"' in text and "initial-scale=1" in text
    assert "prefers-color-scheme: dark" in STYLE and "max-width: 600px" in STYLE
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import', text)


def test_committed_results_become_one_page(tmp_path):
    results = [str(RECIPES / "mini-results" / f"{name}.json") for name in ("reconstruction", "zero-shot")]
    assert main(["report", json.dumps(results), "--output", str(tmp_path / "out/report.html")]) == 0
    text = (tmp_path / "out/report.html").read_text()
    found = json.loads((RECIPES / "mini-results/reconstruction.json").read_text())
    assert f"<td>psnr</td><td>{found['psnr']:.4g}</td><td>dB</td>" in text and "(miniature)" in text
    assert "zero-shot (miniature)" in text


def test_an_experiment_is_shown_with_its_pictures_and_the_papers_numbers(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "map.png")
    result = {
        "id": "fig3", "title": "Layers", "claim": "runs", "scale": "full", "data": "imagenet", "seeds": [0],
        "commit": "abc", "hardware": "a machine", "minutes": 1.5, "budget": 30.0, "findings": ["it does"],
        "rows": [{"name": "a", "measured": {"runs": 3}, "paper": {"runs": 2}, "scale": "full"}],
        "pictures": {"map.png": "the map"},
    }  # fmt: skip
    (tmp_path / "fig3.json").write_text(json.dumps(result))
    assert main(["report", str(tmp_path / "fig3.json"), "--output", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "<th>runs (full scale)</th><th>runs (paper)</th>" in text and "<td>3</td><td>2</td>" in text
    (tmp_path / "map.png").unlink()
    assert main(["report", str(tmp_path / "fig3.json"), "--output", str(tmp_path / "r.html")]) == 2
    assert "fig3.json: its picture" in capsys.readouterr().err
    assert 'alt="Layers: the map"' in text and "dualtoken reproduce fig3" in text and "Results (full scale)" in text


def test_units_and_nested_names():
    found = dict(result_page.flat({"a": {"psnr": 2.0}, "b": [1, 2.5], "c": [{"share": 0.5}]}))
    assert found == {"a.psnr": 2.0, "b": "1, 2.5", "c.1.share": 0.5}
    units = {
        "a.psnr": "dB", "outside_psnr_median": "dB", "c.1.share": "share of 1", "shape.codes": "share of 1",
        "vqa.commonest_answer": "share of 1", "pixel_usage": "share of 1", "images": "", "semantic_codes": "",
    }  # fmt: skip
    assert {name: result_page.unit(name) for name in units} == units


@pytest.mark.parametrize(
    ("result", "title"),
    [
        ({"GenEval": {"numbers": {"overall": 0.5}}}, "Results"),  # of other tools
        ({"model": "runs/photos/model", "psnr": 20.0}, "Results"),
        ({"model": "runs/photos/model", "scale": None, "psnr": 20.0}, "Results"),
        ({"model": "runs/photos/model", "scale": "mini", "psnr": 20.0}, "Results (miniature)"),
        ({"model": "runs/large/model", "scale": "full", "psnr": 20.0}, "Results (full scale)"),
        ({"model": "mini", "psnr": 20.0}, "Results (miniature)"),
    ],
)
def test_a_title_says_the_scale_where_it_is_known(tmp_path, result, title):
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert main(["report", str(tmp_path / "r.json"), "--output", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert f"<h1>{title}</h1>" in text and f"<h2>r{title.removeprefix('Results')}</h2>" in text


def test_a_tokenizer_is_of_the_scale_of_its_backbone():
    assert scale_of(open_tokenizer("mini")) == "mini" and scale_of(meta_tokenizer("siglip-l-256")) == "full"
    assert scale_of(tiny.tokenizer()) is None


@pytest.mark.parametrize("names", [["a b.json"], ["a b.json", "c.json"]])
def test_the_printed_command_makes_the_page_again(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    for name in names:
        (tmp_path / name).write_text('{"psnr": 20.0}')
    files = names[0] if len(names) == 1 else json.dumps(names)
    assert main(["report", files, "--output", "o/page.html", "--title", "It's so"]) == 0
    made = (tmp_path / "o/page.html").read_text()
    command = html.unescape(re.search("Made by <code>(.*?)</code>", made)[1])
    (tmp_path / "o/page.html").unlink()
    assert main(shlex.split(command)[1:]) == 0
    assert (tmp_path / "o/page.html").read_text() == made


def test_a_command_line_has_what_is_no_default():
    given = {"prompt": "it's", "image": ["a b.png", "c.png"], "pixel": HeadOptions(temperature=0.5)}
    usual = {name: p.default for name, p in inspect.signature(story).parameters.items()}
    line = typed("dualtoken story", story, usual | given)
    words = ["dualtoken", "story", "it's", "--image", '["a b.png", "c.png"]', "--pixel", '{"temperature": 0.5}']
    assert shlex.split(line) == words


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("{", "no JSON"),
        ("[]", "no result"),
        ('{"model": ["a"]}', "no result"),
        ('{"rows": 3, "title": "x", "scale": "mini"}', "no result"),
        ('{"psnr": 1, "scale": "huge"}', "no result"),
    ],
)
def test_files_without_results_are_refused(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    assert main(["report", str(tmp_path / "r.json"), "--output", str(tmp_path / "r.html")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "r.html").exists()
