"""Pretrained image and text towers: what may be given as `--encoder`, and how each format is read.

| given | read as |
| --- | --- |
| a preset, or a directory of ours | an image-text encoder of this package |
| a directory with config.json of model_type siglip, siglip2, clip | transformers' `save_pretrained` |
| a directory with open_clip_config.json | open_clip's, with its weights and text tokenizer beside it |
| NAME=FILE | weights of the open_clip architecture NAME, in a .safetensors, .bin or .pt file |
| hf-hub:ORG/NAME | any of the directories above, fetched: the only thing that is ever fetched |

Every reader ends in the state of an `ImageTextEncoder` (`weights.py`), whose image tower is a timm model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import check_directory
from dualtoken.tokenizer import read_open_clip as open_clip
from dualtoken.tokenizer.encoder import ImageTextConfig, ImageTextEncoder, TextTokenizer, text_tokenizer
from dualtoken.tokenizer.presets import BUNDLED, encoder_directory
from dualtoken.tokenizer.read_transformers import KINDS, read_transformers
from dualtoken.tokenizer.weights import Pretrained, check, first_line

HUB = "hf-hub:"
HUB_WEIGHTS = (*open_clip.WEIGHTS, "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass
class ImageText:
    """An image-text encoder and the text tokenizer that belongs to it."""

    encoder: ImageTextEncoder
    tokenizer: TextTokenizer

    def save_pretrained(self, directory: str | Path) -> None:
        """Write both as a directory of ours, from which they are read without their first source."""
        self.encoder.save_pretrained(directory)
        if hasattr(self.tokenizer, "save_pretrained"):  # open_clip's own byte-pair tokenizer has no files
            self.tokenizer.save_pretrained(directory)


def open_image_text(source: str, option: str = "--encoder") -> ImageText:
    """The encoder and text tokenizer that `source` names, in evaluation mode; `option` is named in errors."""
    found = read_pretrained(source, option)
    if not found.has_text:
        raise UserError(f"{option} {source}: holds an image tower alone; texts need the model with its text tower")
    tokenizer = text_tokenizer(found.config.text, found.files)  # quicker to fail than the model
    return ImageText(found.build(), tokenizer)


def read_pretrained(source: str, option: str = "--encoder") -> Pretrained:
    """Config and weights that `source` names (table above), in float32 and checked to fit.

    Raises UserError for what is missing, saying where it is published, and for another kind or shape of model.
    """
    path = encoder_directory(source) if source in BUNDLED else Path(source)
    if source.startswith(HUB):
        path = _fetch(source.removeprefix(HUB), option)
    if path.is_dir():
        found = READERS[_kind(path, f"{option} {source}")](path, f"{option} {source}")
    else:
        found = open_clip.read_named(source, option, ", ".join(BUNDLED))
    check(found, f"{option} {source}")
    return found


def _kind(path: Path, who: str) -> str:
    """Key of READERS for a directory. Raises UserError where none fits."""
    if (path / open_clip.CONFIG).is_file() and any((path / name).is_file() for name in open_clip.WEIGHTS):
        return "open_clip"
    if not (path / "config.json").is_file():
        raise UserError(
            f"{who}: neither config.json nor {open_clip.CONFIG} with {' or '.join(open_clip.WEIGHTS)} in it; "
            "give the directory of an image-text encoder"
        )
    kind = json.loads((path / "config.json").read_text()).get("model_type")
    if kind not in READERS:
        raise UserError(f"{who}: holds a {kind!r} model; known are {', '.join(READERS)}")
    return kind


def _fetch(repository: str, option: str) -> Path:
    """A model of the Hugging Face hub in its local cache: its config and tokenizer files, and one file of weights."""
    from huggingface_hub import HfApi, snapshot_download

    wanted = ["*.json", "*.txt", "*.model"]
    try:
        present = HfApi().list_repo_files(repository)
    except Exception as error:  # the client's network errors have no base of their own
        try:
            return Path(snapshot_download(repository, local_files_only=True))
        except Exception:
            raise UserError(f"{option} {HUB}{repository}: cannot be fetched ({first_line(error)})") from None
    weights = next((name for name in HUB_WEIGHTS if name in present), None)
    if weights is None:
        raise UserError(f"{option} {HUB}{repository}: has none of {', '.join(HUB_WEIGHTS)}")
    wanted.append("model-*.safetensors" if weights.endswith(".json") else weights)
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:
        raise UserError(f"{option} {HUB}{repository}: cannot be fetched ({first_line(error)})") from None


def _ours(path: Path, who: str) -> Pretrained:
    model = ImageTextEncoder.from_pretrained(check_directory(path, who.split()[0]))
    return Pretrained(model.config, model.state_dict(), path)


READERS = {
    ImageTextConfig.model_type: _ours,
    "open_clip": open_clip.read_open_clip,
    **dict.fromkeys(KINDS, read_transformers),
}
