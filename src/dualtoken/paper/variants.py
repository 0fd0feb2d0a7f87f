"""Tokenizers that differ in one thing, as parts to train: layers, codebooks, objectives, quantizer, encoder, seed.

The miniature: 48 px, 36 positions, D = 4, K = 256, code width 16, a small decoder, no perceptual or adversarial loss,
280 steps of 8 pictures on the bundled encoder. All rows of a table have the same budget. At full scale the shape is
the recipe that fits `--encoder`, with the recipe's losses and 100000 steps (the paper names none).
"""

from dataclasses import dataclass
from typing import Any

import yaml

from dualtoken.core.errors import UserError
from dualtoken.paper.experiment import Setting
from dualtoken.paper.trained import Part
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig
from dualtoken.tokenizer.initial import load_backbone
from dualtoken.tokenizer.presets import RECIPES, fitting_shape

STEPS, LONG, FULL = 280, 1400, (2000, 98000)  # of tables that compare tokenizers; of those that need good ones; full
RATE = 2e-3  # the best of 0.8e-3 to 5e-3 for row (c) of Table 3, reconstruction alone (LOG.md)
SIZES = {"codebook_size": 256, "code_dim": 16, "depth": 4}
DECODER = {"channels": 16, "multipliers": [1, 1, 2, 4], "blocks": 1, "z_channels": 64}
OWN = {"channels": 16, "multipliers": [1, 1, 2, 4], "blocks": 1, "attention": 1}
FEATURES, POOLED = 0.02, 0.05  # weights of the semantic loss at 1; the bundled recipe's, for features of its scale
FULL_FEATURES, FULL_POOLED = 5.0, 1.0


@dataclass(frozen=True)
class Taps:
    """Layers of a backbone: the first quarter and the penultimate, of so many."""

    shallow: int
    deep: int
    layers: int


@dataclass(frozen=True)
class Variant:
    """A tokenizer to train.

    Args:
        pixel_layer, semantic_layer: the taps.
        joined: one codebook for both.
        draws: whether it has the reconstruction objective.
        means: weight of the semantic objective; 0 = none.
        frozen: the backbone stands still.
        own_encoder: pixels come from a convolutional encoder (appendix F.4), the backbone is frozen.
        scratch: the backbone begins at random.
        quantizer: its kind.
        encoder: the part that gives the encoder; None = the setting's.
        steps: of the miniature, before the budget.
    """

    pixel_layer: int
    semantic_layer: int
    joined: bool = False
    draws: bool = True
    means: float = 1.0
    frozen: bool = False
    own_encoder: bool = False
    scratch: bool = False
    quantizer: str = "rvq"
    encoder: Part | None = None
    steps: int = STEPS
    seed: int = 0

    def part(self, setting: Setting) -> Part:
        """What has to be trained for it."""
        models = {"encoder": self.encoder} if self.encoder is not None else {}
        mini = setting.scale == "mini"
        recipe = "mini-tokenizer" if mini else full_recipe(setting)
        changes = self._changes(setting) | (self._mini(setting) if mini else self._full(setting))
        return Part("train-tokenizer", recipe, changes, models)

    @property
    def trains(self) -> list[str]:
        """Parts of the tokenizer that learn."""
        still = self.frozen or self.own_encoder
        return [
            *(() if still else ("backbone",)), "pixel", "semantic", *(("decoder",) if self.draws else ()),
            *(("pixel_encoder",) if self.own_encoder else ()),
        ]  # fmt: skip

    def _changes(self, setting: Setting) -> dict[str, Any]:
        """What both scales share."""
        return {"seed": self.seed, "encoder": None if self.encoder else setting.encoder or "mini"}

    def _losses(self, features: float, pooled: float) -> dict[str, float]:
        losses = {"features": features * self.means, "pooled": 0.0 if self.own_encoder else pooled * self.means}
        if not self.draws:
            losses |= {"mse": 0.0, "perceptual": 0.0, "adversarial": 0.0}
        if self.quantizer == "mcq":  # UniTok's: the codebooks learn by gradient
            losses |= {"commitment": 0.25, "codebook": 1.0}
        return losses

    def _phases(self, first: int, second: int) -> list[dict[str, Any]]:
        """Codebooks first, on a backbone that stands still; then all that learns."""
        begin = [part for part in self.trains if part != "backbone"]
        return [{"steps": first, "trains": begin}, {"steps": second, "trains": self.trains}]

    def _mini(self, setting: Setting) -> dict[str, Any]:
        steps = setting.steps(self.steps)
        warm = steps // 10
        quantizer = SIZES | {"kind": self.quantizer}
        changes: dict[str, Any] = {
            "data": {"source": setting.train_source, "batch_size": 8},
            "backbone": {"name": "", "pixel_layer": self.pixel_layer, "semantic_layer": self.semantic_layer},
            "pixel": {"quantizer": quantizer},
            "semantic": {"quantizer": quantizer, "joined": self.joined},
            "decoder": DECODER,
            "losses": {"perceptual": 0.0} | self._losses(FEATURES, POOLED),
            "phases": self._phases(warm, steps - warm),
            "optim": {"lr": RATE, "warmup": warm},
            "dtype": "float32",
            "loop": {"save_every": 200, "eval_every": 0, "log_every": 20, "tracker": "none"},
        }
        if self.own_encoder:
            changes["pixel_encoder"] = OWN
        if self.scratch:
            written = yaml.safe_load((RECIPES / "mini-encoder.yaml").read_text())["backbone"]
            changes |= {"encoder": None, "backbone": written | changes["backbone"] | {"name": written["name"]}}
        return changes

    def _full(self, setting: Setting) -> dict[str, Any]:
        changes: dict[str, Any] = {
            "data": {"source": setting.train_source},
            "backbone": {"pixel_layer": self.pixel_layer, "semantic_layer": self.semantic_layer},
            "pixel": {"quantizer": {"kind": self.quantizer}},
            "semantic": {"quantizer": {"kind": self.quantizer}, "joined": self.joined},
            "losses": self._losses(FULL_FEATURES, FULL_POOLED),
            "phases": self._phases(*FULL),
        }
        if setting.lpips is not None:
            changes["losses"]["lpips_weights"] = setting.lpips
        if self.scratch:
            changes["encoder"] = None
        return changes


def full_recipe(setting: Setting) -> str:
    """The recipe whose backbone has the shape of `--encoder`. Raises UserError where none has."""
    shape, _ = load_backbone(setting.encoder, BackboneConfig(""))
    made = Backbone(shape)
    found = fitting_shape(made.width, made.layers, made.grid**2, made.prefix)
    if found is None:
        raise UserError(f"--encoder {setting.encoder}: no recipe has its shape (dualtoken info lists those there are)")
    return found


def taps(setting: Setting, encoder: Part | None = None) -> Taps:
    """The layers that the paper's rule gives for the backbone of the setting, or of an encoder to be trained."""
    if encoder is not None:
        depth = encoder.content()["backbone"]["overrides"]["depth"]
        return Taps(max(1, depth // 4), depth - 1, depth)
    shape, _ = load_backbone(setting.encoder or "mini", BackboneConfig(""))
    made = Backbone(shape)
    return Taps(made.pixel_layer, made.semantic_layer, made.layers)
