"""Zero-shot accuracy on scenes, one factor at a time: which factors of a picture does a pooled feature know?

Every combination of factors is described in full, as the captions of training do; a value's score is the mean over
all descriptions that name it. Shapes: M images, L descriptions, C width.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from dualtoken.data.scene_text import captions
from dualtoken.data.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES, Scene, SceneObject
from dualtoken.eval.zero_shot import class_vectors, factor_accuracy
from dualtoken.tokenizer.encoder import ImageTextEncoder, TextTokenizer

FACTORS = {"color": tuple(COLORS), "shape": SHAPES, "size": SIZES, "texture": TEXTURES, "background": BACKGROUNDS}


def factors(scene: Scene) -> tuple[str, ...]:
    """The values of `FACTORS` of a scene's first object, in that order."""
    thing = scene.objects[0]
    return thing.color, thing.shape, thing.size, thing.texture, scene.background


class SceneFactors:
    """Descriptions of all combinations, embedded once."""

    def __init__(self, encoder: ImageTextEncoder, text_tokenizer: TextTokenizer):
        self.combinations = list(product(*FACTORS.values()))
        texts = [self._describe(*values) for values in self.combinations]
        self.vectors = class_vectors(encoder, text_tokenizer, texts, ("{}",))  # [L, C]

    def accuracy(self, images: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
        """Accuracy by factor of unit vectors [M, C] of one-object scenes."""
        truths, found = [factors(scene) for scene in scenes], {}
        for place, (name, values) in enumerate(FACTORS.items()):
            labels = torch.tensor([values.index(truth[place]) for truth in truths])
            groups = [[i for i, c in enumerate(self.combinations) if c[place] == value] for value in values]
            found[name] = factor_accuracy(images, self.vectors, labels, groups)
        return found

    def _describe(self, color: str, shape: str, size: str, texture: str, background: str) -> str:
        thing = SceneObject(shape, color, texture, size, 0.5, 0.5, 0.3, COLORS[color])
        return captions(Scene(background, 0.0, (thing,)))[0]
