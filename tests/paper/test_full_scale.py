"""`dualtoken reproduce --scale full`: reports of benchmarks' tools, and models that are at hand."""

import json

import numpy as np
import pytest
from PIL import Image

from dualtoken.cli import main
from dualtoken.paper.numbers import paper_table
from dualtoken.paper.reproduce import EXPERIMENTS
from dualtoken.paper.scored import TABLES
from dualtoken.paper.tables import flickr8k
from tests import tiny


def made(tmp_path, id, *arguments):
    command = ["reproduce", id, "--scale", "full", "--out", str(tmp_path / "out"), *arguments]
    assert main(command) == 0
    return json.loads((tmp_path / "out" / f"{id}.json").read_text())


def lmms_report(tmp_path, name, shift=0.0):
    """What `dualtoken eval scores` makes of a result file as lmms_eval writes it; every share is 0.5, plus a shift."""
    results = {
        "mmbench_en_dev": {"gpt_eval_score,none": 61.3 + shift}, "seedbench": {"seed_image,none": 0.5 + shift / 100},
        "mme": {"mme_perception_score,none": 1400.0, "mme_cognition_score,none": 280.0},
        "vqav2_val": {"exact_match,none": 0.5}, "mmvet": {"gpt_eval_score,none": 50.0},
        "ai2d": {"exact_match,flexible-extract": 0.5}, "mmmu_val": {"mmmu_acc,none": 0.5},
        "pope": {"pope_f1_score,none": 0.5, "pope_accuracy,none": 0.9}, "ocrbench": {"ocrbench_accuracy,none": 0.5},
        "textvqa_val": {"exact_match,none": 0.5, "submission,none": None},
        "mathvista_testmini_format": {"llm_as_judge_eval,none": 50.0},
    }  # fmt: skip
    (tmp_path / f"{name}-lmms.json").write_text(json.dumps({"results": results, "lmms_eval_version": "0.7.3"}))
    report = tmp_path / f"{name}.json"
    assert main(["eval", "scores", "--lmms", str(tmp_path / f"{name}-lmms.json"), "--output", str(report)]) == 0
    return report


def test_tables_of_understanding_take_reports_of_lmms_eval(tmp_path):
    both, semantic = lmms_report(tmp_path, "both"), lmms_report(tmp_path, "semantic", -2.0)
    found = made(tmp_path, "table4", "--scores", f"both={both},semantic={semantic}")
    ours, other = found["rows"][:2]
    assert ours["scale"] == "full" and found["scale"] == "full"
    assert ours["paper"] == paper_table("table4").row("DualToken (semantic + pixel)").values
    wanted = {"mmb": 61.3, "mme": 60.0, "seed": 50.0, "vqav2": 50.0, "mmvet": 50.0, "ai2d": 50.0, "mmmu": 50.0,
              "pope": 50.0, "ocrb": 50.0, "tvqa": 50.0}  # fmt: skip
    assert {k: pytest.approx(v) for k, v in wanted.items()} | {
        "average": pytest.approx(np.mean([*wanted.values()]))
    } == ours["measured"]
    assert other["measured"]["seed"] == pytest.approx(48)
    assert "both is ahead of semantic in 2 of 10 columns, in the paper in 8" in found["findings"][0]
    assert "lmms-eval 0.7.3" in found["protocol"]["both"]["lmms-eval"]
    names = [row["name"] for row in found["rows"][2:]]
    assert names == ["SigLIP-L/16-256", "VILA-U"] and all(not row["measured"] for row in found["rows"][2:])
    page = (tmp_path / "out/table4.md").read_text()
    assert f"`dualtoken reproduce table4 --scale full --scores both={both},semantic={semantic}`" in page
    again = made(tmp_path, "table5", "--scores", f"3b-256={both}")
    assert again["rows"][0]["measured"]["mme"] == 1400 and again["rows"][0]["measured"]["mathvista"] == 50
    assert again["rows"][0]["paper"]["pope"] == 86.0
    third = made(tmp_path, "table2", "--scores", f"contrastive={both}")
    assert set(third["rows"][0]["measured"]) == {"mmb", "mme", "seed", "vqav2"}


def test_tables_of_drawings_take_reports_of_their_scorers(tmp_path):
    reports = {
        "table6": ("dual", {"MJHQ-30K": {"FID": 8.5, "FID, animals": 30.0}}, {"fid": 8.5}),
        "table12": ("3b", {"GenEval": {"overall": 0.7}, "WISE": {"overall": None}}, {"geneval": 0.7}),
        "table5": ("pixel", {"GenAI-Bench": {"counting": 0.6, "advanced": 0.5, "overall": 0.9}},
                   {"count": 0.6, "overall": 0.5}),
    }  # fmt: skip
    for id, (name, content, wanted) in reports.items():
        file = tmp_path / f"{id}.json"
        file.write_text(json.dumps({k: {"numbers": v, "protocol": "p"} for k, v in content.items()}))
        found = made(tmp_path, id, "--scores", f"{name}={file}")
        assert found["options"] == {"scores": {name: str(file)}}
        assert found["rows"][0]["measured"] == wanted and found["rows"][0]["paper"]
        assert not any("is ahead" in finding for finding in found["findings"])
    first = (tmp_path / "out/table6.json").stat().st_mtime_ns
    file = tmp_path / "table6.json"
    file.write_text(file.read_text().replace("8.5", "9.5"))
    assert made(tmp_path, "table6", "--scores", f"dual={file}")["rows"][0]["measured"] == {"fid": 9.5}
    assert (tmp_path / "out/table6.json").stat().st_mtime_ns > first


