"""State of a training run on disk: a nested dict in, the same dict out, never a half-written one.

A state is a folder `step-00001200` with `state.safetensors` (tensors) and `state.json` (everything else, with
places for the tensors). It is written beside its place and renamed once complete, so a kill at any moment leaves
the last state whole. Nothing is pickled.

A run whose weights are split over processes (`training/sharded.py`) adds `shard-*.safetensors`, in which torch's
distributed checkpoint keeps every process's pieces of the tensors that are not in `state.safetensors`.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dualtoken.core.errors import UserError


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `state` (dicts, lists, numbers, strings, None and tensors, nested) and keep the newest `keep`.

    Raises OSError, and leaves what is there as it is, where the disk is full.
    """
    draft = start_draft(folder, step, str(os.getpid()))
    tree, tensors = flatten(state)
    return finish_draft(draft, step, tree, tensors, keep)


def start_draft(folder: Path, step: int, mark: str) -> Path:
    """An empty folder for a state to be written in."""
    draft = folder / f".step-{step:08d}.{mark}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def finish_draft(draft: Path, step: int, tree: Any, tensors: dict[str, torch.Tensor], keep: int) -> Path:
    """Write tensors and tree beside the shards that may be in the draft, and make it the newest of `keep` states."""
    folder = draft.parent
    place = folder / f"step-{step:08d}"
    try:
        with disk_errors():
            own = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}  # shared memory is refused
            save_file(own, draft / "state.safetensors")
        sizes = {file.name: file.stat().st_size for file in draft.glob("*.safetensors")}
        head = {"step": step, "bytes": sizes.pop("state.safetensors"), "shards": sizes, "tree": tree}
        (draft / "state.json").write_text(json.dumps(head))
        for name in ("state.safetensors", "state.json"):
            _sync(draft / name)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if place.exists():
        shutil.rmtree(place)
    draft.rename(place)
    _sync(folder)
    # States after this one are damaged, or this run would have gone on from them: they must not crowd out whole ones.
    states = _states(folder)
    at = states.index(place) + 1
    for old in states[: max(0, at - keep)] + states[at:]:
        shutil.rmtree(old)
    for left in folder.glob(".step-*"):  # drafts of killed runs
        shutil.rmtree(left, ignore_errors=True)
    return place


def load_state(place: Path) -> dict[str, Any]:
    """The dict that was saved, whole also where it was split. Raises UserError where the folder is damaged."""
    with readable(place) as head:
        return unflatten(head["tree"], load_file(place / "state.safetensors") | _join_shards(place, head))


@contextmanager
def readable(place: Path) -> Iterator[dict[str, Any]]:
    """The content of state.json, to read the rest by. Raises UserError for whatever is missing or damaged."""
    try:
        head = json.loads((place / "state.json").read_text())
        for name, size in {"state.safetensors": head["bytes"], **head.get("shards", {})}.items():
            if (place / name).stat().st_size != size:
                raise UserError(f"{place}: {name} has the wrong size")
        yield head
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{place}: damaged state ({error}); remove this folder to go on from the one before") from None


def latest_state(
    folder: Path, load: Callable[[Path], dict[str, Any]] = load_state
) -> tuple[Path, dict[str, Any]] | None:
    """The newest state that is whole, with its folder; a damaged one is passed over. None where there is none."""
    for place in reversed(_states(folder)):
        try:
            return place, load(place)
        except UserError as error:
            print(f"passed over: {error}")
    return None


@contextmanager
def disk_errors() -> Iterator[None]:
    """safetensors' errors of writing as the OSError that they are."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def _join_shards(place: Path, head: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The split tensors of a state, whole."""
    names: set[str] = set()
    for file in head.get("shards", {}):
        with safe_open(place / file, "pt") as shard:
            names.update(shard.keys())
    if not names:
        return {}
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    known = HuggingFaceStorageReader(str(place)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(known[name].size, dtype=known[name].properties.dtype) for name in names}
    read_shards(place, tensors)
    return tensors


def read_shards(place: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors, whole or split over processes, from a state's files; every process reads what it needs."""
    from torch.distributed import checkpoint

    reader = checkpoint.HuggingFaceStorageReader(str(place))
    try:
        checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    except (checkpoint.CheckpointException, RuntimeError) as error:
        raise ValueError(str(error).strip().splitlines()[-1]) from None


def flatten(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A JSON tree, in which dicts are lists of pairs (keys may be numbers) and tensors are names; and the tensors."""
    tensors: dict[str, torch.Tensor] = {}
    return _flatten(state, "", tensors), tensors


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _flatten(part, f"{name}/{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_flatten(part, f"{name}/{i}", tensors) for i, part in enumerate(value)]}
    return value


def unflatten(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The state of a tree and its tensors."""
    if not isinstance(tree, dict):
        return tree
    (kind, value), *_ = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "list":
        return [unflatten(part, tensors) for part in value]
    return {key: unflatten(part, tensors) for key, part in value}
