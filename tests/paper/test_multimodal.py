"""Tables of the small LLM: prompts judged by rule, and every id with a tiny budget."""

import json

import numpy as np
import pytest

from dualtoken.cli import main
from dualtoken.data.scenes import COLORS, Scene, SceneObject
from dualtoken.paper.multimodal import frechet, verdict
from dualtoken.paper.prompts import Prompt, geneval_prompts, judge, skill_prompts

TINY = ["--budget", "0.1", "--pictures", "2"]


def picture(*things):
    made = [SceneObject(shape, color, "plain", "large", x, 0.5, radius, COLORS[color])
            for color, shape, x, radius in things]  # fmt: skip
    return Scene("white", 0.0, tuple(made)).render(48)


def test_prompts_of_every_kind_are_judged_from_the_picture_alone():
    both = skill_prompts(2, 0) + geneval_prompts(2, 0)
    assert [p.text for p in both] == [p.text for p in skill_prompts(2, 0) + geneval_prompts(2, 0)]
    assert len({p.kind for p in both}) == 12
    shown = {kind: next(p for p in both if p.kind == kind) for kind in ("colors", "negate", "universal", "compare")}
    color, shape = shown["colors"].text.split()[-2:]
    assert shown["colors"].holds(picture((color, shape, 0.5, 0.3)))
    assert not shown["colors"].holds(np.full((48, 48, 3), 240, np.uint8))
    words = shown["negate"].text.split()  # draw a COLOR SHAPE and no OTHER
    wanted, unwanted = (words[2], words[3]), words[-1]
    assert shown["negate"].holds(picture((*wanted, 0.5, 0.3)))
    assert not shown["negate"].holds(picture((*wanted, 0.27, 0.18), ("cyan", unwanted, 0.75, 0.18)))
    color = shown["universal"].text.split()[-1]
    other = next(name for name in ("red", "blue") if name != color)
    assert shown["universal"].holds(picture((color, "circle", 0.27, 0.18), (color, "square", 0.75, 0.18)))
    assert not shown["universal"].holds(picture((color, "circle", 0.27, 0.18), (other, "square", 0.75, 0.18)))
    words = shown["compare"].text.split()  # draw a large COLOR SHAPE and a small COLOR SHAPE
    large, small = (words[3], words[4]), (words[8], words[9])
    assert shown["compare"].holds(picture((*large, 0.27, 0.21), (*small, 0.75, 0.15)))
    assert not shown["compare"].holds(picture((*large, 0.27, 0.15), (*small, 0.75, 0.21)))


def test_shares_are_by_kind():
    prompts = [Prompt("a", "", lambda p: True), Prompt("b", "", lambda p: False), Prompt("a", "", lambda p: False)]
    found = judge(prompts, [np.zeros(1)] * 3)
    assert {kind: (s.right, s.total) for kind, s in found.items()} == {"a": (1, 2), "b": (0, 1)}


@pytest.mark.parametrize(
    ("ours", "other", "word"), [(60, 50, "as in"), (50, 60, "against"), (52, 50, "beyond chance"), (0, 0, "chance")]
)
def test_a_difference_counts_from_two_standard_errors(ours, other, word):
    said = verdict(ours, other, 300)  # one standard error of a share of one half is 2.9 points
    assert word in said and "paper" not in verdict(ours, other, 300, claimed=False)


def test_frechet_distance_of_equal_and_of_shifted_sets():
    rng = np.random.default_rng(0)
    some = rng.normal(size=(400, 6))
    assert abs(frechet(some, some)) < 1e-6
    assert frechet(some, some + 2.0) == pytest.approx(6 * 4.0)
    assert frechet(some, 3 * some) == pytest.approx(
        float(((some.mean(0) * 2) ** 2).sum() + 4 * np.trace(np.cov(some, rowvar=False)))
    )


@pytest.mark.slow
def test_table4_table5_and_fig5_run_through(tmp_path):
    out = ["--out", str(tmp_path)]
    for id in ("table4", "table5", "fig5"):
        assert main(["reproduce", id, *out, *TINY]) == 0
        found = json.loads((tmp_path / f"{id}.json").read_text())
        assert found["findings"] and found["parts"] and found["rows"][0]["measured"]
    rows = {row["name"]: row for row in json.loads((tmp_path / "table4.json").read_text())["rows"]}
    assert (
        rows["semantic codes"]["paper"]["mmb"] == 59.8 and 0 <= rows["semantic codes"]["measured"]["questions"] <= 100
    )
    drawn = [folder.name for folder in (tmp_path / "parts").glob("mllm-*") if (folder / "stage-draw").is_dir()]
    assert len(drawn) == 2  # table5 and fig5 share them
    assert (tmp_path / "fig5.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("id", ["table2", "table6", "table11", "table12", "fig6"])
def test_the_others_run_through(id, tmp_path):
    if id == "fig6":
        pytest.importorskip("umap")
    assert main(["reproduce", id, "--out", str(tmp_path), "--budget", "0.1", "--pictures", "20"]) == 0
    found = json.loads((tmp_path / f"{id}.json").read_text())
    assert (
        found["findings"]
        and any(row["measured"] for row in found["rows"])
        and (id == "fig6" or any(r["paper"] for r in found["rows"]))
    )
