"""Models as directories: `config.json` and `model.safetensors`, loaded strictly or not at all."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dualtoken.core.errors import UserError


class StrictModel(PreTrainedModel):
    """A transformers model whose `from_pretrained` takes local directories, float32 and nothing missing."""

    def _init_weights(self, module: nn.Module) -> None:
        # Modules initialise themselves; what is not stored (rotary tables of timm) is computed again after loading.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    @classmethod
    def from_pretrained(cls, directory: str | Path, *args, dtype: torch.dtype | str = torch.float32, **options):
        """Load from a directory, in evaluation mode.

        Raises UserError for a directory without a model, another kind of model, or weights that do not fit.
        """
        check_directory(directory, "model directory")
        wants_info = options.pop("output_loading_info", False)
        options |= {"output_loading_info": True, "use_safetensors": True, "local_files_only": True}
        try:
            model, info = super().from_pretrained(directory, *args, dtype=dtype, **options)
        except (RuntimeError, OSError) as error:
            line = str(error).strip().splitlines()[-1]
            raise UserError(f"{directory}: weights do not fit config.json ({line})") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                names = ", ".join(str(key) for key in sorted(info[kind])[:3])
                raise UserError(f"{directory}: {kind.replace('_', ' ')} in model.safetensors: {names}")
        return (model, info) if wants_info else model


def check_directory(directory: str | Path, option: str, kind: str | None = None) -> Path:
    """The directory, if it holds a model of `kind` (the config's model_type). Raises UserError otherwise."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{option} {directory}: no such directory")
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise UserError(f"{option} {directory}: no {name} in it; give a directory written by save_pretrained")
    if kind is not None:
        import json

        found = json.loads((directory / "config.json").read_text()).get("model_type")
        if found != kind:
            raise UserError(f"{option} {directory}: holds a {found!r} model, {kind!r} is needed")
    return directory


def load_torch_file(path: str | Path, option: str, what: str) -> Any:
    """What a `.pt` or `.pth` file holds, tensors and plain containers only; nothing is unpickled.

    Args: what: whose file it should be, for the errors. Raises UserError for a missing file or another content.
    """
    if not Path(path).is_file():
        raise UserError(f"{option} {path}: no such file; it is published as {what}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{option} {path}: not {what} ({str(error).strip().splitlines()[0][:120]})") from None
