"""`dualtoken plan`: what a large run takes before it is started: memory, tokens, steps, disk."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig, Qwen2Config

from dualtoken.core.errors import UserError
from dualtoken.data.code_shards import CodeFormat
from dualtoken.data.sources import CODES
from dualtoken.eval.report import table, write_json
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.mllm.parts import ModelConfig, SmallLLMConfig, model_config
from dualtoken.mllm.presets import SHAPES
from dualtoken.mllm.projector import ProjectorConfig
from dualtoken.mllm.visual_head import VisualHeadConfig
from dualtoken.tokenizer.presets import RECIPES, meta_tokenizer, open_tokenizer, shapes
from dualtoken.training.memory import BatchShape, stage_memory
from dualtoken.training.mllm import ChatDataConfig
from dualtoken.training.stages import STAGES, Stage

GIB = 2**30
# Pictures of a chat, and how many of them are drawn, by task; other names in a mixture are taken for text_to_image.
PICTURES = {"caption": (1, 0), "vqa": (1, 0), "ask": (1, 0), "text_to_image": (1, 1), "edit": (2, 1), "story": (3, 3),
            "text": (0, 0)}  # fmt: skip
SPOKEN = 0.5  # share of a chat's text that is learnt: a generous guess
TAR_BLOCK = 512  # a file in a tar: its header of a block, its content in whole blocks


@dataclass(frozen=True)
class Recipe:
    """What of a recipe of train-mllm decides what it takes."""

    content: dict[str, Any]

    def part(self, *path: str, default: Any = None) -> Any:
        """A value by its path of names."""
        found = self.content
        for name in path:
            if not isinstance(found, dict) or name not in found:
                return default
            found = found[name]
        return found

    @property
    def stages(self) -> dict[str, Stage]:
        """By name; those of Table 13 unless the recipe has its own."""
        try:
            return {name: Stage(**stage) for name, stage in self.part("recipe", default={}).items()} or STAGES
        except (AttributeError, TypeError) as error:  # no mapping, an unknown key or a missing one
            raise UserError(f"RECIPE: its stages (`recipe`) cannot be read: {error}") from None

    @property
    def looks(self) -> bool:
        """Whether pictures are read in training, which takes the vision tower; else all are stored codes."""
        sources = self.part("data", "sources", default=())
        if not all(isinstance(source, dict) for source in sources):
            raise UserError("RECIPE: data.sources is no list of sources as {format: FORMAT, path: PATH}")
        return any(source.get("format") != CODES for source in sources)


def plan(
    recipe: str,
    devices: int = 1,
    images: str | None = None,
    stage: str | None = None,
    shape: str | None = None,
    text: int = 128,
    accumulate: int | None = None,
    shard: bool | None = None,
    workers: int = 4,
    shard_size: int = 10000,
    tflops: float | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """What a run of train-mllm takes: memory a device by part, tokens a step, steps, disk and shards.

    Args:
        recipe: of train-mllm, by name or path.
        devices: of one kind, over all machines.
        images: pictures of the data set, as 60M or 250k: storage of their codes, shards, steps to see each once.
        stage: one alone; default: all.
        shape: the model's sizes (paper-3b, paper-7b, gpu-0.5b, gpu-1.5b) where the recipe's LLM is not here.
        text: tokens of words in a chat.
        accumulate: batches of a step, one after the other; default: the recipe's, or fewer where that is too many.
        shard: split weights, gradients and moments over the devices (FSDP2); default: the recipe's.
        workers: processes on each device that read.
        shard_size: pictures in a shard.
        tflops: what a device does a second on average, in 10^12; then hours are printed too.
        output: file for the numbers, .json.
    """
    _positive(devices=devices, text=text, workers=workers, shard_size=shard_size, accumulate=accumulate, tflops=tflops)
    path, read = _open(recipe)
    model = _model(path, read, shape)
    wanted = {stage: read.stages[stage]} if stage in read.stages else read.stages
    if stage is not None and stage not in read.stages:
        raise UserError(f"--stage {stage}: unknown; the stages of {recipe} are {', '.join(read.stages)}")
    split = read.part("loop", "shard", default=False) if shard is None else shard
    rows, found = [], {}
    for name, one in wanted.items():
        times = _accumulate(name, one, devices, accumulate or read.part("loop", "accumulate", default=1))
        samples = one.batch_size // (devices * times)
        pictures, tokens = _chat(one, model.config.positions, text)
        length = read.part("data", "length", default=ChatDataConfig().length)
        memory = stage_memory(
            model, one, _batch(model, one, samples, text, length), read.part("lora", "rank", default=0),
            read.part("loop", "gradient_checkpointing", default=False), read.part("loop", "precision", default="no"),
            devices, split, read.looks,
        )  # fmt: skip
        parts = [memory.weights, memory.gradients, memory.moments, memory.activations, memory.logits, memory.total]
        work = _operations(model, one, tokens) * one.batch_size * one.steps
        found[name] = {
            "samples_at_once": samples, "accumulate": times, "learning": memory.learning,
            **dict(zip(("weights", "gradients", "moments", "activations", "logits", "total"), parts, strict=True)),
            "tokens_a_step": round(tokens * one.batch_size), "pictures_a_step": round(pictures * one.batch_size),
            "steps": one.steps, "operations": work,
            "hours": work / (devices * tflops * 1e12) / 3600 if tflops else None,
        }  # fmt: skip
        rows.append((name, f"{samples} x {times}", *(f"{part / GIB:.2f}" for part in parts)))
    how = "split over them (FSDP2)" if split and devices > 1 else "a copy on each" if devices > 1 else "one device"
    print(f"memory of a device in GiB, {devices} devices, {how}; logits are part of the activations\n")
    print(table(("stage", "chats at once", "weights", "gradients", "AdamW", "activations", "logits", "total"), rows))
    print("\nWhat CUDA and its libraries hold (about 1 GiB) and what the allocator wastes come on top.\n")
    pace = [(n, f["tokens_a_step"], f["pictures_a_step"], f["steps"], f["operations"] / 1e18, f["hours"])
            for n, f in found.items()]  # fmt: skip
    print(table(("stage", "tokens a step", "pictures a step", "steps", "10^18 operations", "hours"), pace))
    result = {"recipe": recipe, "devices": devices, "shard": split, "stages": found}
    if images is not None:
        result["data"] = _data(model, _number(images), shard_size, devices * workers, found)
    if output is not None:
        write_json(Path(output), result)
    return result


def _open(recipe: str) -> tuple[Path, Recipe]:
    path = Path(recipe) if Path(recipe).is_file() else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise UserError(f"RECIPE {recipe}: no such file or recipe; shipped for train-mllm: {', '.join(_shipped())}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"RECIPE {recipe}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or "vision_tokenizer" not in content:
        raise UserError(f"RECIPE {recipe}: no recipe of train-mllm (it names no vision_tokenizer); `dualtoken info` "
                        "tells what a tokenizer takes")  # fmt: skip
    return path, Recipe(content)


def _shipped() -> list[str]:
    return sorted(p.stem for p in RECIPES.glob("*.yaml") if "vision_tokenizer:" in p.read_text())


def _model(path: Path, recipe: Recipe, shape: str | None) -> DualTokenForConditionalGeneration:
    """The recipe's model on the meta device."""
    shape = shape or next((known for known, s in SHAPES.items() if f"{s.recipe}.yaml" == path.name), None)
    if shape is not None:
        if shape not in SHAPES:
            raise UserError(f"--shape {shape}: unknown; the shapes are {', '.join(SHAPES)}")
        return SHAPES[shape].build()
    parts = recipe.part("model", default={})
    made = replace(
        ModelConfig(**{k: v for k, v in parts.items() if k not in ("head", "projector", "draw")}),
        head=VisualHeadConfig(**parts.get("head", {})), projector=ProjectorConfig(**parts.get("projector", {})),
    )  # fmt: skip
    place = recipe.part("vision_tokenizer")
    vision = meta_tokenizer(place) if place in shapes() else open_tokenizer(place, "vision_tokenizer")
    config = model_config(vision, _llm(recipe), made, {})
    with torch.device("meta"):
        return DualTokenForConditionalGeneration(config, vision_tokenizer=vision.to("meta"))


