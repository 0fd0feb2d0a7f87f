"""What a tokenizer keeps of pixels and of meaning, measured in the same way for every row of every table.

In miniature one pass over unseen scenes; at full scale the commands of `dualtoken eval` with ImageNet's names.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from dualtoken.core.errors import UserError
from dualtoken.core.images import to_float
from dualtoken.data.images import Batch, DataConfig, open_source, read_in_order
from dualtoken.eval.commands import reconstruction, zero_shot
from dualtoken.eval.prompts import class_names
from dualtoken.eval.reconstruction import evaluate_reconstruction, inception_distance, teacher_distance
from dualtoken.eval.zero_shot import accuracy, class_vectors, embed_codes, embed_texts, retrieval
from dualtoken.paper.experiment import SPREAD, Setting, stamp
from dualtoken.paper.side_by_side import helpers
from dualtoken.paper.trained import Part, digest, remembered, stale
from dualtoken.tokenizer.presets import open_tokenizer
from dualtoken.tokenizer.pretrained import open_image_text

BATCH = 50
PIXELS = ("psnr", "ssim", "teacher_frechet")
MEANING = ("zero_shot", "text_to_image", "image_to_text", "teacher_cosine")


def device() -> str:
    """Where models run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_measuring(setting: Setting) -> None:
    """Raise UserError where pictures, names, encoder or Inception do not do: before days of training, not after."""
    pair = open_image_text(setting.encoder or "mini")
    source = open_source(DataConfig(setting.source), pair.encoder.backbone.image_size, "test", "--data")
    if not source.classes:
        raise UserError(f"--data {setting.data}: no class folders in it; zero-shot accuracy needs a folder a class")
    if setting.scale == "full":
        class_names("imagenet", source.classes)
    elif not all(next(iter(read_in_order(source, 1, 1, []))).captions):
        raise UserError(f"--data {setting.data}: no captions; retrieval needs NAME.txt beside each picture")
    if setting.train_data is not None:
        open_source(DataConfig(setting.train_data), pair.encoder.backbone.image_size, "train", "--train_data")
    if setting.inception is not None:
        inception_distance(setting.inception)


