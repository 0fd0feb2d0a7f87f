"""One table or figure: what it is made with, what comes out, and how that is written down.

Measured numbers and the paper's stand in columns of their own and are never mixed; every file says its scale.
"""

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from dualtoken.core.errors import UserError
from dualtoken.eval.report import cell, write_json
from dualtoken.mllm.presets import mllm_directory
from dualtoken.tokenizer.presets import tokenizer_directory

Scale = Literal["mini", "full"]
SPREAD = " sd"  # ends the name of a standard deviation over seeds, which stands beside its measure
BUDGET = 30.0  # minutes of a table for which the steps of the miniatures are meant


@dataclass(frozen=True)
class Setting:
    """What an experiment is made with.

    Args:
        data: pictures that are measured on: a folder or shards; None = unseen scenes (mini only).
        train_data: other pictures, to train on; None = scenes (mini only).
        weights: what is measured (see `needs` of the experiment); None = the bundled miniature (mini only).
        encoder: the image-text encoder that a tokenizer started from.
        pictures: how many pictures at most; None = the experiment's own number.
        budget: minutes of a table; trains every part for `budget / BUDGET` of its steps (mini only).
        parts: folder of trained parts; None = in `out`.
        inception: torch-fidelity's Inception weights, for rFID.
        baseline: what the paper compares the weights with, where it is a model of its own.
        flickr8k: folder of Flickr8k, for retrieval.
        scores: model -> report of `dualtoken eval scores`, for tables of the benchmarks' own tools (`paper/scored.py`).
        skipped, protocol: pictures that could not be read, and how it was measured; filled while an experiment runs.
    """

    scale: Scale = "mini"
    out: Path = Path("reproduced")
    data: str | None = None
    train_data: str | None = None
    weights: str | None = None
    encoder: str | None = None
    pictures: int | None = None
    seed: int = 0
    budget: float = BUDGET
    parts: Path | None = None
    inception: str | None = None
    baseline: str | None = None
    flickr8k: str | None = None
    scores: dict[str, str] | None = None
    skipped: list[str] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Pictures that are measured on."""
        return self.data or "scenes"

    @property
    def train_source(self) -> str:
        """Pictures that are trained on, never those that are measured on."""
        return self.train_data or "scenes"

    @property
    def asked(self) -> dict[str, Any]:
        """All that a result depends on but the seed and the code, as ID.json has it."""
        return {
            "scale": self.scale, "model": self.model, "data": self.source, "train_data": self.train_source,
            "encoder": self.encoder, "at_most": self.pictures, "inception": self.inception, "budget": self.budget,
            "baseline": self.baseline, "flickr8k": self.flickr8k,
            "scores": {name: [file, _digest(file)] for name, file in (self.scores or {}).items()},
        }  # fmt: skip

    @property
    def model(self) -> str:
        return self.weights or "mini"

    def count(self, mini: int, full: int) -> int:
        """How many pictures."""
        return self.pictures or (mini if self.scale == "mini" else full)

    def steps(self, mini: int) -> int:
        """Steps of a part of the miniature within the budget, at least 2."""
        return max(2, round(mini * self.budget / BUDGET))

    @property
    def cache(self) -> Path:
        """Folder of trained parts."""
        return (self.parts or self.out / "parts").resolve()


@dataclass
class Row:
    """A line of the result. paper: what the paper prints for it, where it has such a line."""

    name: str
    measured: dict[str, Any]
    paper: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What an experiment found.

    Args: findings: what follows, in sentences; pictures: file name -> caption; parts: name of each trained part ->
        minutes of its training; seeds: where several were used.
    """

    rows: list[Row]
    findings: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """A table or figure as data.

    Args:
        claim: what the paper says of it, in our words.
        make: does the work; pictures are written into `Setting.out`.
        minutes: of the miniature on two cores, about.
        needs: options that full scale needs: "data", "train_data", "weights", "encoder", "baseline", "scores".
        wants: which data and weights these are in the paper.
        full: does the work at full scale, where `make` is for the miniature alone.
        multimodal: whether `Setting.weights` is a multimodal model here; else it is a tokenizer.
        models: names that `Setting.scores` may have.
        package: that it imports beside the usual ones; an extra of the same name installs it.
    """

    title: str
    claim: str
    make: Callable[[Setting], Result]
    minutes: float
    needs: tuple[str, ...]
    wants: str
    full: Callable[[Setting], Result] | None = None
    multimodal: bool = False
    models: tuple[str, ...] = ()
    package: str | None = None

    def missing(self, setting: Setting) -> list[str]:
        """What is not at hand: options of full scale that are not given, and the package."""
        options = [f"--{name}" for name in self.needs if setting.scale == "full" and getattr(setting, name) is None]
        absent = self.package is not None and find_spec(self.package) is None
        return options + ([f"extra {self.package}"] if absent else [])

    def check(self, id: str, setting: Setting) -> None:
        """Raise UserError where full scale lacks something, the installation a package, or models are of another kind.

        Before any work.
        """
        directory = mllm_directory if self.multimodal else tokenizer_directory
        for option, model in (("--weights", setting.weights), ("--baseline", setting.baseline)):
            if model is not None:
                directory(model, option)
        options = ", ".join(name for name in self.missing(setting) if name.startswith("--"))
        if options:
            raise UserError(f"reproduce {id} --scale full needs {options}: {self.wants}")
        if self.missing(setting):
            raise UserError(
                f"{id} needs the extra `{self.package}`: pip install 'dualtoken[{self.package}]', "
                f"or in a checkout uv run --extra {self.package} dualtoken reproduce"
            )
        unknown = [name for name in setting.scores or {} if self.models and name not in self.models]
        if unknown and setting.scale == "full":
            raise UserError(
                f"--scores {unknown[0]}=...: {id} has no model of that name; it has {', '.join(self.models)}"
            )


