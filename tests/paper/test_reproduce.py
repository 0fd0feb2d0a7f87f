"""`dualtoken reproduce`: what is written, what is kept, and what is said where something lacks."""

import json
import os
from contextlib import nullcontext

import pytest
import torch
from PIL import Image

from dualtoken.cli import main
from dualtoken.core.errors import UserError
from dualtoken.data.scenes import scene
from dualtoken.paper import reproduce as module
from dualtoken.paper import side_by_side
from dualtoken.paper.experiment import Experiment, Result, Row, Setting, command_of, finished, stamp
from tests import tiny


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_fig3_in_miniature_writes_numbers_page_and_pictures(tmp_path):
    assert main(["reproduce", "fig3", "--out", str(tmp_path), "--pictures", "150"]) == 0
    found = json.loads((tmp_path / "fig3.json").read_text())
    assert found["scale"] == "mini" and found["seeds"] == [0] and found["hardware"] and found["minutes"] >= 0
    cosines = [row["measured"]["mean cosine"] for row in found["rows"] if "mean cosine" in row["measured"]]
    assert len(cosines) == 4 and all(-1 <= c <= 1 for c in cosines if c is not None)
    shallow, deep = (row["measured"] for row in found["rows"] if "shape" in row["measured"])
    assert set(shallow) == set(deep) == {"background", "color", "texture", "shape", "number"}
    page = (tmp_path / "fig3.md").read_text()
    assert "miniature" in page.splitlines()[0] and "(miniature)" in page
    for name in found["pictures"]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and name in page


