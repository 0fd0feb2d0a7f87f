"""Models by name: the bundled miniature, and how a directory or a name is opened."""

from pathlib import Path

from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import check_directory
from dualtoken.tokenizer.encoder import ImageTextConfig, ImageTextEncoder
from dualtoken.tokenizer.tokenizer import DualTokenVisionConfig, DualTokenVisionTokenizer

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
BUNDLED = {"mini": CHECKPOINTS / "mini"}


def _directory(model: str, part: str, option: str, kind: str) -> Path:
    if model in BUNDLED:
        return BUNDLED[model] / part
    if not Path(model).exists():
        raise UserError(f"{option} {model}: no such directory, and no preset (presets: {', '.join(BUNDLED)})")
    return check_directory(model, option, kind)


def tokenizer_directory(model: str, option: str = "--model") -> Path:
    """Directory of a tokenizer given by preset or path. Raises UserError where it holds none."""
    return _directory(model, "tokenizer", option, DualTokenVisionConfig.model_type)


def encoder_directory(model: str, option: str = "--encoder") -> Path:
    """Directory of an image-text encoder given by preset or path. Raises UserError where it holds none."""
    return _directory(model, "encoder", option, ImageTextConfig.model_type)


def open_tokenizer(model: str, option: str = "--model") -> DualTokenVisionTokenizer:
    """The tokenizer of a preset or directory, in evaluation mode."""
    return DualTokenVisionTokenizer.from_pretrained(tokenizer_directory(model, option)).eval()


def open_encoder(model: str, option: str = "--encoder") -> ImageTextEncoder:
    """The image-text encoder of a preset or directory, in evaluation mode."""
    return ImageTextEncoder.from_pretrained(encoder_directory(model, option)).eval()
