"""One table or figure: what it is made with, what comes out, and how that is written down.

Measured numbers and the paper's stand in columns of their own and are never mixed; every file says its scale.
"""

import json
import platform
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from dualtoken.core.errors import UserError
from dualtoken.core.files import whole_or_not_at_all
from dualtoken.data.tar_shards import find_shards
from dualtoken.eval.report import cell, write_json
from dualtoken.mllm.presets import mllm_directory
from dualtoken.tokenizer.presets import tokenizer_directory

Scale = Literal["mini", "full"]
OPTIONS = ("data", "train_data", "weights", "encoder", "baseline", "inception", "lpips", "flickr8k", "scores")
SPREAD = " sd"  # ends the name of a standard deviation over seeds, which stands beside its measure
NAMES = {"mini": "miniature", "full": "full scale", "paper": "paper"}  # whose numbers a column has
PERCENT = ("zero_shot", "text_to_image", "image_to_text", "tokenizer zero_shot", "questions", "commonest answer")
UNITS = {"psnr": "dB", "tokenizer psnr": "dB", **dict.fromkeys(PERCENT, "%")}
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
        lpips: torchvision's VGG-16 weights, for LPIPS in the tokenizers that are trained (full only).
        baseline: what the paper compares the weights with, where it is a model of its own.
        flickr8k: folder of Flickr8k, for retrieval.
        scores: model -> report of `dualtoken eval scores`, for tables of the benchmarks' own tools (`paper/scored.py`).
        again: nothing that was measured before is taken.
        processes: that train parts, each with its share of the cores (mini only).
        skipped, protocol, made: pictures that could not be read, how it was measured, and the commits of trained parts
            and measures that were there before; filled while an experiment runs.
        since: when the run began, in seconds of the clock: what was measured later is taken also with `again`.
        code: the version that runs, whatever becomes of the files meanwhile; None before an experiment begins.
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
    lpips: str | None = None
    baseline: str | None = None
    flickr8k: str | None = None
    scores: dict[str, str] | None = None
    again: bool = False
    processes: int = 1
    skipped: list[str] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    since: float = field(default_factory=time.time)
    code: str | None = None

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
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        files = [file for value in given.values() for file in (value.values() if isinstance(value, dict) else [value])]
        asked = {"scale": self.scale, "at_most": self.pictures, "options": given, "stamps": [*map(stamp, files)]}
        return asked | ({"budget": self.budget} if self.scale == "mini" else {})

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
    """A line of the result.

    Args: paper: what the paper prints for it, where it has such a line; scale: of what is measured, where that is not
        the experiment's, as for what is counted at full size.
    """

    name: str
    measured: dict[str, Any]
    paper: dict[str, Any] = field(default_factory=dict)
    scale: Scale | None = None


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
        minutes: of the miniature on two cores where nothing is trained yet, about.
        needs: of `OPTIONS`, what full scale needs.
        wants: which data and weights these are in the paper.
        also, mini: of `OPTIONS`, what full scale takes too, and what the miniature takes.
        ready: raises UserError where what is given does not do, before long work; of the way of full scale alone where
            that has one of its own (`full`).
        full: does the work at full scale, where `make` is for the miniature alone.
        multimodal: whether `Setting.weights` is a multimodal model here; else it is a tokenizer.
        models: names that `Setting.scores` may have.
        package: that it imports beside the usual ones; an extra of the same name installs it.
        alone: whether it measures times, which another table at work beside it would spoil.
    """

    title: str
    claim: str
    make: Callable[[Setting], Result]
    minutes: float
    needs: tuple[str, ...]
    wants: str
    also: tuple[str, ...] = ()
    mini: tuple[str, ...] = ()
    ready: Callable[[Setting], None] | None = None
    full: Callable[[Setting], Result] | None = None
    multimodal: bool = False
    models: tuple[str, ...] = ()
    package: str | None = None
    alone: bool = False

    def own(self, setting: Setting) -> Setting:
        """The setting without what the experiment does not take; of the reports, those of its models."""
        takes = self.needs + self.also if setting.scale == "full" else self.mini
        changes: dict[str, Any] = {name: None for name in OPTIONS if name not in takes}
        if "scores" in takes and setting.scores:
            changes["scores"] = {n: file for n, file in setting.scores.items() if n in self.models} or None
        return replace(setting, **changes)

    def refuse(self, id: str, setting: Setting) -> None:
        """Raise UserError for options that the experiment does not take."""
        own, scale = self.own(setting), "at full scale" if setting.scale == "full" else "in miniature"
        for name in OPTIONS:
            given, taken = getattr(setting, name), getattr(own, name)
            if given is None or given == taken:
                continue
            if name == "scores" and self.models and setting.scale == "full":
                unknown = next(model for model in given if model not in self.models)
                known = ", ".join(self.models)
                raise UserError(f"--scores {unknown}=...: {id} has no model of that name; it has {known}")
            raise UserError(f"--{name} {given}: reproduce {id} does not take it {scale}")

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
        if self.ready is not None and (setting.scale == "full" or self.full is None):
            self.ready(setting)


def run(id: str, experiment: Experiment, setting: Setting) -> Path:
    """Make an experiment and write ID.json, ID.md and its pictures into `setting.out`; returns the JSON file.

    `experiment.check` has passed.
    """
    setting.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    setting.skipped.clear()
    setting.protocol.clear()
    setting.made.clear()
    setting = replace(setting, code=version())
    asked = setting.asked  # with the stamps of what is measured from now on
    make = experiment.full if setting.scale == "full" and experiment.full else experiment.make
    result = make(setting)
    found = {
        "id": id, "title": experiment.title, "claim": experiment.claim, **asked,
        "seeds": result.seeds or [setting.seed], "commit": setting.code,
        "made_at": sorted(setting.made), "hardware": hardware(), "minutes": round((time.time() - start) / 60, 2),
        "parts": result.parts, "findings": result.findings,
        "pictures": result.pictures, "skipped": sorted(set(setting.skipped)), "protocol": setting.protocol,
        "rows": [asdict(row) | {"scale": row.scale or setting.scale} for row in result.rows],
    }  # fmt: skip
    with whole_or_not_at_all(setting.out / f"{id}.md") as draft:
        draft.write_text(page(found))
    place = setting.out / f"{id}.json"
    write_json(place, found)
    return place


def page(found: dict[str, Any]) -> str:
    """What ID.json holds as Markdown."""
    columns = columns_of(found["rows"])
    names = ["", *(column_title(side, key) for side, key in columns)]
    lines = [f"# {found['title']}, {NAMES[found['scale']]}", "", f"The paper: {found['claim']}", ""]
    lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in found["rows"]:
        lines.append(f"| {' | '.join([row['name'], *(shown(values_of(row, side), key) for side, key in columns)])} |")
    lines += ["", *(f"- {finding}" for finding in found["findings"]), ""]
    lines += [f"![{caption}]({name})\n\n{caption}\n" for name, caption in found["pictures"].items()]
    lines += [f"- {name}: {how}" for name, how in found.get("protocol", {}).items()]
    lines += [""] if found.get("protocol") else []
    if found.get("skipped"):
        lines.append(f"{len(found['skipped'])} pictures could not be read, the first: {found['skipped'][0]}\n")
    told = f"Seeds {found['seeds']}, commit {found['commit'] or 'unknown'}"
    if earlier := [one for one in found.get("made_at", []) if one != found["commit"]]:
        told += f" (parts and measures kept from {', '.join(earlier)})"
    if found["parts"]:
        trained = f"{len(found['parts'])} trained parts, {sum(found['parts'].values()):.1f} minutes of training in all"
        told += f", {trained}" + (f" (budget {found['budget']:g})" if "budget" in found else "")
    lines.append(f"{told}, {found['hardware']}, {found['minutes']} minutes this time: `{command_of(found)}`.")
    return "\n".join(lines) + "\n"


def command_of(found: dict[str, Any]) -> str:
    """What makes a result anew."""
    words = ["dualtoken reproduce", found["id"], *(["--scale full"] if found["scale"] == "full" else [])]
    changed = (
        ("seed", found.get("seeds", [0])[0], 0),
        ("pictures", found.get("at_most"), None),
        ("budget", found.get("budget", BUDGET), BUDGET),
    )
    words += [f"--{name} {str(value).removesuffix('.0')}" for name, value, usual in changed if value != usual]
    for name, value in found.get("options", {}).items():
        listed = ",".join(f"{n}={file}" for n, file in value.items()) if isinstance(value, dict) else value
        words.append(f"--{name} {shlex.quote(str(listed))}")
    return " ".join(words)


def columns_of(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(side of `NAMES`, measure) of every column; a deviation has none of its own, see `shown`."""
    return [
        (side, key) for side in NAMES
        for key in dict.fromkeys(key for row in rows for key in values_of(row, side)) if not key.endswith(SPREAD)
    ]  # fmt: skip


