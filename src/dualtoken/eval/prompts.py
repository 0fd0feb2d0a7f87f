"""Class names and prompt templates of zero-shot classification; ImageNet's are those of open_clip."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.text_tower import import_open_clip

Template = str | Callable[[str], str]  # "a {}", or a function of the name

TEMPLATES: tuple[Template, ...] = ("a {}",)


def class_names(classes: str | None, folders: Sequence[str]) -> list[str]:
    """The name of each class folder, in the folders' order.

    Args: classes: None = the folder's own name; "imagenet" = open_clip's name, by WordNet id (n01440764) or by number
    (0 to 999); else a file with a name a line. Raises UserError where names and folders do not go together.
    """
    if classes is None:
        return [folder.replace("_", " ") for folder in folders]
    if classes == "imagenet":
        return _imagenet_names(folders)
    if not Path(classes).is_file():
        raise UserError(f'--classes {classes}: no such file; give "imagenet" or a file with a class name a line')
    names = [line.strip() for line in Path(classes).read_text().splitlines() if line.strip()]
    if len(names) != len(folders):
        raise UserError(f"--classes {classes}: {len(names)} names for {len(folders)} class folders")
    return names


def _imagenet_names(folders: Sequence[str]) -> list[str]:
    from timm.data import ImageNetInfo

    names = import_open_clip("--classes imagenet").IMAGENET_CLASSNAMES
    number = {key: i for i, synset in enumerate(ImageNetInfo().label_names()) for key in (synset, str(i))}
    for folder in folders:
        if folder not in number:
            raise UserError(
                f"--classes imagenet: folder {folder!r} is neither a WordNet id of ImageNet-1k (as n01440764) nor a "
                "number from 0 to 999; sort the validation pictures into folders named by WordNet id"
            )
    return [names[number[folder]] for folder in folders]


def prompt_templates(templates: str | None) -> Sequence[Template]:
    """Templates by option: None = "a {}", "openai" = open_clip's 80, "simple" = its 7, text with {}, or a file of them.

    Raises UserError for anything else.
    """
    if templates is None:
        return TEMPLATES
    if templates in ("openai", "simple"):
        return getattr(import_open_clip(f"--templates {templates}"), f"{templates.upper()}_IMAGENET_TEMPLATES")
    if Path(templates).is_file():
        found = [line.strip() for line in Path(templates).read_text().splitlines() if line.strip()]
    else:
        found = [templates]
    for template in found or [""]:
        if "{}" not in template:
            raise UserError(
                f'--templates {templates}: {template!r} has no place "{{}}" for the class name; give "openai", '
                '"simple", a text such as "a photo of a {}", or a file with one a line'
            )
    return found
