"""Drawing with guidance: whole pictures' codes, by batch size, engine, and number of vocabularies.

On the CPU the bundled miniature; on a GPU the paper's 3B shape at random in bfloat16 (256 positions, D 4). References:
on the CPU the same model with a depth transformer that starts anew at every depth; but for 8 pictures transformers' own
Janus (its image loop, one code a position where ours draws D of two vocabularies) with an LLM of the same size at
random. Limit: the LLM's cached passes alone; for one picture on a GPU also a copy of as many bytes as a position has
weights to read, those of the heads' blocks D times.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config

from benchmarks.measure import Case, Options, Work
from dualtoken.generation import image
from dualtoken.generation.context import Context, join
from dualtoken.generation.sampling import DrawConfig, HeadSampling
from dualtoken.mllm.config import SPECIAL
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.mllm.parts import ModelConfig, model_config
from dualtoken.mllm.presets import SHAPES, open_mllm
from dualtoken.mllm.visual_head import VisualHeadConfig
from dualtoken.tokenizer.presets import shape_config
from dualtoken.tokenizer.tokenizer import DualTokenVisionConfig, DualTokenVisionTokenizer

PROMPT = 16  # tokens; of the prompt without text one


def cases(options: Options) -> list[Case]:
    """The miniature or the 3B shape: batch sizes, engines, references."""
    gpu = options.device != "cpu"
    sizes = (1,) if options.tiny else (1, 8, 32) if gpu else (1, 4, 16)
    best, made = ("graph" if gpu else "plain"), []
    for batch in sizes:
        engines = ("graph", "compiled", "plain")[: 3 if batch == 1 else 1] if gpu else ("plain", "static")
        group = f"{batch} picture{'s' if batch > 1 else ''} with guidance"
        made.append(Case(group, f"ours, {best}", "ours", partial(ours, batch, best, options), batch, "ours"))
        made += [Case(group, f"ours, {engine}", "reference", partial(ours, batch, engine, options))
                 for engine in engines if engine != best]  # fmt: skip
        made.append(Case(group, "one vocabulary alone (pixel)", "reference",
                         partial(ours, batch, best, options, semantic=False), batch, "pixel alone"))  # fmt: skip
        if not gpu:  # there both would wait for their launches, not for their work
            made.append(Case(group, "a depth transformer without cache", "reference", partial(uncached, batch, options),
                             batch, "depths without cache"))  # fmt: skip
        if batch != 8:
            made.append(Case(group, "transformers' Janus, one code a position", "reference",
                             partial(janus, batch, options), batch, "Janus"))  # fmt: skip
        made.append(Case(group, "the LLM's passes alone", "limit", partial(passes, batch, options), batch, "LLM alone"))
        if gpu and batch == 1:
            made.append(Case(group, "copying the bytes of a position's weights", "limit", partial(reading, options)))
    return made


@dataclass(frozen=True)
class Parts:
    """What a model at random is built from."""

    vision: DualTokenVisionConfig
    llm: dict[str, Any]
    head: VisualHeadConfig


def parts_of(options: Options) -> Parts:
    """The paper's 3B shape, or something of a few thousand weights and 4 positions."""
    if not options.tiny:
        shape = SHAPES["paper-3b"]
        return Parts(shape_config(shape.tokenizer), shape.llm, shape.head)
    codes = {"quantizer": {"codebook_size": 16, "code_dim": 8, "depth": 2}}
    vit = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 16, "patch_size": 8}
    backbone = {"name": "vit_base_patch16_siglip_256", "overrides": vit}
    decoder = {"channels": 8, "multipliers": (1, 1, 2, 2), "blocks": 1, "z_channels": 16}
    llm = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm |= {"num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 128}
    head = VisualHeadConfig(width=16, layers=1, heads=2, embed_dim=8)
    return Parts(DualTokenVisionConfig(backbone, codes, codes, decoder), llm, head)


@lru_cache(1)
def model_of(options: Options) -> DualTokenForConditionalGeneration:
    """The miniature on the CPU; at random: the 3B shape in bfloat16 on a GPU, a tiny one in float32."""
    if options.device == "cpu" and not options.tiny:
        return open_mllm("mini")[0]
    return random_model(parts_of(options), options.device, torch.float32 if options.tiny else torch.bfloat16)


def random_model(parts: Parts, device: str, dtype: torch.dtype) -> DualTokenForConditionalGeneration:
    """A model with random weights, without the vision tower, which drawing codes does not need."""
    torch.manual_seed(0)
    with torch.device("meta"):
        tokenizer = DualTokenVisionTokenizer(parts.vision)
    ids = {name: number for number, name in enumerate(SPECIAL)}
    config = model_config(tokenizer, Qwen2Config(**parts.llm), ModelConfig(head=parts.head), ids)
    with torch.device(device):
        model = DualTokenForConditionalGeneration(config, vision_tokenizer=tokenizer)
    model.vision_tokenizer.drop_tower()
    model.vision_tokenizer.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.vision_tokenizer.parameters(), *model.vision_tokenizer.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
    return model.to(dtype).eval()


def prompts(model: DualTokenForConditionalGeneration, batch: int) -> tuple[list[Context], list[Context]]:
    """Contexts with some text, whose ids are no special tokens, and without."""
    words = 32 + torch.arange(PROMPT, device=model.device) % 8
    return [Context(words)] * batch, [Context(words[:1])] * batch


def settings(model: DualTokenForConditionalGeneration, engine: str, semantic: bool = True) -> DrawConfig:
    """As the model draws unless told otherwise, guided."""
    return replace(model.draw_config, guidance=3.0, engine=engine, semantic_codes=semantic)


def ours(batch: int, engine: str, options: Options, semantic: bool = True) -> Work:
    model = model_of(options)
    config, seeds = settings(model, engine, semantic), list(range(batch))
    return Work(lambda: image.draw(model, *prompts(model, batch), config, seeds), batch, "images")


def uncached(batch: int, options: Options) -> Work:
    """Every depth of a position computes all depths before it again."""

    def codes_of_position(
        head, hidden: Tensor, sampling: HeadSampling, guidance: float, uniform: Tensor, depth: int, choose: Callable
    ) -> Tensor:
        copies = len(hidden) // len(uniform)
        codes = torch.zeros(len(hidden), depth, dtype=torch.int64, device=hidden.device)
        for d in range(depth):
            logits = head.classify(head.features(hidden, codes)[:, d], d)
            codes[:, d] = choose(logits, sampling, guidance, uniform[:, d]).repeat(copies)
        return codes[: len(uniform)]

    work = ours(batch, "plain", options)

    def run() -> None:
        with exchanged(image, "draw_codes_of_position", codes_of_position):
            work.run()

    return Work(run, batch, "images")


@contextmanager
def exchanged(module, name: str, other: Callable):
    """The module's function replaced for a while."""
    own = getattr(module, name)
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, own)


