"""A tiny model whose weights are large, so that what it says and draws depends on all that stands before."""

from functools import lru_cache

import torch

from tests import tiny


def lively(seed=0, **changes):
    """(model, processor) of tiny.mllm with larger weights: random, but of sharp opinions."""
    model, processor = tiny.mllm(seed, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("llm.") and p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            elif ("_head.classifiers" in name or "_head.projector" in name or name.startswith("projector.")) and (
                p.ndim == 2
            ):
                p *= 4
    return model, processor


@lru_cache
def shared():
    """The same for all tests that leave it as it is."""
    return lively()


def user(*parts):
    """A chat of one turn: texts, or pictures as tensors."""
    return [{"role": "user", "content": [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]}]  # fmt: skip


def picture(seed):
    """uint8 [3, 16, 16]."""
    return torch.randint(256, (3, tiny.SIZE, tiny.SIZE), generator=torch.Generator().manual_seed(seed)).byte()


def chats():
    """Prompts of different length, with and without pictures."""
    return [
        user("draw a star"),
        user(picture(1), "what is the colour of the star ?"),
        user("a red circle and a blue star , tell a story of it"),
        user(picture(2), "and", picture(3), "tell"),
    ]


def inputs(processor, conversations):
    return processor.apply_chat_template(conversations, add_generation_prompt=True)


def alone(processor, conversations):
    """The inputs of each chat by itself."""
    return [inputs(processor, [chat]) for chat in conversations]
