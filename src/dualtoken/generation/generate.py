"""`model.generate`: one entrance to writing, drawing, and both."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError, whole_number
from dualtoken.generation.context import Model, split
from dualtoken.generation.image import draw
from dualtoken.generation.interleaved import interleave
from dualtoken.generation.sampling import DrawConfig
from dualtoken.generation.text import stop_ids, write

MODES = ("text", "image", "interleaved")
SEEDS = 2**63 - 1  # the largest seed
PASSED = {"generation_config", "max_length", "max_new_tokens"}  # what pipelines give whatever is asked for


def generate(
    model: Model,
    input_ids: Tensor,
    mode: str,
    attention_mask: Tensor | None,
    codes: DualCodes | None,
    unconditional: tuple[Tensor | None, Tensor | None],
    draw_config: DrawConfig,
    seed: int | list[int],
    num_images_per_prompt: int,
    max_images: int,
    callback: Any,
    watch: Any = None,
    **text_options,
) -> Tensor | DualCodes | list:
    """Answer, draw, or both, for prompts [B, T] padded on the left.

    Args:
        codes: of all pictures in the prompts, in order.
        unconditional: ids and mask of the prompts without text, with the same pictures, for guidance.
        seed: one number, or one for each prompt; the j-th image of a prompt uses seed + j.
        num_images_per_prompt: for mode "image"; max_images: of one reply, for "interleaved".
        callback: called with (positions done, N) while drawing; watch: with the codes so far, [B, n, D].
        text_options: of transformers' generate, for writing.
    Raises UserError for an unknown mode, too long a prompt, pictures that do not fit the placeholders, and options of
        writing where only a picture is drawn.
    """
    if mode not in MODES:
        raise UserError(f"generation_mode {mode!r} is unknown: choose one of {', '.join(MODES)}")
    if mode == "image" and (useless := sorted(text_options.keys() - PASSED)):
        raise UserError(
            f"{', '.join(useless)}: not an option of drawing; guidance, temperature, top_k and top_p of each head are "
            "those of draw=DrawConfig(...)"
        )
    whole_number("num_images_per_prompt", num_images_per_prompt, 1)
    whole_number("max_images", max_images, 0)
    contexts = split(model.config, input_ids, attention_mask, codes)
    several = isinstance(seed, Iterable) and not isinstance(seed, str)
    seeds = [whole_number("seed", s, 0, SEEDS) for s in (seed if several else [seed] * len(contexts))]
    if len(seeds) != len(contexts):
        raise UserError(f"seed: {len(seeds)} numbers for {len(contexts)} prompts; give one, or one for each")
    if mode == "text":
        replies = write(model, contexts, **text_options)
        longest = max(len(r) for r in replies)
        out = torch.full((len(replies), longest), stop_ids(model)[0], device=input_ids.device)
        for row, reply in enumerate(replies):
            out[row, : len(reply)] = reply
        return torch.cat([input_ids, out], 1)
    plain = None
    if unconditional[0] is not None:
        plain = split(model.config, *unconditional, codes)
    if mode == "image":
        each = range(num_images_per_prompt)
        repeated = [c for c in contexts for _ in each]
        empty = None if plain is None else [c for c in plain for _ in each]
        return draw(model, repeated, empty, draw_config, [s + j for s in seeds for j in each], callback, watch)
    return interleave(model, contexts, plain, draw_config, seeds, max_images, callback, watch, **text_options)