def janus(batch: int, options: Options) -> Work:
    """transformers' Janus with the same sizes of LLM, positions and codebook, at random."""
    from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration

    model = model_of(options)
    llm, positions, codes = model.config.text_config, model.config.positions, model.config.pixel_head["codebook_size"]
    dtype = model.dtype
    del model
    torch.manual_seed(0)
    width, side = llm.hidden_size, int(positions**0.5)
    text = {"model_type": "llama", "vocab_size": llm.vocab_size, "hidden_size": width, "bos_token_id": 1,
            "intermediate_size": llm.intermediate_size, "num_hidden_layers": llm.num_hidden_layers,
            "num_attention_heads": llm.num_attention_heads, "num_key_value_heads": llm.num_key_value_heads,
            "max_position_embeddings": 1024, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16 * side,
              "patch_size": 16, "projection_dim": width, "num_image_tokens": positions}  # fmt: skip
    vq = {"num_embeddings": codes, "projection_dim": width, "image_token_embed_dim": width, "base_channels": 32,
          "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}  # fmt: skip
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=3)
    peer = JanusForConditionalGeneration(config).to(options.device, dtype).eval()
    asked = GenerationConfig(
        do_sample=True, guidance_scale=3, pad_token_id=0, bos_token_id=1, eos_token_id=2, top_k=900, top_p=0.96,
        max_length=PROMPT + positions, generation_kwargs={"boi_token_id": 4},
    )  # fmt: skip
    ids = torch.full((batch, PROMPT), 5, device=options.device)

    def run() -> None:
        peer.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image", generation_config=asked)

    return Work(run, batch, "images")


def passes(batch: int, options: Options) -> Work:
    """The prompt and then every position through the LLM alone, as "graph" does it, on a CPU as "static"."""
    model = model_of(options)
    with torch.no_grad():
        rows = join(model, [*prompts(model, batch)[0], *prompts(model, batch)[1]], model.config.positions)
    embeds = rows.embeds[:, -1:].clone()
    kind = image.kind_of_context(model, settings(model, "graph" if rows.embeds.is_cuda else "static"), rows)
    context = kind(model, rows.mask, rows.positions, model.config.positions - 1)
    step = partial(context.read, embeds)
    step = image.Recorded(step) if embeds.is_cuda else step

    @torch.no_grad()
    def run() -> None:
        context.restart(rows.mask, rows.positions)
        context.read(rows.embeds)
        for _ in range(model.config.positions - 1):
            step()

    return Work(run, batch, "images")


def reading(options: Options) -> Work:
    """As many bytes moved as a position has weights to read: the LLM's once, the heads' blocks once a depth."""
    model = model_of(options)
    heads = [model.pixel_head, model.semantic_head]
    weights = [*model.llm.base_model.layers.parameters(), *model.projector.parameters()]
    weights += [p for head in heads for _ in range(head.config.depth) for p in head.blocks.parameters()]
    weights += [p for head in heads for p in head.classifiers.parameters()]
    count, positions = sum(w.numel() * w.element_size() for w in weights), model.config.positions
    del model, heads, weights
    source = torch.zeros(count // 2, dtype=torch.uint8, device=options.device)  # a copy reads it and writes as much
    place = torch.empty_like(source)

    def run() -> None:
        for _ in range(positions):
            place.copy_(source)

    return Work(run, 1, "images")
