"""Mistakes in the options and data of `train-mllm`: one line each, before any work where that can be."""

import pytest

from dualtoken.cli import main
from dualtoken.core.errors import UserError
from dualtoken.training.stages import Stage, set_trained
from tests import tiny
from tests.training.mllm_runs import error, recipe, write


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stage", "7"], "--stage 7: unknown; the stages are 1, 2, 3, 4-1, 4-2"),
        (["--stages", "1,5"], "--stages 5: unknown; the stages are 1, 2, 3, 4-1, 4-2"),
        (["--stage", "3"], "stage-2/model; train the stage before, or give --start DIR"),
        (["--start", "nowhere"], "--start nowhere: no such directory"),
    ],
)
def test_mistakes_are_one_line_with_status_2(options, words, tmp_path, capsys):
    assert main(write(tmp_path, None, *options)) == 2
    assert words in error(capsys)
    assert not (tmp_path / "run/codes").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_chat_longer_than_the_context_is_one_line_whoever_reads_it(workers, tmp_path, capsys):
    model, processor = tiny.mllm(context=20)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "short")
    data = tiny.mllm_recipe()["data"] | {"workers": workers, "held_out": 0}
    assert main(write(tmp_path, tmp_path / "short", "--stage", "4-1", data=data)) == 2
    said = capsys.readouterr().err
    assert "the language model takes 20" in said and "Traceback" not in said


def test_a_batch_that_cannot_be_split_is_a_mistake(tmp_path, start, capsys):
    loop = tiny.mllm_recipe()["loop"] | {"accumulate": 3}
    assert main(write(tmp_path, start, "--stage", "1", loop=loop)) == 2
    assert "stage 1: batch_size 4 cannot be split over 3" in error(capsys)


def test_a_tokenizer_of_other_sizes_or_other_codes_does_not_go_with_a_model(tmp_path, start, capsys):
    branch = tiny.BranchConfig(tiny.QuantizerConfig(codebook_size=32, code_dim=8, depth=2))
    tiny.tokenizer(branch=branch).save_pretrained(tmp_path / "wide")
    tiny.tokenizer(seed=1).save_pretrained(tmp_path / "other")
    for name, words in (
        (
            "wide",
            "does not match the model: pixel codebook 32 x depth 2 there, 16 x depth 2 in the model",
        ),
        ("other", "its pixel codebook is not the one that the model"),
    ):
        command = write(tmp_path, start, "--stage", "1", vision_tokenizer=str(tmp_path / name))
        assert main(command) == 2
        assert words in error(capsys)


def test_an_unknown_part_is_a_mistake():
    model, _ = tiny.mllm()
    with pytest.raises(UserError, match="the parts are projector, llm, head_projectors, heads"):
        set_trained(model, Stage({"tower": 1.0}, 4, {}))
    with pytest.raises(UserError, match="nothing"):
        set_trained(model, Stage({}, 4, {}))


def test_not_a_number_stops_with_step_part_and_last_good_state(tmp_path, start, capsys):
    stage = recipe("4-1", trains={"heads": 1e30, "llm": 1e30}, steps=6)
    assert main(write(tmp_path, start, recipe=stage, optim={"warmup": 0.0, "clip": 0.0})) == 2
    message = error(capsys)
    assert "training stopped at step" in message and "not finite" in message and "last good state" in message
    assert "pixel" in message and not (tmp_path / "run/stage-4-1/model").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"input": "pixels"}, "input='pixels' must be one of both"), ({"depth_weights": [1.0]}, "each of the 2 depths")],
)
def test_switches_that_do_not_exist_are_a_mistake_before_any_step(changes, words, tmp_path, start, capsys):
    assert main(write(tmp_path, start, recipe=recipe("3"), model=tiny.mllm_recipe()["model"] | changes)) == 2
    assert words in error(capsys) and not (tmp_path / "run").exists()
