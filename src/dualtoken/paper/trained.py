"""Trained parts of an experiment: each is made once, kept under the hash of its recipe, and shared by all tables.

A part is a run of a training command in a folder of its own, so one that was interrupted goes on where it stopped.
Two processes with one folder of parts share the work: each leaves alone what the other is training.
"""

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm

from dualtoken.core.files import whole_or_not_at_all
from dualtoken.data.scene_chat import SceneChatConfig, SceneChats
from dualtoken.paper.experiment import Setting, version
from dualtoken.paper.side_by_side import helpers
from dualtoken.tokenizer.presets import BUNDLED, RECIPES, open_tokenizer
from dualtoken.training.encoder import train_encoder
from dualtoken.training.loop import LoopConfig
from dualtoken.training.mllm import train_mllm
from dualtoken.training.stored_codes import store_codes
from dualtoken.training.tokenizer import train_tokenizer

COMMANDS: dict[str, Callable[..., Any]] = {
    "train-encoder": train_encoder,
    "train-tokenizer": train_tokenizer,
    "train-mllm": train_mllm,
}
OPENS = {"encoder": "encoder", "vision_tokenizer": "tokenizer", "start": "mllm"}  # option -> part of a preset
ASIDE = ("output", "loop")  # what a recipe says of these changes nothing that is learnt, but for
LEARNT = ("precision", "accumulate")  # of the loop
DONE, WAIT = "done.json", 5.0


@dataclass(frozen=True)
class Part:
    """A model that has to be trained.

    Args:
        command: of `COMMANDS`.
        recipe: one of the package, by name.
        changes: in place of what the recipe says; nested as it is.
        models: option -> the part whose model it takes.
    """

    command: str
    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    models: dict[str, "Part"] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """The recipe with its changes, without the models of other parts."""
        written = yaml.safe_load((RECIPES / f"{self.recipe}.yaml").read_text(encoding="utf-8"))
        return merge(written, self.changes)

    @property
    def key(self) -> str:
        """12 hex digits over all that the trained weights depend on but the code."""
        whole, usual = self.content(), vars(LoopConfig())
        content = {name: value for name, value in whole.items() if name not in ASIDE}
        for option in OPENS:
            if content.get(option):
                content[option] = identity(option, content[option])
        if learnt := {k: v for k, v in whole.get("loop", {}).items() if k in LEARNT and v not in (usual[k], False)}:
            content["loop"] = learnt  # YAML reads `precision: no` as False
        content |= {option: part.key for option, part in self.models.items()}
        if "data" in content:  # where codes are kept, and how many processes read
            content["data"] = {k: v for k, v in content["data"].items() if k not in ("codes", "workers")}
        return digest([self.command, content])

    def folder(self, setting: Setting) -> Path:
        """Where it is, or will be."""
        return setting.cache / f"{self.command.removeprefix('train-')}-{self.key}"

    def model(self, setting: Setting) -> Path:
        """Directory of its model."""
        folder = self.folder(setting)
        if self.command == "train-mllm":
            folder = folder / f"stage-{list(self.content()['recipe'])[-1]}"
        return folder / "model"


def train_parts(parts: Sequence[Part], setting: Setting) -> list[Path]:
    """Directories of the parts' models, in order; what is not there yet is trained, `setting.processes` at a time."""
    waiting = list({part.key: part for part in parts}.values())
    missing = [part for part in waiting if not (part.folder(setting) / DONE).is_file()]
    beside = helpers(_train_here, missing[::-1], setting, max(0, min(setting.processes, len(missing)) - 1))
    with tqdm(total=len(waiting), desc="parts", unit="", disable=len(waiting) < 2) as bar, beside:
        while waiting:
            busy = [part for part in waiting if not _train(part, setting)]
            bar.update(len(waiting) - len(busy))
            if len(busy) == len(waiting):
                time.sleep(WAIT)
            waiting = busy
    return [part.model(setting) for part in parts]


