"""DualToken: pictures as pixel and semantic codes, and a language model that reads and writes both.

    import dualtoken

    m = dualtoken.load()
    m.draw("a large plain red star on a black background")
    m.ask("photo.jpg", "what color is the circle ?")

Importing this is quick; the model and its libraries are imported by `load`.
"""

from typing import TYPE_CHECKING

from dualtoken.core.errors import UserError

if TYPE_CHECKING:
    from dualtoken.app.prompt import Model

__all__ = ["UserError", "load"]


def load(model: str = "mini", device: str | None = None) -> "Model":
    """A multimodal model to talk to, draw and edit with.

    Args: model: a preset, or the directory of a multimodal model; device: the GPU where there is one by default.
    Raises UserError where there is no such model.
    """
    from dualtoken.app.prompt import Model

    return Model.load(str(model), device)
