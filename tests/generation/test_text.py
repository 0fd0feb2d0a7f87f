import copy

import pytest
import torch
from transformers import GenerationConfig

from dualtoken.core.errors import UserError
from tests.generation.lively import alone, chats, inputs, lively, picture, shared, user

LENGTH = 12


def replies(model, processor, given, **options):
    """New ids of each row up to and with the end."""
    out = model.generate(**given, generation_mode="text", **{"max_new_tokens": LENGTH} | options)
    assert torch.equal(out[:, : given["input_ids"].shape[1]], given["input_ids"])
    return [cut(row.tolist(), processor) for row in out[:, given["input_ids"].shape[1] :]]


def cut(row, processor):
    end = processor.tokenizer.eos_token_id
    return row[: row.index(end) + 1] if end in row else row


def test_prompts_of_any_length_with_and_without_pictures_answer_in_a_batch_as_alone():
    model, processor = shared()
    together = replies(model, processor, inputs(processor, chats()))
    assert together == [replies(model, processor, one)[0] for one in alone(processor, chats())]
    assert len({tuple(r) for r in together}) == 4  # each prompt has its own answer, so mixed rows would show


def test_cached_answers_are_those_of_whole_passes():
    model, processor = shared()
    given = inputs(processor, [chats()[1]])
    ids, codes = given["input_ids"], model.look(given["pixel_values"])
    config, said = model.config, []
    never = [getattr(config, f"{n}_id") for n in ("vision_start", "image", "vision_end", "draw_start", "draw_end")]
    for _ in range(LENGTH):
        scores = model(ids, codes=codes).logits[0, -1]
        scores[never] = -torch.inf
        said.append(int(scores.argmax()))
        ids = torch.cat([ids, torch.tensor([[said[-1]]])], 1)
    assert cut(said, processor) == replies(model, processor, given)[0]
    assert len(set(said)) > 3


def test_the_picture_decides_the_answer():
    model, processor = shared()
    given = [inputs(processor, [user(picture(seed), "what is it ?")]) for seed in (1, 2)]
    first, second = (replies(model, processor, g)[0] for g in given)
    assert first != second
    codes = model.look(given[0]["pixel_values"])
    known = {"input_ids": given[0]["input_ids"], "attention_mask": given[0]["attention_mask"], "codes": codes}
    assert replies(model, processor, known)[0] == first


class Force:
    """A logits processor: row r says its number of words, then ends."""

    def __init__(self, lengths, word, end):
        self.lengths, self.word, self.end = lengths, word, end

    def __call__(self, input_ids, scores):
        chosen = [self.word if input_ids.shape[1] < n else self.end for n in self.lengths]
        scores = torch.full_like(scores, -1e9)
        scores[range(len(chosen)), chosen] = 0.0
        return scores


def test_rows_that_end_early_are_filled_with_the_end_and_not_with_words():
    model, processor = shared()
    given, end = inputs(processor, chats()[:3]), processor.tokenizer.eos_token_id
    word = processor.tokenizer.encode("star")[0]
    force = Force([LENGTH + 5, 0, 3], word, end)  # the first row is cut off by the limit
    out = model.generate(**given, max_new_tokens=LENGTH, logits_processor=[force])
    new = out[:, given["input_ids"].shape[1] :].tolist()
    assert new == [[word] * LENGTH, [end] * LENGTH, [word] * 3 + [end] * (LENGTH - 3)]


def test_what_only_stands_around_pictures_is_never_written():
    model, processor = shared()
    given = inputs(processor, chats()[:1])
    free = replies(model, processor, given)
    config = model.config
    for name in ("vision_start", "image", "vision_end", "draw_start", "draw_end"):
        token = getattr(config, f"{name}_id")
        assert replies(model, processor, given, sequence_bias=[[[token], 1000.0]]) == free
    word = processor.tokenizer.encode("star")[0]
    assert replies(model, processor, given, sequence_bias=[[[word], 1000.0]]) == [[word] * LENGTH]  # a bias acts


def test_options_of_transformers_are_passed_on():
    model, processor = shared()
    given = inputs(processor, chats()[:1])
    assert len(replies(model, processor, given, max_new_tokens=2)[0]) == 2
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(replies(model, processor, given, do_sample=True, temperature=3.0)[0])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_generation_config_says_what_is_not_said_by_name():
    model, processor = shared()
    given = inputs(processor, [user("a star")])
    length = given["input_ids"].shape[1]
    wish = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=50.0)
    found = set()
    for seed in range(4):
        torch.manual_seed(seed)
        out = model.generate(**given, generation_config=wish)[0, length:]
        assert len(out) <= 3
        found.add(tuple(out.tolist()))
    assert len(found) > 1  # it sampled
    assert len(model.generate(**given, generation_config=wish, max_new_tokens=2)[0]) <= length + 2
    with pytest.raises(UserError, match="max_new_tokens 0: give at least 1"):
        model.generate(**given, max_new_tokens=0)


def test_without_a_limit_the_context_is_the_limit():
    model, processor = lively(context=64)
    given = inputs(processor, [user("a star")])
    word = processor.tokenizer.encode("star")[0]
    out = model.generate(**given, sequence_bias=[[[word], 1000.0]])
    assert out.shape[1] == 64


def test_without_a_limit_a_long_neighbor_cuts_no_reply_short():
    model, processor = lively(context=64)
    both = [user("a star"), user("a star " * 20)]
    word = processor.tokenizer.encode("star")[0]
    bias = {"sequence_bias": [[[word], 1000.0]]}
    found = model.generate(**inputs(processor, both), **bias)[:, inputs(processor, both)["input_ids"].shape[1] :]
    for row, chat in zip(found, both, strict=True):
        given = inputs(processor, [chat])
        reply = model.generate(**given, **bias)[0, given["input_ids"].shape[1] :]
        assert torch.equal(row[: len(reply)], reply) and len(reply) == 64 - given["input_ids"].shape[1]


def test_options_that_change_what_is_returned_are_refused():
    model, processor = shared()
    several = copy.deepcopy(model.llm.generation_config)
    several.num_return_sequences = 2
    for option in ({"num_return_sequences": 2}, {"return_dict_in_generate": True}, {"eos_token_id": 3},
                   {"pad_token_id": 3}, {"suppress_tokens": [3]}, {"generation_config": several}):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(option))):
            model.generate(**inputs(processor, [user("a star")]), **option)


def test_options_of_writing_are_refused_where_a_picture_is_drawn():
    model, processor = shared()
    given = inputs(processor, [user("a star")])
    with pytest.raises(UserError, match="guidanse, temperature: not an option of drawing"):
        model.generate(**given, generation_mode="image", temperature=0.5, guidanse=2.0)


def test_too_long_a_prompt_is_one_error_with_both_numbers():
    model, processor = shared()
    given = inputs(processor, [user("a star " * 80)])
    length = given["input_ids"].shape[1]
    with pytest.raises(UserError, match=f"{length} tokens .* up to 1: more than the 128"):
        model.generate(**given)
    with pytest.raises(UserError, match="up to 126: more than the 128"):
        model.generate(**inputs(processor, [user("a star")]), max_new_tokens=126)


def test_an_llm_without_an_end_is_a_mistake(monkeypatch):
    model, processor = shared()
    monkeypatch.setattr(model.llm.generation_config, "eos_token_id", None)
    monkeypatch.setattr(model.config.text_config, "eos_token_id", None)
    with pytest.raises(UserError, match="no end-of-text token"):
        model.generate(**inputs(processor, [user("a star")]))
