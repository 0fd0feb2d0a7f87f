"""Tables that train: every id runs through with a tiny budget; parts are shared, kept, and go on after a stop."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dualtoken.cli import main
from dualtoken.data.scenes import scene
from dualtoken.paper import ablations, experiment, measure, table3, trained
from dualtoken.paper.ablations import layer_findings
from dualtoken.paper.experiment import Setting
from dualtoken.paper.measure import Judge
from dualtoken.paper.table3 import CASES
from dualtoken.paper.trained import Part, identity, merge
from dualtoken.paper.variants import Taps, Variant

LOOP = {"save_every": 1, "eval_every": 0, "tracker": "none"}
TINY = ["--budget", "0.1", "--pictures", "50", "--processes", "1"]


@pytest.fixture
def few(monkeypatch):
    """One weight, one seed."""
    monkeypatch.setattr(table3, "WEIGHTS", (1.0,))
    monkeypatch.setattr(table3, "SEEDS", 1)
    monkeypatch.setattr(ablations, "SEEDS", 1)


def test_the_key_follows_what_is_learnt_and_nothing_else(tmp_path):
    setting = Setting(out=tmp_path)
    one = Variant(2, 5).part(setting)
    others = [Variant(1, 5), Variant(2, 5, seed=1), Variant(2, 5, means=0.3),
              Variant(2, 5, quantizer="mcq"), Variant(2, 5, own_encoder=True)]  # fmt: skip
    assert len({one.key, *(v.part(setting).key for v in others)}) == 6
    assert Variant(2, 5).part(Setting(out=tmp_path, budget=15)).key != one.key
    for loop, same in (({"save_every": 1, "precision": False, "accumulate": 1}, True), ({"precision": "bf16"}, False)):
        assert (Part(one.command, one.recipe, one.changes | {"loop": loop}).key == one.key) is same
    assert identity("encoder", "mini") != "mini" and identity("encoder", "some/where") == "some/where"
    assert merge({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3}, "d": [2]}) == {"a": {"b": 3, "c": 2}, "d": [2]}


def test_variants_say_what_learns_and_what_counts(tmp_path):
    setting, at = Setting(out=tmp_path), Taps(2, 5, 6)
    made = {name: case.variant(at, 0.3, 0).part(setting).changes for name, case in CASES.items()}
    measured_on = Variant(2, 5).part(Setting(out=tmp_path, data="photos"))
    assert measured_on.changes["data"]["source"] == made["a"]["data"]["source"] == "scenes"
    assert made["b"]["losses"]["features"] == made["b"]["losses"]["pooled"] == 0 and "mse" not in made["b"]["losses"]
    assert made["meaning"]["losses"]["mse"] == 0 and "decoder" not in made["meaning"]["phases"][1]["trains"]
    assert "backbone" not in made["initial"]["phases"][1]["trains"] and "backbone" in made["a"]["phases"][1]["trains"]
    assert [made[n]["semantic"]["joined"] for n in ("a", "shallow", "two", "d")] == [True, True, False, False]
    assert all(sum(p["steps"] for p in changes["phases"]) == 280 for changes in made.values())


@pytest.mark.slow
def test_table3_and_table10_run_through_and_share_what_they_train(tmp_path, few, monkeypatch):
    ran, train = [], trained.COMMANDS["train-tokenizer"]
    monkeypatch.setitem(trained.COMMANDS, "train-tokenizer", lambda **told: (ran.append(told["output"]), train(**told)))
    trained._parser.cache_clear()
    monkeypatch.setattr(trained, "_parser", _parser_of(train))
    own = experiment.commit
    monkeypatch.setattr(experiment, "commit", lambda: "abc")
    assert main(["reproduce", "table3", "--out", str(tmp_path), *TINY]) == 0
    assert len(ran) == len(CASES)
    found = json.loads((tmp_path / "table3.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    row = rows["(d) two codebooks, shallow and deep, semantic weight 1"]
    assert 3 < row["measured"]["psnr"] < 40 and row["paper"]["psnr"] == 28.69 and row["scale"] == "mini"
    assert "psnr" not in rows["semantics only, deep"]["measured"] and not rows["semantics only, deep"]["paper"]
    assert "text_to_image" not in rows["(b) reconstruction only, deep"]["measured"]
    assert found["findings"] and found["budget"] == 0.1 and len(found["parts"]) == len(CASES)
    assert (tmp_path / "table3.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "parts").rglob("states"))
    assert main(["reproduce", "table3", "--out", str(tmp_path), "--again", "true", *TINY]) == 0
    assert len(ran) == len(CASES)  # all was there
    monkeypatch.setattr(ablations, "SEEDS", 2)
    assert main(["reproduce", "table10", "--out", str(tmp_path), *TINY]) == 0
    assert len(ran) == len(CASES) + 5  # RVQ of the first seed is row (d)
    monkeypatch.setattr(experiment, "commit", own)  # a helper has the true one
    alone = json.loads((tmp_path / "table10.json").read_text())["rows"]
    for more in (["--again", "true"], ["--seed", "1"]):  # measured anew, and trained, by two processes
        assert main(["reproduce", "table10", "--out", str(tmp_path), *TINY[:-1], "2", *more]) == 0
        found = json.loads((tmp_path / "table10.json").read_text())
        if found["seeds"] == [0, 1]:
            assert [r["measured"].keys() for r in found["rows"]] == [r["measured"].keys() for r in alone]
            assert found["rows"][0]["measured"]["psnr"] == pytest.approx(alone[0]["measured"]["psnr"], rel=1e-6)
        assert "Traceback" not in (tmp_path / "helper-1.log").read_text()  # it began, and met nothing
    assert len(list((tmp_path / "parts").glob("tokenizer-*/done.json"))) == len(CASES) + 5 + 3  # of seed 2


def test_table10_trains_all_and_measures_all_at_once(tmp_path, monkeypatch):
    asked = []

    class NoJudge:
        def __init__(self, setting, encoder):
            pass

        def measure_all(self, parts):
            asked.append(parts)

        def measure(self, part):
            return {"psnr": 20.0, "zero_shot": 50.0}

    monkeypatch.setattr(ablations, "Judge", NoJudge)
    monkeypatch.setattr(ablations, "train_parts", lambda parts, setting: asked.append(parts))
    monkeypatch.setattr(ablations, "minutes", lambda parts, setting: asked.append(parts) or {})
    assert len(ablations.table10(Setting(out=tmp_path)).rows) == 3
    assert len(asked) == 3 and asked[0] == asked[1] == asked[2] and len(asked[0]) == 3 * ablations.SEEDS


@pytest.mark.parametrize(("spread", "words"), [(0.1, ("Shown", "The reverse")), (2.0, ("Not decided", "Not decided"))])
def test_findings_of_table3_are_decided_by_the_spread_of_the_seeds(spread, words):
    psnr = {"a": 20.0, "b": 21.0, "c": 23.0, "d": 22.0}
    found = {
        (name, weight): {
            "psnr": psnr.get(name, 20.5), "psnr sd": spread,
            "text_to_image": 50.0 + (10.0 * weight if name == "d" else 0.0), "text_to_image sd": spread,
        }
        for name in CASES for weight in table3.WEIGHTS
    }  # fmt: skip
    said = table3.findings(found, {"text_to_image": 60.0})
    for word, claim in ((words[0], "suffers"), (words[0], "than one"), (words[1], "than reconstruction")):
        (sentence,) = [text for text in said if claim in text]
        assert sentence.startswith(f"{word}: ")
    assert any("25 % come with separate codebooks" in text for text in said) == (words[0] == "Shown")
    assert any("of the 4 points of '(a) one codebook, deep', 4 are beaten" in text for text in said)
    beyond = 4 if spread < 0.15 else 1  # 10, 3, 1 and 0.3 points, and twice the spread
    told = f"R@1 of (d) is above that of '(a) one codebook, deep' at 4 of 4 weights, at {beyond} by more"
    assert any(told in text for text in said)


@pytest.mark.slow
def test_tables_7_to_9_share_an_encoder_and_its_layers(tmp_path, few):
    found = {}
    for id in ("table7", "table8", "table9"):
        assert main(["reproduce", id, "--out", str(tmp_path), "--budget", "0.1", "--pictures", "12"]) == 0
        found[id] = json.loads((tmp_path / f"{id}.json").read_text())
    names = [row["name"] for row in found["table7"]["rows"] if row["measured"]]
    assert names == [
        "mini 2/6", "mini 3/6", "mini 5/6", "mini, continuous encoder",
        "mini-12 3/12", "mini-12 6/12", "mini-12 9/12", "mini-12, continuous encoder",
    ]  # fmt: skip
    assert found["table7"]["rows"][0]["measured"] == found["table8"]["rows"][0]["measured"]
    assert found["table7"]["parts"] == found["table8"]["parts"] and len(found["table7"]["parts"]) == 7
    assert len(list((tmp_path / "parts").iterdir())) == 1 + 6 + 3  # Table 9 trains layers 1, 2/12 and 4/12 beside


@pytest.mark.parametrize(
    ("deepest", "word"), [(19.0, "1.00 dB less, as in the paper"), (20.5, "within the spread"), (22.0, "against")]
)
def test_a_layer_is_better_when_it_is_so_beyond_the_seeds(deepest, word):
    found = {
        2: {"psnr": 20.0, "psnr sd": 0.3, "zero_shot": 50.0, "zero_shot sd": 1.0},
        4: {"psnr": deepest, "psnr sd": 0.4, "zero_shot": 50.0, "zero_shot sd": 1.0},
    }
    said = layer_findings("table7", "mini", found)
    assert word in said[0] and "layer 2 20.00 ± 0.30" in said[0] and "within the spread" in said[1]
    alone = {layer: {"psnr": 20.0 + layer, "zero_shot": 50.0} for layer in (2, 4)}  # one seed decides nothing
    assert all("one seed" in one for one in layer_findings("table7", "mini", alone))
    assert f"between neighbors {abs(deepest - 20):.2f} dB" in layer_findings("table9", "mini", found)[0]


def test_a_stopped_part_goes_on(tmp_path, monkeypatch):
    setting = Setting(out=tmp_path, budget=0.3)
    part = Variant(2, 5).part(setting)
    part = Part(part.command, part.recipe, part.changes | {"loop": LOOP})
    done, train = [], trained.COMMANDS["train-tokenizer"]

    def stops(**told):
        done.append(train(**told))
        raise KeyboardInterrupt  # after its last state, before it is known to be done

    monkeypatch.setattr(trained, "_parser", _parser_of(train))
    monkeypatch.setitem(trained.COMMANDS, "train-tokenizer", stops)
    with pytest.raises(KeyboardInterrupt):
        trained.train_parts([part], setting)
    folder = part.folder(setting)
    assert list((folder / "states").iterdir()) and not (folder / "done.json").exists()
    lines = (folder / "log.jsonl").read_text()
    monkeypatch.setitem(trained.COMMANDS, "train-tokenizer", train)
    assert trained.train_parts([part], setting) == [folder / "model"]
    assert (folder / "log.jsonl").read_text() == lines  # no step was done twice
    assert list(trained.minutes([part], setting)) == [folder.name]


def test_a_measure_is_kept_and_with_again_taken_once_more_in_a_run(tmp_path):
    place, taken = tmp_path / "measured.json", []

    def take():
        taken.append(1)
        return {"psnr": float(len(taken))}

    first = Setting(out=tmp_path)
    assert trained.remembered(place, first, take) == trained.remembered(place, first, take) == {"psnr": 1.0}
    again = Setting(out=tmp_path, again=True)
    tables = [again, replace(again, pictures=3)]  # two tables of one run
    assert [trained.remembered(place, setting, take) for setting in tables] == [{"psnr": 2.0}] * 2
    assert len(taken) == 2 and first.made == again.made


@pytest.fixture
def no_models(monkeypatch):
    """A Judge that opens no model: PSNR is the number of pictures, each picture and text has its own direction."""
    pair = SimpleNamespace(encoder=SimpleNamespace(backbone=SimpleNamespace(image_size=48)))
    monkeypatch.setattr(Judge, "pair", pair)
    own = property(lambda self: torch.eye(sum(len(batch.labels) for batch in self.batches)))
    for name, value in (("teacher", own), ("_texts", own), ("_distance", None)):
        monkeypatch.setattr(Judge, name, value)
    monkeypatch.setattr(Judge, "_classes", property(lambda self: torch.ones(2, len(self.teacher))))
    monkeypatch.setattr(measure, "open_tokenizer", lambda model: torch.nn.Identity())
    monkeypatch.setattr(measure, "embed_codes", lambda tokenizer, codes: codes)

    def back(tokenizer, pictures, _, seen):
        count = sum(map(len, pictures))
        seen(torch.eye(count))
        return SimpleNamespace(psnr=count, ssim=1.0, teacher_frechet=0.0)

    monkeypatch.setattr(measure, "evaluate_reconstruction", back)


def test_what_could_not_be_read_is_kept_with_the_measure_of_that_folder(tmp_path, no_models):
    part = SimpleNamespace(folder=lambda setting: tmp_path, model=lambda setting: "mini")

    def measured():
        setting = Setting(out=tmp_path, data=str(tmp_path / "data"))
        found = Judge(setting, "mini").measure(part)
        return found, len(setting.skipped), setting.protocol["tokenizers"].split(",")[0]

    def picture(number):
        place = tmp_path / f"data/{number % 2}/{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(number, "test").render(48)).save(place)

    for number in range(3):
        picture(number)
    (tmp_path / "data/0/broken.png").write_text("no picture")
    first = measured()
    assert first == measured() and first[1:] == (1, f"measured on 3 pictures of {tmp_path}/data")
    picture(3)
    more = measured()
    assert (first[0]["psnr"], more[0]["psnr"]) == (3, 4) and "4 pictures" in more[2]
    kept = {"psnr": 1.0, "zero_shot": 2.0}  # as it was kept before
    (tmp_path / "measured-mini-500.json").write_text(json.dumps(kept))
    setting = Setting(out=tmp_path)
    assert Judge(setting, "mini").measure(part) == kept and setting.skipped == []


def test_accuracy_of_no_labelled_picture_is_left_out(tmp_path, no_models, monkeypatch):
    (tmp_path / "data").mkdir()
    for number in range(2):
        Image.fromarray(scene(number, "test").render(48)).save(tmp_path / f"data/{number}.png")
        (tmp_path / f"data/{number}.txt").write_text(f"scene {number}")
    row = Judge(Setting(out=tmp_path, data=str(tmp_path / "data")), "mini").teacher_row()
    assert row["zero_shot"] is None and row["text_to_image"] > 0
    found = {layer: {"psnr": 20.0, "zero_shot": None} for layer in (2, 4)}
    assert [len(layer_findings(id, "mini", found)) for id in ("table7", "table9")] == [1, 1]
    monkeypatch.setattr(ablations, "same_run", lambda setting, name, seed: Variant(2, 5, seed=seed))
    monkeypatch.setattr(ablations, "train_parts", lambda parts, setting: None)
    monkeypatch.setattr(ablations, "minutes", lambda parts, setting: {})
    monkeypatch.setattr(Judge, "measure_all", lambda self, parts: None)
    monkeypatch.setattr(Judge, "measure", lambda self, part: found[2])
    result = ablations.table10(Setting(out=tmp_path))
    assert len(result.findings) == 1 and result.rows[0].measured["zero_shot"] is None


def test_a_part_says_the_version_that_its_training_began_with(tmp_path, monkeypatch):
    part, versions = Variant(2, 5).part(Setting(out=tmp_path)), ["before"]
    monkeypatch.setattr(trained, "version", lambda: versions[-1])
    monkeypatch.setattr(trained, "_parser", _parser_of(trained.COMMANDS["train-tokenizer"]))
    monkeypatch.setitem(trained.COMMANDS, "train-tokenizer", lambda **told: versions.append("after"))
    for code, said in ((None, "before"), ("of the run", "of the run")):
        versions[:] = ["before"]
        setting = Setting(out=tmp_path / said, code=code)
        trained.train_parts([part], setting)
        trained.minutes([part], setting)
        assert setting.made == {said} and versions[-1] == "after"


def _parser_of(function):
    """The parser of the function itself, not of what a test put in its place."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function, as_positional=False, sub_configs=True)
    return lambda command: parser
