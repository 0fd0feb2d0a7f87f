"""Answers in words: transformers' own `generate` on the LLM, with pictures in the prompt as embeds."""

import torch
from torch import Tensor

from dualtoken.core.errors import UserError, whole_number
from dualtoken.generation.context import Context, Model, join

MAX_NEW_TOKENS = 256
REFUSED = {  # options that change what is returned, or that the model decides
    "num_return_sequences": "repeat the prompt for several replies",
    "return_dict_in_generate": "ids alone are returned",
    "eos_token_id": "a reply ends with the LLM's own end-of-text token",
    "pad_token_id": "replies are filled up with the LLM's own end-of-text token",
    "suppress_tokens": "ids of pictures are never written, all others may be",
}


@torch.no_grad()
def write(
    model: Model,
    contexts: list[Context],
    may_draw: bool = False,
    draw_semantic: bool = True,
    shorten: bool = False,
    **options,
) -> list[Tensor]:
    """Go on with each context in words until the reply ends; with `may_draw` also until the model wants to draw.

    Args:
        draw_semantic: False where pictures drawn before have no semantic codes.
        shorten: write no more than the context has room for also where max_new_tokens is said.
        options: of transformers' generate (max_new_tokens, do_sample, temperature, streamer, ...); those that change
            what it returns are refused. Without max_new_tokens as many as the generation_config says, that of the model
            or one among the options, else 256; then no more than the context has room for.
    Returns: the new ids of each row, with the token that ended it. Raises UserError where the LLM cannot hold it.
    """
    config = model.config
    wish = options.get("generation_config")
    for name, why in REFUSED.items():
        if name in options:
            raise UserError(f"{name}: not among the options here; {why}")
    if wish is not None and ((wish.num_return_sequences or 1) > 1 or wish.return_dict_in_generate):
        raise UserError(
            "generation_config: num_return_sequences and return_dict_in_generate are not among the options here; "
            "repeat the prompt for several replies"
        )
    said = options.get("max_new_tokens")
    if said is not None:
        whole_number("max_new_tokens", said, 1)
    if said is None or shorten:
        most = said or (wish or model.llm.generation_config).max_new_tokens or MAX_NEW_TOKENS
        found: dict[int, Tensor] = {}
        rooms = [min(most, max(1, model.context - len(c.ids))) for c in contexts]
        for room in sorted(set(rooms)):  # none is cut short because another prompt is long
            chosen = [i for i, own in enumerate(rooms) if own == room]
            told = options | {"max_new_tokens": room}
            group = write(model, [contexts[i] for i in chosen], may_draw, draw_semantic, **told)
            found |= dict(zip(chosen, group, strict=True))
        return [found[i] for i in range(len(contexts))]
    rows = join(model, contexts, said, draw_semantic)
    stops = stop_ids(model)
    never = [config.vision_start_id, config.image_id, config.vision_end_id, config.draw_end_id]
    options.setdefault("do_sample", wish is not None and bool(wish.do_sample))
    out = model.llm.generate(
        inputs_embeds=rows.embeds,
        attention_mask=rows.mask,
        eos_token_id=[*stops, config.draw_start_id] if may_draw else stops,
        pad_token_id=stops[0],
        suppress_tokens=never if may_draw else [*never, config.draw_start_id],
        **options,
    )
    ends = {*stops, config.draw_start_id} if may_draw else set(stops)
    return [_until(row, ends) for row in out]


def stop_ids(model: Model) -> list[int]:
    """The tokens that end a reply. Raises UserError where the LLM has none."""
    found = model.llm.generation_config.eos_token_id
    found = model.config.text_config.eos_token_id if found is None else found
    if found is None or found == []:
        raise UserError("the LLM has no end-of-text token: set generation_config.eos_token_id")
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _until(row: Tensor, ends: set[int]) -> Tensor:
    """A row up to and with its first end."""
    for place, token in enumerate(row.tolist()):
        if token in ends:
            return row[: place + 1]
    return row
