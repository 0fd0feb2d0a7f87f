"""State of a training run on disk: a nested dict in, the same dict out, never a half-written one.

A state is a folder `step-00001200` with `state.safetensors` (tensors) and `state.json` (everything else, with
places for the tensors). It is written beside its place and renamed once complete, so a kill at any moment leaves
the last state whole. Nothing is pickled.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dualtoken.core.errors import UserError


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `state` (dicts, lists, numbers, strings, None and tensors, nested) and keep the newest `keep`."""
    place = folder / f"step-{step:08d}"
    draft = folder / f".{place.name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    tree = _flatten(state, "", tensors)
    save_file(tensors, draft / "state.safetensors")
    size = (draft / "state.safetensors").stat().st_size
    (draft / "state.json").write_text(json.dumps({"step": step, "bytes": size, "tree": tree}))
    for name in ("state.safetensors", "state.json"):
        with open(draft / name, "rb") as written:
            os.fsync(written.fileno())
    if place.exists():
        shutil.rmtree(place)
    draft.rename(place)
    for old in _states(folder)[:-keep]:
        shutil.rmtree(old)
    for left in folder.glob(".step-*"):  # drafts of killed runs
        shutil.rmtree(left, ignore_errors=True)
    return place


def load_state(place: Path) -> dict[str, Any]:
    """The dict that was saved. Raises UserError where the folder is damaged."""
    try:
        head = json.loads((place / "state.json").read_text())
        if (place / "state.safetensors").stat().st_size != head["bytes"]:
            raise UserError(f"{place}: state.safetensors has the wrong size")
        return _unflatten(head["tree"], load_file(place / "state.safetensors"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{place}: damaged state ({error}); remove this folder to go on from the one before") from None


def latest_state(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest state that is whole, with its folder; a damaged one is passed over. None where there is none."""
    for place in reversed(_states(folder)):
        try:
            return place, load_state(place)
        except UserError as error:
            print(f"passed over: {error}")
    return None


def _states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A JSON tree in which dicts are lists of pairs (keys may be numbers) and tensors are names."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _flatten(part, f"{name}/{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_flatten(part, f"{name}/{i}", tensors) for i, part in enumerate(value)]}
    return value


def _unflatten(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    (kind, value), *_ = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "list":
        return [_unflatten(part, tensors) for part in value]
    return {key: _unflatten(part, tensors) for key, part in value}
