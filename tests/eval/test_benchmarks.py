"""Drawings in the layouts of published benchmarks, and what their scorers' files say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from dualtoken.cli import main
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_picture
from dualtoken.data.scenes import Scenes
from dualtoken.eval.benchmarks import BENCHMARKS, read_prompts, write_benchmark
from dualtoken.eval.scores import read_genai_bench, read_geneval, read_lmms, read_wise
from dualtoken.eval.zero_shot import class_vectors
from dualtoken.mllm.assistant import Assistant
from tests.generation.lively import lively

PROMPTS = ("a red star", "a blue ring", "a green circle")
FILES = {  # as published, shortened
    "geneval": "".join(
        json.dumps({"tag": "counting", "include": [{"class": "star", "count": 1}], "prompt": p}) + "\n" for p in PROMPTS
    ),
    "wise": json.dumps([
        {"Prompt": p, "Explanation": "x", "Category": "c", "Subcategory": "s", "prompt_id": 701 + i}
        for i, p in enumerate(PROMPTS)
    ]),
    "genai-bench": json.dumps({f"{i:05}": {"prompt": p, "models": {}} for i, p in enumerate(PROMPTS)}),
    "mjhq-30k": json.dumps({f"{i}a": {"category": "art" if i else "logo", "prompt": p} for i, p in enumerate(PROMPTS)}),
}  # fmt: skip
PLACES = {
    "geneval": [f"{i:05}/samples/{j:04}.png" for i in range(3) for j in range(4)],
    "wise": ["701.png", "702.png", "703.png"],
    "genai-bench": ["00000.jpeg", "00001.jpeg", "00002.jpeg"],
    "mjhq-30k": ["logo/0a.png", "art/1a.png", "art/2a.png"],
}


@pytest.fixture(scope="module")
def assistant():
    return Assistant(*lively())


def written(folder, benchmark):
    path = folder / BENCHMARKS[benchmark].prompts.split(",")[0]
    path.write_text(FILES[benchmark])
    return str(path)


def pictures(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".png", ".jpeg")
    }


def draw(assistant, benchmark, prompts, output, **options):
    return write_benchmark(assistant, "tiny", benchmark, prompts, str(output), assistant.model.draw_config, **options)


@pytest.mark.parametrize("benchmark", list(BENCHMARKS))
def test_layouts_are_those_the_scorers_read(assistant, benchmark, tmp_path):
    result = draw(assistant, benchmark, written(tmp_path, benchmark), tmp_path / "out", batch_size=5)
    made = pictures(tmp_path / "out")
    assert sorted(made) == sorted(PLACES[benchmark]) and result["pictures"] == len(made) and result["failed"] == []
    kinds = {Image.open(tmp_path / "out" / name).format for name in made}
    assert kinds == {"JPEG" if benchmark == "genai-bench" else "PNG"} and len(set(made.values())) == len(made)
    record = json.loads((tmp_path / "out" / "dualtoken.json").read_text())
    assert record["layout"] and record["drawing"]["guidance"] == 3.0 and record["size"] == 16
    if benchmark == "geneval":
        line = (tmp_path / "out/00001/metadata.jsonl").read_text()
        assert json.loads(line) == json.loads(FILES["geneval"].splitlines()[1])  # the scorer calls json.load on it


def test_a_killed_run_goes_on_and_draws_the_same(assistant, tmp_path):
    prompts = written(tmp_path, "geneval")
    draw(assistant, "geneval", prompts, tmp_path / "whole", samples=2, batch_size=6, seed=3)
    first = draw(assistant, "geneval", prompts, tmp_path / "cut", samples=2, batch_size=4, seed=3)
    gone = tmp_path / "cut/00001/samples/0001.png"
    gone.unlink()
    second = draw(assistant, "geneval", prompts, tmp_path / "cut", samples=2, batch_size=1, seed=3)
    assert (first["pictures"], second["pictures"], second["before"]) == (6, 1, 5)
    whole, cut = pictures(tmp_path / "whole"), pictures(tmp_path / "cut")
    assert whole == cut  # whatever the batch
    with pytest.raises(UserError, match="drawn with another seed"):
        draw(assistant, "geneval", prompts, tmp_path / "cut", samples=2, seed=4)


def test_files_of_prompts_are_joined_and_other_prompts_refused(assistant, tmp_path):
    listed = json.loads(FILES["wise"])
    (tmp_path / "a.json").write_text(json.dumps(listed[:1]))
    (tmp_path / "b.json").write_text(json.dumps(listed[1:]))
    both = f"{tmp_path}/a.json,{tmp_path}/b.json"
    assert draw(assistant, "wise", both, tmp_path / "out")["prompts"] == len(listed)
    assert sorted(pictures(tmp_path / "out")) == PLACES["wise"]
    listed[0]["Prompt"] += " again"
    (tmp_path / "a.json").write_text(json.dumps(listed[:1]))
    with pytest.raises(UserError, match="drawn with another prompts_hash"):
        draw(assistant, "wise", both, tmp_path / "out")
    with pytest.raises(UserError, match=r"--prompts .*c\.json: no such file"):
        draw(assistant, "wise", f"{both},{tmp_path}/c.json", tmp_path / "out")


def test_processes_share_the_prompts(assistant, tmp_path, monkeypatch):
    prompts = written(tmp_path, "wise")
    draw(assistant, "wise", prompts, tmp_path / "one")
    for rank in (1, 0):  # the main process may come last
        state = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
        monkeypatch.setattr("dualtoken.eval.benchmarks.PartialState", lambda state=state, **options: state)
        assert draw(assistant, "wise", prompts, tmp_path / "two")["pictures"] == 2 - rank
    assert pictures(tmp_path / "two") == pictures(tmp_path / "one")
    parts = [json.loads((tmp_path / f"two/dualtoken-{r}-of-2.json").read_text()) for r in range(2)]
    assert [part["pictures"] for part in parts] == [2, 1] and (tmp_path / "two/dualtoken.json").is_file()


def test_the_command_fills_a_folder(tmp_path, capsys):
    model, processor = lively()
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    options = ["--model", str(tmp_path / "m"), "--benchmark", "wise", "--prompts", written(tmp_path, "wise")]
    assert main(["eval", "generation", *options, "--output", str(tmp_path / "out"), "--template", "draw {}"]) == 0
    assert sorted(pictures(tmp_path / "out")) == PLACES["wise"]
    said = capsys.readouterr().out
    assert "3 pictures drawn, 0 were there" in said and "gpt_eval.py" in said


def test_braces_of_a_template_are_text(assistant, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(assistant, "draw", lambda texts, *_: said.extend(texts) or [[Image.new("RGB", (8, 8))]] * 3)
    draw(assistant, "wise", written(tmp_path, "wise"), tmp_path / "out", template="a {x} {}")
    monkeypatch.setattr("dualtoken.eval.zero_shot.embed_texts", lambda *a: said.extend(a[2]) or torch.ones(1, 2))
    class_vectors(None, None, ["green circle"], ["a {x} {}"])
    assert said == ["a {x} a red star", "a {x} a blue ring", "a {x} a green circle", "a {x} green circle"]


def test_what_cannot_be_drawn_is_counted(assistant, tmp_path):
    listed = json.loads(FILES["wise"])
    listed[1]["Prompt"] = "red star " * 200
    (tmp_path / "long.json").write_text(json.dumps(listed))
    result = draw(assistant, "wise", str(tmp_path / "long.json"), tmp_path / "out")
    assert sorted(pictures(tmp_path / "out")) == ["701.png", "703.png"]
    assert [entry["place"] for entry in result["failed"]] == ["702.png"] and "tokens" in result["failed"][0]["reason"]
    (tmp_path / "all.json").write_text(json.dumps(listed[1:2]))
    with pytest.raises(UserError, match=r"no prompt of .*all\.json could be drawn"):
        draw(assistant, "wise", str(tmp_path / "all.json"), tmp_path / "none")


def test_mistakes_of_prompts_name_what_is_published_where(tmp_path, capsys):
    for benchmark, known in BENCHMARKS.items():
        (tmp_path / "other.txt").write_text('{"0": {"../x": 1}}')
        for path in (None, str(tmp_path / "nowhere"), str(tmp_path / "other.txt")):
            with pytest.raises(UserError, match="--prompts") as error:
                read_prompts(benchmark, path)
            assert known.published in str(error.value)
    (tmp_path / "out.json").write_text(json.dumps({"../../x": {"prompt": "p", "category": "c"}}))
    with pytest.raises(UserError, match="no name of a file"):
        read_prompts("mjhq-30k", str(tmp_path / "out.json"))
    (tmp_path / "twice.json").write_text(json.dumps(json.loads(FILES["wise"]) * 2))
    with pytest.raises(UserError, match="two prompts have one number"):
        read_prompts("wise", str(tmp_path / "twice.json"))
    prompts = written(tmp_path, "wise")
    for options, words in (
        (["--prompts", prompts], "say of which --benchmark"),
        (["--benchmark", "wise", "--prompts", prompts], "--output: give the folder"),
        (["--benchmark", "wise", "--prompts", prompts, "--output", "o", "--samples", "4"], "wise takes 1 a prompt"),
        (["--benchmark", "wise", "--prompts", prompts, "--output", "o", "--template", "draw"], "--template 'draw'"),
    ):
        assert main(["eval", "generation", *options]) == 2
        assert words in capsys.readouterr().err


def test_geneval_is_the_mean_of_its_tasks(tmp_path):
    rows = [("single_object", 1), ("single_object", 1), ("single_object", 0), ("counting", 0), ("counting", 1)]
    entries = [
        {"filename": f"{i}.png", "tag": tag, "prompt": "p", "correct": bool(yes), "reason": "", "details": "{}",
         "metadata": json.dumps({"tag": tag, "n": i // 2})}
        for i, (tag, yes) in enumerate(rows)
    ]  # fmt: skip
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(json.dumps(e) for e in entries))
    found = read_geneval(str(path))
    assert found["numbers"] == pytest.approx({"overall": (2 / 3 + 1 / 2) / 2, "single_object": 2 / 3, "counting": 0.5})
    assert found["right_pictures"] == 0.6 and found["prompts"] == 4 and found["right_prompts"] == 0.5
    path.write_text("\n".join(json.dumps(e | {"metadata": json.loads(e["metadata"])}) for e in entries))
    assert read_geneval(str(path)) == found  # an object in place of its text
    path.write_text(json.dumps({"tag": "counting"}))
    with pytest.raises(UserError, match="line 1: lacks correct, metadata"):
        read_geneval(str(path))
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no result"):
        read_geneval(str(path))


def test_wise_by_either_release(tmp_path):
    numbers = np.arange(1, 1001)
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (1000, 3))
    old = [
        {
            "prompt_id": int(n),
            "Subcategory": "s",
            "consistency": float(a),
            "realism": float(b),
            "aesthetic_quality": float(c),
        }
        for n, (a, b, c) in zip(numbers, scores, strict=True)
    ]
    for name, part in (("culture", old[:400]), ("space", old[400:700]), ("science", old[700:])):
        (tmp_path / f"{name}_scores_results.jsonl").write_text("\n".join(json.dumps(e) for e in part))
    found = read_wise(str(tmp_path / "*_scores_results.jsonl"))
    each = scores @ (0.7, 0.2, 0.1) / 2
    wanted = [
        each[a - 1 : b].mean() for a, b in ((1, 400), (401, 567), (568, 700), (701, 800), (801, 900), (901, 1000))
    ]
    assert list(found["numbers"].values())[1:] == pytest.approx(wanted)
    assert found["numbers"]["overall"] == pytest.approx(np.dot(wanted, (0.4, 0.167, 0.133, 0.1, 0.1, 0.1)))
    assert found["missing"] == 0 and "GPT-4o" in found["protocol"]
    new = [{"prompt_id": int(n), "Subcategory": "s", "score": float(n <= 400 or n > 880)} for n in numbers]
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps(e) for e in new))
    assert read_wise(str(tmp_path / "new.jsonl"))["numbers"]["overall"] == pytest.approx(0.4 + 0.12)
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps(e) for e in new[:400]))
    part = read_wise(str(tmp_path / "new.jsonl"))
    assert part["numbers"]["culture"] == 1 and part["numbers"]["overall"] is None and part["missing"] == 600
    texts = [json.dumps(e | {"prompt_id": str(e["prompt_id"])}) for e in new[:400]]
    (tmp_path / "text.jsonl").write_text("\n".join(texts))
    assert read_wise(str(tmp_path / "text.jsonl")) == part
    for wrong in ("twelve", None, "1001"):
        (tmp_path / "text.jsonl").write_text(json.dumps(new[0] | {"prompt_id": wrong}))
        with pytest.raises(UserError, match="of no prompt of WISE"):
            read_wise(str(tmp_path / "text.jsonl"))
    (tmp_path / "text.jsonl").unlink()
    with pytest.raises(UserError, match="differ in kind"):
        read_wise(str(tmp_path / "*.jsonl"))


def test_genai_bench_by_skill(tmp_path):
    torch.save(torch.tensor([0.2, 0.4, 0.6, 0.8])[:, None, None], tmp_path / "clip-flant5-xxl_4_prompts.pt")
    skills = {"basic": [0, 1], "advanced": [2, 3], "counting": [3], "negation": [2, 3]}
    (tmp_path / "genai_skills.json").write_text(json.dumps(skills))
    files = str(tmp_path / "clip-flant5-xxl_4_prompts.pt"), str(tmp_path / "genai_skills.json")
    found = read_genai_bench(*files)
    assert found["numbers"] == pytest.approx(
        {"overall": 0.5, "basic": 0.3, "advanced": 0.7, "counting": 0.8, "negation": 0.7}
    )
    with pytest.raises(UserError, match="published beside genai_image"):
        read_genai_bench(files[0], None)
    (tmp_path / "genai_skills.json").write_text(json.dumps({"basic": [9]}))
    with pytest.raises(UserError, match="names prompt 9"):
        read_genai_bench(*files)


def test_lmms_eval_results_by_task(tmp_path):
    results = {
        "results": {
            "mme": {"alias": "mme", "mme_perception_score,none": 1400.5, "mme_perception_score_stderr,none": "N/A"},
            "pope": {"alias": "pope", "pope_accuracy,none": 0.86, "pope_accuracy_stderr,none": 0.01},
        },
        "config": {"limit": 8.0}, "lmms_eval_version": "0.7.2",
    }  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(results))
    found = read_lmms(str(tmp_path / "r.json"))
    assert found["numbers"] == {"mme mme_perception_score": 1400.5, "pope pope_accuracy": 0.86}
    assert "--limit 8" in found["protocol"] and "0.7.2" in found["protocol"]
    (tmp_path / "r.json").write_text(json.dumps(results | {"results": results["results"] | {"mmvet": None}}))
    assert read_lmms(str(tmp_path / "r.json")) == found
    (tmp_path / "r.json").write_text(json.dumps({"results": {"a": None}}))
    with pytest.raises(UserError, match="holds no number"):
        read_lmms(str(tmp_path / "r.json"))
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(UserError, match="not results"):
        read_lmms(str(tmp_path / "r.json"))


@pytest.mark.slow
def test_one_report_with_a_distance_to_mjhq(tmp_path, monkeypatch, capsys):
    (tmp_path / "geneval.jsonl").write_text(json.dumps({"tag": "counting", "correct": True, "metadata": "{}"}))
    folders = {"drawn": 0, "reference": 50}
    for side, start in folders.items():
        for i in range(8):
            place = tmp_path / side / ("art" if i % 2 else "logo") / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            to_picture(Scenes(24, "test")[start + i].image).save(place)
    extractor = "torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3"
    weights = str(tmp_path / "inception.pth")
    with monkeypatch.context() as patch:  # torch-fidelity builds its network only together with a file of weights
        patch.setattr(f"{extractor}.load_state_dict", lambda self, state: None)
        torch.save({"x": torch.ones(1)}, weights)
        network = FrechetInceptionDistance(2048, feature_extractor_weights_path=weights).inception
    torch.save(network.state_dict(), weights)
    options = ["--geneval", str(tmp_path / "geneval.jsonl"), "--mjhq", str(tmp_path / "drawn")]
    options += ["--mjhq_reference", str(tmp_path / "reference"), "--output", str(tmp_path / "report.json")]
    assert main(["eval", "scores", *options]) == 2
    assert "--inception_weights" in capsys.readouterr().err
    assert main(["eval", "scores", *options, "--inception_weights", weights]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert set(found["MJHQ-30K"]["numbers"]) == {"FID", "FID, art", "FID, logo"}
    assert all(value > 0 for value in found["MJHQ-30K"]["numbers"].values())
    assert found["MJHQ-30K"]["pictures"]["drawn"] == {"logo": 4, "art": 4, "all": 8}
    page = (tmp_path / "report.md").read_text()
    assert "| GenEval: overall | 1 |" in page and "299 px" in page
    assert main(["eval", "scores"]) == 2 and "nothing to report" in capsys.readouterr().err