class Judge:
    """Unseen scenes with the vectors of a teacher and of their captions; measures tokenizers that began with it."""

    def __init__(self, setting: Setting, encoder: str):
        self.setting, self.name = setting, encoder
        self.count = setting.count(500, 50000)
        self.skipped: list[str] = []  # of `batches`

    @cached_property
    def pair(self) -> Any:
        """The image-text encoder with its text tokenizer."""
        pair = open_image_text(self.name)
        pair.encoder.eval().to(device())
        return pair

    @cached_property
    def batches(self) -> list[Batch]:
        """The pictures."""
        source = open_source(DataConfig(self.setting.source), self.pair.encoder.backbone.image_size, "test", "--data")
        self.classes = source.classes
        return list(read_in_order(source, self.count, BATCH, self.skipped))

    @cached_property
    def teacher(self) -> Tensor:
        """Unit vectors [M, C] of the pictures by the continuous encoder."""
        with torch.no_grad():
            embed = self.pair.encoder.embed_image
            return torch.cat([embed(to_float(batch.images.to(device()))).cpu() for batch in self.batches])

    @cached_property
    def _distance(self) -> FrechetInceptionDistance:
        return teacher_distance(self.pair.encoder.backbone)

    def teacher_row(self) -> dict[str, float | None]:
        """The teacher itself, as `measure` gives it."""
        found = self._meaning(self.teacher)
        self.setting.skipped.extend(self.skipped)
        return found

    def measure_all(self, parts: Sequence[Part]) -> None:
        """Measure trained parts that have not been, `Setting.processes` at a time; `measure` then finds it."""
        missing = [part for part in parts if stale(self._place(part), self.setting)]
        number = min(self.setting.processes, len(missing)) - 1
        with helpers(_measure_here, (self.name, missing[::-1]), self.setting, max(0, number)):
            for part in missing:
                self.measure(part)

    def measure(self, part: Part, pixels: bool = True, meaning: bool = True) -> dict[str, float | None]:
        """PSNR, SSIM and a Frechet distance; zero-shot accuracy and R@1, in percent. None for what does not apply.

        The part has been trained; what was measured once is kept in its folder.
        """
        found = remembered(self._place(part), self.setting, lambda: self._measure(part.model(self.setting)))
        self.setting.skipped.extend(found.pop("skipped", []))
        self.setting.protocol.update(found.pop("protocol", {}))
        wanted = {name for names, asked in ((PIXELS, pixels), (MEANING, meaning)) if asked for name in names}
        wanted |= {"rfid"} if pixels else set()
        return {name: value if name in wanted else None for name, value in found.items()}

    def _place(self, part: Part) -> Path:
        """The file of what was measured."""
        return part.folder(self.setting) / f"measured-{self.setting.scale}-{self.count}{self._mark}.json"

    @cached_property
    def _mark(self) -> str:
        """What tells pictures and Inception weights from others."""
        where = [(told, stamp(told)) for told in (self.setting.data, self.setting.inception) if told]
        return f"-{digest(where)}" if where else ""

    def _measure(self, model: Path) -> dict[str, Any]:
        if self.setting.scale == "full":
            return self._measure_full(str(model))
        tokenizer = open_tokenizer(str(model)).to(device())
        pictures, vectors = (batch.images for batch in self.batches), []
        back = evaluate_reconstruction(
            tokenizer, pictures, self._distance, seen=lambda codes: vectors.append(embed_codes(tokenizer, codes).cpu())
        )
        found = {name: getattr(back, name) for name in PIXELS} | self._meaning(torch.cat(vectors))
        return found | {"skipped": self.skipped, "protocol": self._protocol()}

    def _protocol(self) -> dict[str, str]:
        """On how many pictures the miniature is measured."""
        total, labelled = len(self._captions), sum(int((batch.labels >= 0).sum()) for batch in self.batches)
        what = "unseen scenes" if self.setting.source == "scenes" else f"pictures of {self.setting.source}"
        return {"tokenizers": f"measured on {total} {what}, zero-shot accuracy on the {labelled} that have a class"}

    def _measure_full(self, model: str) -> dict[str, Any]:
        told = {"model": model, "encoder": self.name, "data": self.setting.source, "images": self.count}
        back = reconstruction(**told, inception_weights=self.setting.inception)
        seen = zero_shot(**told, classes="imagenet", templates="openai")
        found = {name: back[name] for name in PIXELS}
        found |= {"rfid": back["fid"], "skipped": back["skipped"] + seen["skipped"]}
        found["protocol"] = {"zero_shot": seen["protocol"], "reconstruction": back["protocol"]}
        return found | {"zero_shot": 100 * seen["accuracy"]["codes"]}

    def _meaning(self, vectors: Tensor) -> dict[str, float | None]:
        """Unit vectors [M, C] of all pictures -> measures, in percent but for the cosine with the teacher's.

        None for zero-shot accuracy where no picture has a label.
        """
        labels = torch.cat([batch.labels for batch in self.batches])
        known = labels >= 0  # scenes of one object, by color and shape
        by_class = accuracy(vectors[known], self._classes, labels[known]) if bool(known.any()) else None
        there, back = retrieval(vectors, self._texts, [[text] for text in self._captions])
        cosine = float(F.cosine_similarity(vectors, self.teacher).mean())
        shares = {"zero_shot": by_class, "text_to_image": there, "image_to_text": back}
        percent = {name: None if value is None else 100 * value for name, value in shares.items()}
        return percent | {"teacher_cosine": cosine}

    @cached_property
    def _captions(self) -> list[str]:
        return [caption for batch in self.batches for caption in batch.captions]

    @cached_property
    def _texts(self) -> Tensor:
        return embed_texts(self.pair.encoder, self.pair.tokenizer, self._captions)

    @cached_property
    def _classes(self) -> Tensor:
        self.batches  # noqa: B018 (opens the source, which knows the classes)
        return class_vectors(self.pair.encoder, self.pair.tokenizer, self.classes)


def _measure_here(what: tuple[str, list[Part]], setting: Setting) -> None:
    encoder, parts = what
    judge = Judge(setting, encoder)
    for part in parts:
        judge.measure(part)


def over_seeds(found: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean of every measure over seeds, and beside it, of several, the standard deviation as `NAME sd`."""
    spread: dict[str, float | None] = {}
    for name in found[0]:
        values = [one[name] for one in found if one[name] is not None and math.isfinite(one[name])]
        spread[name] = mean(values) if values else None
        if len(values) > 1:
            spread[name + SPREAD] = stdev(values)
    return spread
