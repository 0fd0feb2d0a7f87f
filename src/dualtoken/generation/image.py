"""Drawing: position by position through the LLM, depth by depth through both heads (eq. 5, 7).

Prompts stand in the batch twice, with and without their text, for classifier-free guidance. Every pass is cached:
the LLM's keys and values, the heads' depth steps, the causal projection behind each quantiser.

Shapes: B images, N positions, D depth, K codebook size, H width of the LLM.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.generation.context import Context, Model, join
from dualtoken.generation.sampling import DrawConfig, HeadSampling, guide, sample, uniforms
from dualtoken.tokenizer.branch import AttentionCache, Branch


class FeatureSteps:
    """Features of a drawn image while it grows: codes [B, 1, D] of the next position -> features [B, 1, C]."""

    def __init__(self, branch: Branch):
        self.branch, self.cache = branch, AttentionCache()

    def __call__(self, codes: Tensor) -> Tensor:
        return self.branch.post.step(self.branch.quantizer.lookup(codes), self.cache)


def draw_codes_of_position(
    head, hidden: Tensor, sampling: HeadSampling, guidance: float, uniform: Tensor, depth: int
) -> Tensor:
    """All D codes of one position: hidden [B or 2B, H], uniform [B, D] -> int64 [B, D]."""
    state, given, chosen = head.start(), hidden, []
    copies = len(hidden) // len(uniform)
    for d in range(depth):
        logits = head.step(state, given)
        logits = guide(logits, guidance) if copies == 2 else logits
        chosen.append(sample(logits, sampling, uniform[:, d]))
        given = chosen[-1].repeat(copies)
    return torch.stack(chosen, -1)


@torch.no_grad()
def draw(
    model: Model,
    contexts: list[Context],
    unconditional: list[Context] | None,
    config: DrawConfig,
    seeds: list[int],
    callback: Callable[[int, int], None] | None = None,
    watch: Callable[[DualCodes], None] | None = None,
) -> DualCodes:
    """Draw one image for each context [B].

    Args:
        contexts: what stands before `<image_gen_start>`; unconditional: the same without text, for guidance.
        seeds: B numbers; equal seed and context give an equal image, alone or in any batch.
        callback: called after every position with (positions done, N).
        watch: called after every position with the codes so far, [B, n, D]; what it raises ends the drawing.
    Returns: codes of B images, [B, N, D] each. Raises UserError where the image does not fit the context, and where
        guidance is asked for without `unconditional`.
    """
    guided = config.guidance != 1.0
    if guided and unconditional is None:
        raise UserError(
            "guidance needs the prompt without its text: make inputs with processor.apply_chat_template, or use "
            "guidance 1"
        )
    settings = model.config
    semantic = config.semantic_codes and settings.output == "both"
    begin = [settings.draw_start_id]
    batch = [c.extend(begin) for c in (*contexts, *(unconditional if guided else ()))]
    copies = len(batch) // len(contexts)
    rows = join(model, batch, settings.positions, semantic)
    cache = DynamicCache()
    depth = settings.pixel_head["depth"]
    noise = uniforms(seeds, settings.positions, max(depth, settings.semantic_head["depth"]), model.device)
    steps = {name: FeatureSteps(getattr(model.vision_tokenizer, name)) for name in ("pixel", "semantic")}
    embeds, mask, place = rows.embeds, rows.mask, rows.positions
    drawn: dict[str, list[Tensor]] = {"pixel": [], "semantic": []}
    for position in range(settings.positions):
        out = model.hidden(embeds, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True)
        hidden = out.last_hidden_state[:, -1]
        features = {}
        for number, name in enumerate(("pixel", "semantic")):
            if name == "semantic" and not semantic:
                features[name] = torch.zeros_like(features["pixel"])
                continue
            head, sampling = getattr(model, f"{name}_head"), getattr(config, name)
            uniform = noise[:, position, number]
            codes = draw_codes_of_position(head, hidden, sampling, config.guidance, uniform, head.config.depth)
            drawn[name].append(codes)
            features[name] = steps[name](codes[:, None])
        if callback is not None:
            callback(position + 1, settings.positions)
        if watch is not None:
            watch(_joined(drawn, settings.semantic_head["depth"]))
        seen = (features[name].to(embeds.dtype) for name in ("pixel", "semantic"))
        embeds = model.projector(*seen, first=position)
        embeds = embeds.repeat(copies, 1, 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        place = place[:, -1:] + 1
    return _joined(drawn, settings.semantic_head["depth"])


def _joined(drawn: dict[str, list[Tensor]], semantic_depth: int) -> DualCodes:
    """Codes [B, D] of each position -> of all; semantic ones are 0 where none were drawn."""
    pixel = torch.stack(drawn["pixel"], 1)
    if not drawn["semantic"]:
        return DualCodes(pixel, pixel.new_zeros(*pixel.shape[:2], semantic_depth))
    return DualCodes(pixel, torch.stack(drawn["semantic"], 1))