def _llm(recipe: Recipe) -> PreTrainedConfig:
    name = recipe.part("llm")
    if name is None:
        small = SmallLLMConfig(**recipe.part("small", default={}))
        return Qwen2Config(
            vocab_size=small.vocab_size, hidden_size=small.width, intermediate_size=small.mlp,
            num_hidden_layers=small.layers, num_attention_heads=small.heads, num_key_value_heads=small.kv_heads,
            max_position_embeddings=small.context, tie_word_embeddings=True,
        )  # fmt: skip
    if not Path(name).is_dir():
        raise UserError(f"llm {name}: no such directory; give its sizes as --shape, one of {', '.join(SHAPES)}")
    return AutoConfig.from_pretrained(name)


def _accumulate(name: str, stage: Stage, devices: int, most: int) -> int:
    """Accumulated batches that a step can have, at most those asked for. Raises UserError where there are none."""
    for times in range(most, 0, -1):
        if stage.batch_size % (devices * times) == 0:
            return times
    raise UserError(
        f"stage {name}: a batch of {stage.batch_size} cannot be split over {devices} devices; give --devices that "
        "divide it, or another batch_size in the recipe"
    )


def _chat(stage: Stage, positions: int, text: int) -> tuple[float, float]:
    """Pictures and tokens of a chat of the stage's mixture on average."""
    pictures, _ = _pictures(stage)
    return pictures, text + pictures * (positions + 2)