def column_title(side: str, key: str) -> str:
    """A measure with its unit, where it has one, and whose it is: "psnr, dB (miniature)"."""
    return f"{key}{', ' if key in UNITS else ''}{UNITS.get(key, '')} ({NAMES[side]})"


def values_of(row: dict[str, Any], side: str) -> dict[str, Any]:
    """What a row has for the columns of a side."""
    return row["paper"] if side == "paper" else row["measured"] if row["scale"] == side else {}


def shown(values: dict[str, Any], key: str) -> str:
    """A measure as text, over several seeds with its standard deviation: "14.49 ± 0.6"."""
    value, spread = values.get(key), values.get(key + SPREAD)
    large = isinstance(value, float) and abs(value) >= 1000  # the paper has 1492.9 points
    return (f"{value:.1f}" if large else cell(value)) + (f" ± {float(f'{spread:.2g}'):g}" if spread is not None else "")


def finished(place: Path, setting: Setting) -> bool:
    """True where a file holds what this setting would make, at this commit or, installed, of this version."""
    try:
        found = json.loads(place.read_text())
    except (OSError, ValueError):
        return False
    same = all(found.get(key) == value for key, value in setting.asked.items()) and found["seeds"][0] == setting.seed
    same = same and all((place.parent / picture).is_file() for picture in found["pictures"])
    return same and found.get("commit") == version() and not version().endswith("+")  # changed files have no name


def stamp(path: str) -> list[int]:
    """Number of files, bytes and latest change of a file, a folder or shards by pattern; all 0 for anything else.

    So a folder with one more picture, or a model trained anew, is another one.
    """
    place = Path(path)
    try:
        found = place.rglob("*") if place.is_dir() else [place] if place.exists() else find_shards(path, "").values()
    except UserError:  # a pattern that nothing fits
        found = []
    files = [one.stat() for one in found if one.is_file()]
    return [len(files), sum(one.st_size for one in files), max((one.st_mtime_ns for one in files), default=0)]


def commit() -> str | None:
    """The commit of the checkout, with a plus where it was changed; None for a package that is not part of one."""
    asked = ["ls-files", "--error-unmatch", Path(__file__).name], ["describe", "--always", "--dirty=+", "--exclude=*"]
    said = ""
    for words in asked:
        try:
            done = subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        said = done.stdout.strip()
    return said or None


def version() -> str:
    """The commit, of an installed package its version."""
    return commit() or metadata.version("dualtoken")


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
