import json
import re

import pytest
from PIL import Image

from dualtoken.app import result_page
from dualtoken.app.report import STYLE, Page
from dualtoken.cli import main
from dualtoken.tokenizer.presets import RECIPES


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


def test_an_experiment_is_shown_with_its_pictures_and_the_papers_numbers(tmp_path):
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
    assert 'alt="Layers: the map"' in text and "dualtoken reproduce fig3" in text and "Results (full scale)" in text


def test_units_and_nested_names():
    found = dict(result_page.flat({"a": {"psnr": 2.0}, "b": [1, 2.5], "c": [{"share": 0.5}]}))
    assert found == {"a.psnr": 2.0, "b": "1, 2.5", "c.1.share": 0.5}
    assert [result_page.unit(n) for n in ("a.psnr", "c.1.share", "images")] == ["dB", "share of 1", ""]


@pytest.mark.parametrize(("content", "words"), [(None, "no such file"), ("{", "no JSON"), ("[]", "no result")])
def test_files_without_results_are_refused(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    assert main(["report", str(tmp_path / "r.json"), "--output", str(tmp_path / "r.html")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "r.html").exists()