def test_every_column_of_these_tables_has_a_source_but_those_of_the_tokenizer():
    for scored in TABLES.values():
        columns = {column.key for table in scored.models for column in paper_table(table).columns}
        assert columns - set(scored.sources) <= {"average", "zero_shot", "rfid"} and set(scored.sources) <= columns
        for table, models in scored.models.items():
            assert all(paper_table(table).row(name) for name in models.values())


def test_figure_5_and_table_11_take_models_that_are_at_hand(tmp_path):
    model, prompts = str(tiny.mllm_directory()), tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue star\n")
    found = made(tmp_path, "fig5", "--weights", model, "--baseline", model, "--data", str(prompts))
    assert [row["measured"] for row in found["rows"]] == [{"prompts": 2}] * 2
    assert Image.open(tmp_path / "out/fig5.png").size[0] > 100
    cost = made(tmp_path, "table11", "--weights", model)
    assert (
        cost["rows"][0]["name"] == f"{model}: single token"
        and cost["rows"][0]["measured"]["drawing one picture, s"] > 0
    )


def test_figure_6_wants_a_tokenizer_of_two_encoders(tmp_path, capsys):
    pytest.importorskip("umap")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "data/a.png")
    one = str(tiny.tokenizer_directory())
    options = ["--weights", one, "--baseline", one, "--data", str(tmp_path / "data")]
    assert main(["reproduce", "fig6", "--scale", "full", "--out", str(tmp_path / "out"), *options]) == 2
    assert "give a tokenizer of two encoders" in capsys.readouterr().err


def test_flickr8k_as_it_is_published(tmp_path):
    for name in ("Flickr8k.token.txt", "Flickr_8k.testImages.txt"):
        (tmp_path / "Flickr8k_text").mkdir(exist_ok=True)
        (tmp_path / "Flickr8k_text" / name).write_text("a.jpg#0\tA dog .\n")
    (tmp_path / "Flicker8k_Dataset").mkdir()
    found = flickr8k(str(tmp_path))
    assert found["data"].endswith("Flicker8k_Dataset") and found["captions"].endswith(
        "Flickr8k_text/Flickr8k.token.txt"
    )
    assert found["split_file"].endswith("Flickr_8k.testImages.txt")


def test_all_at_full_scale_makes_what_the_options_allow(tmp_path, capsys):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"GenEval": {"numbers": {"overall": 0.5}, "protocol": "p"}}))
    assert main(["reproduce", "all", "--scale", "full", "--out", str(tmp_path / "out"), "--scores", f"7b={file}"]) == 0
    said = capsys.readouterr().out
    assert (
        "left out: reproduce table1 --scale full needs" in said
        and "reproduce table4 --scale full needs --scores" in said
    )
    assert [p.name for p in (tmp_path / "out").glob("*.json")] == ["table12.json"]
    assert "table12.md" in (tmp_path / "out/index.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table4"], "table4 --scale full needs --scores"),
        (["table4", "--scores", "both"], "--scores both: give NAME=REPORT"),
        (["table4", "--scores", "both=nowhere.json"], "--scores nowhere.json: no such file"),
        (["table4", "--scores", "boat=README"], "boat=...: table4 has no model of that name; it has continuous"),
        (["table4", "--scores", "both=README"], "both=README: not a report"),
        (["table4", "--scores", "both=empty.json"], "both=empty.json: holds none of lmms-eval mmbench_en_dev"),
        (["table11", "--weights", "TOKENIZER"], "--weights"),
        (["table12", "--weights", "MLLM"], "--weights MLLM: reproduce table12 does not take it at full scale"),
        (["all"], "nothing can be made of these options"),
        (
            ["fig5", "--weights", "MLLM", "--baseline", "MLLM", "--data", "nowhere"],
            "--data nowhere: no file of prompts",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README").write_text("no report")
    (tmp_path / "empty.json").write_text("{}")
    places = {"TOKENIZER": str(tiny.tokenizer_directory()), "MLLM": str(tiny.mllm_directory())}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert main(["reproduce", *arguments, "--scale", "full", "--out", str(tmp_path / "out")]) == 2
    assert words.replace("MLLM", places["MLLM"]) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_every_id_can_be_made_at_full_scale():
    assert all(experiment.needs for experiment in EXPERIMENTS.values())
