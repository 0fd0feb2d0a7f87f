import importlib
import subprocess
import sys

import pytest
import yaml

from dualtoken.cli import COMMANDS, RECIPES, Command, main, run


def commands(table=COMMANDS, path=()):
    for name, entry in table.items():
        if isinstance(entry, Command):
            yield (*path, name), entry
        else:
            yield from commands(entry, (*path, name))


def test_help_does_not_import_torch():
    code = "import sys; from dualtoken.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "dualtoken demo" in done.stdout


@pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=lambda v: "" if isinstance(v, Command) else " ".join(v)
)
def test_every_command_explains_its_options(path, command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*path, "--help"])
    text = " ".join(capsys.readouterr().out.split())  # argparse breaks lines
    assert stop.value.code == 0 and command.example in text
    function = getattr(importlib.import_module(command.target.split(":")[0]), command.target.split(":")[1])
    for name in function.__annotations__:
        assert name == "return" or name in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demos"], "did you mean 'demo'?"),
        (["eval", "zeroshot"], "did you mean 'zero-shot'?"),
        (["encode", "x", "--modl", "mini"], "nearest valid key is 'model'"),
        (["train-tokenizer", "--config", "mini-tokeniser"], "mini-draw, mini-encoder"),
        (["train-tokenizer", "--data.batch_size", "many"], "data.batch_size"),
        (["info", "nowhere"], "no such directory, and no preset or shape (known: mini,"),
        (["eval", "reconstruction", "--data", "nowhere"], "--data nowhere: no such file or folder"),
        (
            ["eval", "reconstruction", "--lpips_weights", "nowhere.pth"],
            "no such file; it is published as torchvision's",
        ),
        (["demo", "--image", "nowhere.jpg"], "--image nowhere.jpg: no such file or folder"),
        (["demo", "--model", "elsewhere"], "the demo needs a preset"),
        (["data", "scenes", "/dev/null/x"], "Not a directory"),
        (["eval", "understanding", "--batch_size", "0"], "--batch_size 0: give at least 1"),
        (["eval", "generation", "--batch_size", "0"], "--batch_size 0: give at least 1"),
        (["eval", "generation", "--benchmark", "wise", "--batch_size", "0"], "--batch_size 0: give at least 1"),
        (["eval", "understanding", "--split", "train"], "split"),
        (["eval", "generation", "--split", "foo"], "split"),
        (["eval", "scores", "--out=report.json"], "nothing to report"),
        (["draw", "a star", "-n=0"], "--number 0: give at least 1"),
    ],
)
def test_mistakes_are_one_line_with_status_2(arguments, words, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and words in message and "Traceback" not in message


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_accepted(recipe, tmp_path, capsys):
    options = {"encoder": ("train-encoder", "--data.source"), "tokenizer": ("train-tokenizer", "--data.source")}
    command, missing = options.get(recipe.stem.split("-")[-1], ("train-mllm", "--vision_tokenizer"))
    written = yaml.safe_load(recipe.read_text())
    assert written["seed"] == 0
    if {"backbone", "pixel"} <= set(written):  # a tokenizer of the paper
        command, missing = "train-tokenizer", "--encoder"
    wrong = [command, "--config", recipe.stem, "--output", str(tmp_path), missing, str(tmp_path / "nowhere")]
    assert main(wrong) == 2  # every key is read before the data, or the tokenizer, is missed
    assert missing.lstrip("-") in capsys.readouterr().err


def test_the_installed_command_leaves_the_other_processes_at_its_end(monkeypatch, tmp_path, capsys):
    """Torch's threads that live when Python ends may abort the process after all its work is done."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        monkeypatch.setattr(sys, "argv", ["dualtoken", "--version"])
        with pytest.raises(SystemExit, match="0"):
            run()
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