def _train_here(parts: Sequence[Part], setting: Setting) -> None:
    train_parts(parts, replace(setting, processes=1))


def minutes(parts: Sequence[Part], setting: Setting) -> dict[str, float]:
    """Folder of each trained part, and of those that it is made of -> minutes of the training."""
    found: dict[str, float] = {}
    for part in parts:
        found |= minutes(list(part.models.values()), setting)
        folder = part.folder(setting)
        told = json.loads((folder / DONE).read_text())
        found[folder.name] = told["minutes"]
        if "commit" in told:  # parts of before have none
            setting.made.add(told["commit"])
    return found


def remembered(place: Path, setting: Setting, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before and is kept in a JSON file, or is measured now; its commit goes to `setting.made`."""
    with FileLock(f"{place}.lock"):  # another process that wants the same waits for it
        if stale(place, setting):
            kept = {"commit": setting.code or version(), "at": time.time(), "found": make()}
            with whole_or_not_at_all(place) as draft:
                draft.write_text(json.dumps(kept, indent=1))
    kept = json.loads(place.read_text())
    if "found" not in kept:  # as it was kept before commits were
        return kept
    setting.made.add(kept["commit"])
    return kept["found"]


def stale(place: Path, setting: Setting) -> bool:
    """Whether what a file keeps has to be measured: it is not there, or was before a run with `again`."""
    return not place.is_file() or (setting.again and json.loads(place.read_text()).get("at", 0.0) < setting.since)


def merge(written: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `written`, level by level; anything but a dict is replaced whole."""
    merged = dict(written)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def identity(option: str, model: str) -> str:
    """What stands for a model in a hash: its weights, or its name where they are no file of ours."""
    place = BUNDLED[model] / OPENS[option] if model in BUNDLED else Path(model)
    weights = place / "model.safetensors"
    if not weights.is_file():
        return model
    with open(weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def digest(content: Any) -> str:
    """12 hex digits over plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _train(part: Part, setting: Setting) -> bool:
    """Train a part unless it is there; False where another process is at it."""
    folder = part.folder(setting)
    if (folder / DONE).is_file():
        return True
    needed = train_parts(list(part.models.values()), replace(setting, processes=1))
    models = dict(zip(part.models, needed, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        if not (folder / DONE).is_file():
            _run(part, folder, models, setting)
    finally:
        lock.release()
    return True


def _run(part: Part, folder: Path, models: dict[str, Path], setting: Setting) -> None:
    """The training command in the part's folder; its states are removed when it is done."""
    start, code = time.time(), setting.code or version()
    content = part.content() | {name: str(path) for name, path in models.items()} | {"output": str(folder)}
    if part.command == "train-mllm":
        content["data"] = content["data"] | {"codes": str(_codes(content, setting))}
    parser = _parser(part.command)
    print(f"training {folder.name}")
    parsed = parser.parse_object(copy.deepcopy(content))  # it changes what it is given
    COMMANDS[part.command](**parser.instantiate(parsed).as_dict())
    told = {
        "minutes": round((time.time() - start) / 60, 3),
        "commit": code,
        "command": part.command,
        "content": content,
    }
    with whole_or_not_at_all(folder / DONE) as draft:
        draft.write_text(json.dumps(told, indent=1))
    for states in folder.rglob("states"):
        shutil.rmtree(states)


@lru_cache
def _parser(command: str) -> Any:
    import jsonargparse  # as the command line reads recipes

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(COMMANDS[command], as_positional=False, sub_configs=True)
    return parser


def _codes(content: dict[str, Any], setting: Setting) -> Path:
    """Folder with the codes of the run's scenes, shared by all runs with that tokenizer and pool."""
    scenes, tokenizer = content["data"]["scenes"], content["vision_tokenizer"]
    folder = setting.cache / f"codes-{digest([identity('vision_tokenizer', tokenizer), scenes])}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        opened = open_tokenizer(tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
        store_codes(opened, SceneChats(SceneChatConfig(**scenes)).pictures(), folder)
    return folder