def _pictures(stage: Stage) -> tuple[float, float]:
    """Pictures of a chat, and those drawn, on average."""
    total = sum(stage.mixture.values())
    counts = [(share / total, PICTURES.get(task, PICTURES["text_to_image"])) for task, share in stage.mixture.items()]
    return sum(s * c[0] for s, c in counts), sum(s * c[1] for s, c in counts)


def _batch(model: DualTokenForConditionalGeneration, stage: Stage, samples: int, text: int, length: int) -> BatchShape:
    (pictures, drawn), (_, tokens) = _pictures(stage), _chat(stage, model.config.positions, text)
    width = min(length, math.ceil(samples * tokens))
    return BatchShape(
        math.ceil(samples * tokens / width), width, math.ceil(samples * pictures), math.ceil(samples * drawn),
        math.ceil(SPOKEN * text * samples), masked=True,
    )  # fmt: skip


def _operations(model: DualTokenForConditionalGeneration, stage: Stage, tokens: float) -> float:
    """Operations of a chat: two for each weight it meets, twice that going back where gradients go through.

    Attention between tokens and computing again for checkpointing are left out.
    """
    llm = sum(p.numel() for n, p in model.llm.named_parameters() if "embed_tokens" not in n)
    _, drawn = _pictures(stage)
    heads = 0
    for head in (model.pixel_head, model.semantic_head):
        heads += head.config.depth * sum(p.numel() for p in head.blocks.parameters())
        heads += sum(p.numel() for p in head.classifiers.parameters())
    ways = 1 + (1 if stage.through_llm else 0) + ("llm" in stage.trains)
    return 2 * (ways * llm * tokens + 3 * heads * drawn * model.config.positions)


def _data(
    model: DualTokenForConditionalGeneration, images: int, shard_size: int, readers: int, stages: dict[str, Any]
) -> dict[str, Any]:
    """Storage and shards of a data set's codes, printed."""
    sizes = [getattr(model.vision_tokenizer, name).quantizer.config for name in ("pixel", "semantic")]
    positions = model.config.positions
    shape = CodeFormat((positions, sizes[0].depth), (model.vision_tokenizer.positions, sizes[1].depth),
                       (sizes[0].codebook_size, sizes[1].codebook_size), "")  # fmt: skip
    in_tar = 2 * TAR_BLOCK + math.ceil(shape.size / TAR_BLOCK) * TAR_BLOCK + TAR_BLOCK  # and a short text
    shards = max(math.ceil(images / shard_size), readers)
    once = {name: math.ceil(images / max(1, f["pictures_a_step"])) for name, f in stages.items()}
    rows = [
        ("codes of a picture", f"{shape.size:,} bytes, {in_tar:,} in a tar with its text"),
        ("codes of all", f"{images * shape.size / 1e9:,.1f} GB, {images * in_tar / 1e9:,.1f} GB as tars"),
        ("shards", f"{shards:,} of {math.ceil(images / shards):,} pictures, for {readers:,} reading processes"),
        *((f"stage {name}: every picture once", f"{steps:,} steps") for name, steps in once.items()),
    ]
    print("\n" + table((f"{images:,} pictures", "what they take"), rows))
    return {"images": images, "bytes_a_picture": shape.size, "bytes_in_tar": in_tar, "shards": shards,
            "readers": readers, "steps_to_see_all": once}  # fmt: skip


def _number(text: str) -> int:
    """60M, 250k, 1.2B or plain digits."""
    unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        number = float(text[:-1]) * unit if unit else float(text.replace(",", "").replace("_", ""))
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"--images {text}: give a number above 0, as 60M, 250k or 5000")
    return round(number)


def _positive(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value}: give a number above 0")