def run(id: str, experiment: Experiment, setting: Setting) -> Path:
    """Make an experiment and write ID.json, ID.md and its pictures into `setting.out`; returns the JSON file."""
    experiment.check(id, setting)
    setting.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    setting.skipped.clear()
    setting.protocol.clear()
    make = experiment.full if setting.scale == "full" and experiment.full else experiment.make
    result = make(setting)
    found = {
        "id": id, "title": experiment.title, "claim": experiment.claim, **setting.asked,
        "seeds": result.seeds or [setting.seed], "commit": commit() or metadata.version("dualtoken"),
        "hardware": hardware(), "minutes": round((time.time() - start) / 60, 2), "parts": result.parts,
        "findings": result.findings,
        "pictures": result.pictures, "skipped": sorted(set(setting.skipped)), "protocol": setting.protocol,
        "rows": [asdict(row) | {"scale": setting.scale} for row in result.rows],
    }  # fmt: skip
    (setting.out / f"{id}.md").write_text(page(found))
    place = setting.out / f"{id}.json"
    write_json(place, found)
    return place


def page(found: dict[str, Any]) -> str:
    """What ID.json holds as Markdown."""
    scale = "miniature" if found["scale"] == "mini" else "full scale"
    columns = columns_of(found["rows"])
    names = ["", *(f"{key} ({scale if side == 'measured' else side})" for side, key in columns)]
    lines = [f"# {found['title']}, {scale}", "", f"The paper: {found['claim']}", ""]
    lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in found["rows"]:
        lines.append(f"| {' | '.join([row['name'], *(shown(row[side], key) for side, key in columns)])} |")
    lines += ["", *(f"- {finding}" for finding in found["findings"]), ""]
    lines += [f"![{caption}]({name})\n\n{caption}\n" for name, caption in found["pictures"].items()]
    lines += [f"- {name}: {how}" for name, how in found.get("protocol", {}).items()]
    lines += [""] if found.get("protocol") else []
    if found.get("skipped"):
        lines.append(f"{len(found['skipped'])} pictures could not be read, the first: {found['skipped'][0]}\n")
    told = f"Model {found['model']}, data {found['data']}, seeds {found['seeds']}, "
    told += f"commit {found['commit'] or 'unknown'}"
    if found["parts"]:
        trained = f"{len(found['parts'])} trained parts, {sum(found['parts'].values()):.1f} minutes of training in all"
        told += f", {trained} (budget {found['budget']:g})"
    lines.append(
        f"{told}, {found['hardware']}, {found['minutes']} minutes this time: `dualtoken reproduce {found['id']}`."
    )
    return "\n".join(lines) + "\n"


def columns_of(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """("measured" or "paper", measure) of every column; a deviation has none of its own, see `shown`."""
    return [
        (side, key) for side in ("measured", "paper")
        for key in dict.fromkeys(key for row in rows for key in row[side]) if not key.endswith(SPREAD)
    ]  # fmt: skip


def shown(values: dict[str, Any], key: str) -> str:
    """A measure as text, over several seeds with its standard deviation: "14.49 ± 0.6"."""
    spread = values.get(key + SPREAD)
    return cell(values.get(key)) + (f" ± {float(f'{spread:.2g}'):g}" if spread is not None else "")


def finished(place: Path, setting: Setting) -> bool:
    """True where a file holds what this setting would make, at this commit or, installed, of this version."""
    try:
        found = json.loads(place.read_text())
    except (OSError, ValueError):
        return False
    version = commit() or metadata.version("dualtoken")
    same = all(found.get(key) == value for key, value in setting.asked.items()) and found["seeds"][0] == setting.seed
    return same and found.get("commit") == version


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]


def commit() -> str | None:
    """The commit of the checkout, with a plus where it was changed; None for an installed package."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None


def hardware() -> str:
    """The accelerator, or the processor with its threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"
