"""Imports go down only: cli, app, paper -> training, eval, analysis -> mllm -> generation -> tokenizer -> core."""

import ast
from pathlib import Path

import dualtoken

ROOT = Path(dualtoken.__file__).parent
LEVEL = {"core": 0, "data": 1, "tokenizer": 1, "generation": 2, "mllm": 3, "training": 4, "eval": 4, "analysis": 4}
LEVEL |= {"app": 5, "paper": 5, "cli": 5}
APART = {("data", "tokenizer"), ("tokenizer", "data")}  # neither knows the other


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[1] for name in names if name.startswith("dualtoken."))


def test_imports_go_down_only():
    files = [f for f in ROOT.rglob("*.py") if f.parent != ROOT or f.name == "cli.py"]
    assert len(files) > 30
    up = []
    for file in files:
        part = file.relative_to(ROOT).parts[0].removesuffix(".py")
        up += [(file.name, n) for n in imports(file) if LEVEL[n] > LEVEL[part] or (part, n) in APART]
    assert up == []


def test_nothing_reads_outside_the_project_or_unpickles():
    for file in [*ROOT.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]:
        text = file.read_text()
        assert "../shared" not in text.replace('"../shared" not in text', "")
        if file.is_relative_to(ROOT):
            assert "pickle" not in text.lower() or "import pickle" not in text
            assert text.count("torch.load(") == text.count("weights_only=True")
