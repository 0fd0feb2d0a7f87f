"""The documentation holds: its Python runs, its commands exist, its site builds, its notebooks run."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dualtoken.cli import COMMANDS, RECIPES, Command, main
from dualtoken.data.scenes import scene

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def fenced(page, language):
    """Code blocks of a language, in order."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.S | re.M)  # opened and closed in turn
    return [code for name, code in blocks if name == language]


# serve.md's Python calls a running server: tests/app/test_server.py has one.
PYTHON = [p for p in PAGES if fenced(p, "python") and p.name != "serve.md"]


@pytest.mark.parametrize("page", PYTHON, ids=lambda p: p.name)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.jpg", "b.png", "my.png", "my.jpg")):
        Image.fromarray(scene(number, "test").render(64)).save(name)
    names = {}
    for block in fenced(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_commands_with_the_bundled_model_run_one_after_the_other(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scene(0, "test").render(64)).save("my.png")
    blocks = fenced(ROOT / name, "") + fenced(ROOT / name, "console")
    (block,) = [block for block in blocks if "dualtoken draw" in block and "dualtoken edit" in block]
    for line in block.splitlines():
        _, *words = shlex.split(line, comments=True)
        if words != ["chat", "--image", "my.png"]:  # a conversation
            assert main(words) == 0, line


def commands():
    """(page, words) of every line of the pages that calls dualtoken."""
    for page in PAGES:
        blocks = fenced(page, "console") + fenced(page, "")
        for line in "".join(blocks).splitlines():
            found = re.search(r"(?:^|uv run |/|which )dualtoken\)? ([\w-].*)", line.split("  #")[0])
            if found and not line.startswith(("from", "import")):
                yield page.name, found[1].split()


@pytest.mark.parametrize(("page", "words"), list(commands()), ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_commands_of_the_pages_exist(page, words):
    table, left = COMMANDS, list(words)
    while not isinstance(table, Command):
        assert left and left[0] in table, f"{page}: no command {' '.join(words)}"
        table = table[left.pop(0)]
    for option, value in itertools.pairwise(left):
        if option == "--config" and not value.endswith(".yaml"):
            assert (RECIPES / f"{value}.yaml").is_file(), f"{page}: no recipe {value}"


def test_the_pages_have_commands_to_check():
    assert len(list(commands())) > 30


def test_the_site_builds_without_a_warning_and_asks_nobody_else(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site/api/assistant.html").read_text()
    assert "Answers, draws, edits and tells stories with one model" in page
    loaded = re.findall(r'<(?:link|script|img)[^>]*?(?:src|href)="(https?:[^"]*)"', page)
    assert loaded == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="the extra notebooks is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the extra notebooks is not installed")
    pytest.importorskip("ipykernel", reason="the extra notebooks is not installed")
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "stored without outputs"
    made = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    assert len(code) >= 4 and all(cell.outputs for cell in code[-2:])


def test_there_are_three_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["layers", "mllm", "tokenizer"]