def test_measured_and_paper_stand_in_columns_of_their_own(tmp_path, monkeypatch):
    made = []

    def make(setting):
        made.append(setting)
        return Result(
            [Row("ours", {"psnr": 20.5, "psnr sd": 0.613}), Row("theirs", {}, {"psnr": 27.12})], ["a finding"]
        )

    monkeypatch.setattr(module, "EXPERIMENTS", {"table1": Experiment("Tokenizers", "better", make, 1, ("data",), "X")})
    monkeypatch.setattr("dualtoken.paper.experiment.commit", lambda: "abc")
    arguments = ["reproduce", "table1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    lines = (tmp_path / "table1.md").read_text().splitlines()
    assert "|  | psnr, dB (miniature) | psnr, dB (paper) |" in lines
    assert "| ours | 20.5 ± 0.61 | - |" in lines and "| theirs | - | 27.12 |" in lines and "- a finding" in lines
    assert main(arguments) == 0 and len(made) == 1  # it was done
    assert main([*arguments, "--seed", "1"]) == 0 and len(made) == 2
    assert main([*arguments, "--seed", "1", "--again", "true"]) == 0 and len(made) == 3
    assert finished(tmp_path / "table1.json", Setting(out=tmp_path, seed=1))
    assert not finished(tmp_path / "table1.json", Setting(out=tmp_path, seed=1, pictures=9))
    assert not finished(tmp_path / "table1.json", Setting(out=tmp_path, seed=1, encoder="other"))
    monkeypatch.setattr("dualtoken.paper.experiment.commit", lambda: "abd")
    assert not finished(tmp_path / "table1.json", Setting(out=tmp_path, seed=1))
    assert main(["reproduce", "all", "--out", str(tmp_path)]) == 0
    assert "table1.md" in (tmp_path / "index.md").read_text()
    page = (tmp_path / "index.html").read_text()
    assert "Made by <code>dualtoken reproduce all</code>" in page
    assert "Made by <code>dualtoken reproduce table1 --seed 1</code>" in (tmp_path / "table1.html").read_text()
    assert "a finding" in page and "psnr, dB (paper)" in page and "27.12" in page and "20.5 ± 0.61" in page


def test_a_folder_is_known_by_what_is_in_it_and_its_broken_file_makes_no_cluster(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dualtoken.paper.experiment.commit", lambda: "abc")
    (tmp_path / "data").mkdir()
    for i in range(6):
        Image.fromarray(scene(i, "test").render(48)).save(tmp_path / f"data/{i}.png")
    (tmp_path / "data/broken.png").write_text("no picture")
    command = ["reproduce", "fig8", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    found = json.loads((tmp_path / "out/fig8.json").read_text())
    assert "The largest of 6 clusters" in str(found["pictures"]) and len(found["skipped"]) == 1
    capsys.readouterr()
    assert main(command) == 0 and "fig8 is done" in capsys.readouterr().out
    Image.fromarray(scene(6, "test").render(48)).save(tmp_path / "data/6.png")
    assert main(command) == 0 and "fig8 is done" not in capsys.readouterr().out
    assert "The largest of 7 clusters" in (tmp_path / "out/fig8.md").read_text()


def test_the_stamp_of_shards_and_of_presets(tmp_path):
    for number in (0, 1):
        (tmp_path / f"{number}.tar").write_bytes(bytes(10 + number))
    latest = (tmp_path / "1.tar").stat().st_mtime_ns
    assert stamp(str(tmp_path)) == stamp(f"{tmp_path}/{{0..1}}.tar") == [2, 21, latest]
    assert stamp("mini") == [0, 0, 0] and stamp(str(tmp_path / "1.tar")) == [1, 11, latest]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fig33"], "did you mean fig3?"),
        (["tableau"], "there are|did you mean"),
        (["fig3", "--scale", "full"], "--scale full needs --data, --encoder"),
        (["table3", "--scale", "full", "--data", "x", "--encoder", "y"], "needs --train_data: .*to train on"),
        (["table1", "--scale", "full", "--data", "x"], "needs --weights, --encoder"),
        (
            ["table3", "--scale", "full", "--budget", "30"],
            "--budget 30: reproduce table3 does not take it at full scale",
        ),
        (["fig6", "--weights", "TINY"], "--weights .* takes 16 px: give a --baseline"),
        (["fig6", "--pictures", "5"], "--pictures, --data: 5 pictures are too few for a map, give at least 8"),
    ],
)
def test_mistakes_are_one_line_before_any_work(arguments, words, tmp_path, capsys, monkeypatch):
    import re

    monkeypatch.setattr("dualtoken.paper.experiment.find_spec", lambda name: True)
    arguments = [str(tiny.tokenizer_directory()) if argument == "TINY" else argument for argument in arguments]
    assert main(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert re.search(words, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_pictures_that_a_table_cannot_be_measured_on_are_refused_before_it_trains(tmp_path, capsys):
    for folder in ("bare", "classes/dogs"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / folder / "a.png")
    assert main(["reproduce", "table3", "--data", str(tmp_path / "bare"), "--out", str(tmp_path / "out")]) == 2
    assert "no class folders in it" in capsys.readouterr().err and not (tmp_path / "out").exists()
    # class names are captions where there are no others
    module.EXPERIMENTS["table3"].check("table3", Setting(out=tmp_path / "out", data=str(tmp_path / "classes")))


def test_a_missing_package_is_said_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dualtoken.paper.experiment.find_spec", lambda name: None)
    for id in ("fig6", "all"):
        assert main(["reproduce", id, "--out", str(tmp_path / "out")]) == 2
        assert "fig6 needs the extra `umap`" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_list_says_what_each_needs(capsys):
    assert main(["reproduce", "list"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in module.EXPERIMENTS) and "ImageNet" in told


def made_in(setting):
    print("at work in", os.getpid())
    return Result([Row("process", {"id": os.getpid(), "threads": torch.get_num_threads()})])


def fails(setting):
    raise UserError("no luck")


def of_test(make, **more):
    return Experiment("A table", "a claim", make, 1, ("data",), "X", **more)


@pytest.mark.slow
def test_two_tables_are_made_side_by_side_and_times_are_measured_alone(tmp_path, monkeypatch, capfd):
    tables = {"table1": of_test(made_in), "table11": of_test(made_in, alone=True), "table3": of_test(made_in)}
    monkeypatch.setattr(module, "EXPERIMENTS", tables)
    assert main(["reproduce", "all", "--out", str(tmp_path), "--processes", "2"]) == 0
    rows = {id: json.loads((tmp_path / f"{id}.json").read_text())["rows"][0]["measured"] for id in tables}
    assert rows["table11"]["id"] == os.getpid() and os.getpid() not in (rows["table1"]["id"], rows["table3"]["id"])
    assert rows["table1"]["threads"] == max(1, side_by_side._cores() // 2)
    assert "at work in" in (tmp_path / "table1.log").read_text() and (tmp_path / "index.md").is_file()
    assert capfd.readouterr().out.count("at work in") == 1  # the others' output is in their logs


@pytest.mark.slow
def test_a_table_that_fails_beside_another_says_so_in_one_line(tmp_path, monkeypatch, capfd):
    tables = {"table1": of_test(fails), "table3": of_test(made_in), "table7": of_test(made_in)}
    monkeypatch.setattr(module, "EXPERIMENTS", tables)
    assert main(["reproduce", "all", "--out", str(tmp_path), "--processes", "2"]) == 2
    said = capfd.readouterr().err
    assert said.strip().splitlines()[-1].endswith("no luck") and "Traceback" not in said
    assert not (tmp_path / "table1.json").exists() and not (tmp_path / "index.md").exists()
    assert "Traceback" in (tmp_path / "table1.log").read_text()


def test_options_that_no_table_takes_are_refused_by_all_too(tmp_path, capsys):
    report = tmp_path / "report.json"
    report.write_text("{}")
    for arguments, words in (
        (["--scale", "full", "--scores", f"DuolToken-3B={report}"], "no table has a model of that name"),
        (["--flickr8k", "photos"], "--flickr8k photos: no table takes it in miniature"),
    ):
        assert main(["reproduce", "all", "--out", str(tmp_path / "out"), *arguments]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_command_of_a_result_makes_that_result_and_changed_files_are_no_version(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXPERIMENTS", {"table1": of_test(made_in)})
    monkeypatch.setattr("dualtoken.paper.experiment.commit", lambda: "abc")
    arguments = ["reproduce", "table1", "--seed", "3", "--pictures", "7", "--budget", "2.5"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "table1.json").read_text())
    assert command_of(found) == " ".join(["dualtoken", *arguments])
    assert command_of(found | {"options": {"data": "my pictures"}}).endswith(" --data 'my pictures'")
    setting = Setting(out=tmp_path, seed=3, pictures=7, budget=2.5)
    assert finished(tmp_path / "table1.json", setting)
    monkeypatch.setattr("dualtoken.paper.experiment.commit", lambda: "abc+")
    (tmp_path / "table1.json").write_text(json.dumps(found | {"commit": "abc+"}))
    assert not finished(tmp_path / "table1.json", setting)


def test_what_is_counted_at_full_size_stands_apart_from_the_miniature(tmp_path, monkeypatch):
    def make(setting):
        return Result([Row("mini", {"MiB": 2.0}), Row("3B", {"MiB": 75000.0}, {"MiB": 73800.0}, "full")])

    monkeypatch.setattr(module, "EXPERIMENTS", {"table11": of_test(make)})
    assert main(["reproduce", "all", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "table11.md").read_text().splitlines()
    assert "|  | MiB (miniature) | MiB (full scale) | MiB (paper) |" in lines
    assert "| mini | 2.0 | - | - |" in lines or "| mini | 2 | - | - |" in lines
    assert "MiB (full scale)" in (tmp_path / "index.html").read_text()


def marked(folder, setting):
    """What a helper does in a test: it leaves its process's number, and a way to fail."""
    (folder / f"{os.getpid()}.txt").write_text(f"{torch.get_num_threads()}")
    if (folder / "fail").exists():
        raise UserError("no luck")


@pytest.mark.slow
def test_a_helper_works_beside_and_its_failure_is_left_to_the_one_that_it_helps(tmp_path):
    threads = torch.get_num_threads()
    for fails in (False, True):
        if fails:
            (tmp_path / "fail").touch()
        with side_by_side.helpers(marked, tmp_path, Setting(out=tmp_path / "out"), 1):
            assert torch.get_num_threads() == max(1, side_by_side._cores() // 2)
        assert torch.get_num_threads() == threads
    assert len(list(tmp_path.glob("*.txt"))) == 2 and not (tmp_path / f"{os.getpid()}.txt").exists()
    assert "no luck" in (tmp_path / "out" / "helper-1.log").read_text()


@pytest.mark.parametrize(("code", "works"), [(None, True), ("abc", True), ("def", False)])
def test_a_helper_of_other_code_leaves_the_work(tmp_path, monkeypatch, capsys, code, works):
    monkeypatch.setattr(side_by_side, "_begin", lambda threads: None)  # it runs here
    monkeypatch.setattr(side_by_side, "_into_log", lambda place: nullcontext())
    monkeypatch.setattr(side_by_side, "version", lambda: "abc")
    side_by_side._help(marked, tmp_path, Setting(out=tmp_path, code=code), 1, tmp_path / "helper-1.log")
    assert bool(list(tmp_path.glob("*.txt"))) == works
    assert ("the run is of def" in capsys.readouterr().out) != works
