import pytest
import torch

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.generation import interleaved
from dualtoken.generation.context import split
from dualtoken.generation.image import draw
from dualtoken.generation.sampling import DrawConfig, HeadSampling
from dualtoken.generation.text import write
from tests.generation.lively import alone, chats, inputs, lively, shared

FREE = HeadSampling(temperature=1.0, top_k=0, top_p=1.0)
PLAIN, GUIDED = DrawConfig(1.0, FREE, FREE), DrawConfig(3.0, FREE, FREE)
BLIND = DrawConfig(1.0, FREE, FREE, semantic_codes=False)


class Script:
    """A logits processor: the model says a word, then wants to draw; after `images` pictures it ends."""

    def __init__(self, model, word, images):
        self.plan = [[word, model.config.draw_start_id]] * images + [[word, word]]
        self.end, self.stretch = model.llm.generation_config.eos_token_id, -1

    def __call__(self, input_ids, scores):
        self.stretch += input_ids.shape[1] == 0
        said, plan = input_ids.shape[1], self.plan[self.stretch]
        only = torch.full_like(scores, -1e9)
        only[:, plan[said] if said < len(plan) else self.end] = 0.0
        return only


def contexts_of(model, given):
    shown = model.look(given["pixel_values"]) if "pixel_values" in given else None
    names = ("input_ids", "attention_mask"), ("unconditional_ids", "unconditional_mask")
    return [split(model.config, given[ids], given[mask], shown) for ids, mask in names]


def reply(model, given, config=PLAIN, **options):
    return model.generate(**given, generation_mode="interleaved", draw=config, **options)


def same(one, two):
    return torch.equal(one.pixel, two.pixel) and torch.equal(one.semantic, two.semantic)


def bias(token):
    return {"sequence_bias": [[[token], 1000.0]]}


def test_the_model_decides_whether_it_draws():
    model, processor = shared()
    given = inputs(processor, chats()[:1])
    (drew,) = reply(model, given, max_new_tokens=5, **bias(model.config.draw_start_id))
    assert len(drew.parts) == len(drew.images) == 4 and not drew.ended  # as many as max_images, then cut off
    (ended,) = reply(model, given, max_new_tokens=5, **bias(processor.tokenizer.eos_token_id))
    assert ended.parts == [] and ended.ended
    word = processor.tokenizer.encode("star")[0]
    (cut,) = reply(model, given, max_new_tokens=5, **bias(word))
    assert [p.tolist() for p in cut.parts] == [[word] * 5] and not cut.ended


def test_a_reply_that_the_default_limit_cuts_off_has_not_ended():
    model, processor = lively(context=64)
    given = inputs(processor, chats()[:1])
    word = processor.tokenizer.encode("star")[0]
    (cut,) = reply(model, given, **bias(word))
    assert [p.tolist() for p in cut.parts] == [[word] * (64 - given["input_ids"].shape[1])] and not cut.ended


def test_a_reply_that_ends_with_the_last_allowed_token_has_ended():
    model, processor = shared()
    word = processor.tokenizer.encode("star")[0]
    (done,) = reply(model, inputs(processor, chats()[:1]), max_new_tokens=3, logits_processor=[Script(model, word, 0)])
    assert [p.tolist() for p in done.parts] == [[word, word]] and done.ended


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_max_images_limits_a_reply(limit):
    model, processor = shared()
    told = []
    options = {"max_images": limit, "callback": lambda *at: told.append(at)} | bias(model.config.draw_start_id)
    (drew,) = reply(model, inputs(processor, chats()[:1]), **options)
    assert len(drew.images) == limit and not drew.ended
    assert told == [(i, 4) for i in range(1, 5)] * limit


@pytest.mark.parametrize("config", [PLAIN, GUIDED, BLIND])
def test_several_images_each_drawn_with_all_that_stands_before(config):
    """Word, picture, word, picture, words: restated with `draw` on contexts put together by hand."""
    model, processor = shared()
    given = inputs(processor, chats()[1:2])
    word = processor.tokenizer.encode("star")[0]
    (told,) = reply(model, given, config, seed=11, logits_processor=[Script(model, word, 2)])
    assert [type(p) for p in told.parts] == [torch.Tensor, DualCodes, torch.Tensor, DualCodes, torch.Tensor]
    assert told.ended and told.parts[0].tolist() == [word] and told.parts[-1].tolist() == [word, word]
    (context,), (plain,) = contexts_of(model, given)
    for k, codes in enumerate(told.images):
        context = context.extend([word])
        expected = draw(model, [context], [plain], config, [11 + k])
        assert same(expected, codes)
        context, plain = context.draw(model.config, codes), plain.draw(model.config, codes)
    assert not same(*told.images)


@pytest.mark.parametrize("config", [PLAIN, BLIND])
def test_words_after_a_picture_have_it_before_them(config, monkeypatch):
    model, processor = shared()
    given = inputs(processor, chats()[:1])
    (context,), _ = contexts_of(model, given)
    real, seen = interleaved.write, []

    def begin_with_a_picture(model, contexts, **options):
        seen.append(contexts[0])
        if len(seen) == 1:
            return [torch.tensor([model.config.draw_start_id])]
        return real(model, contexts, **options)

    monkeypatch.setattr(interleaved, "write", begin_with_a_picture)
    said = []
    for seed in (1, 2):
        seen.clear()
        (told,) = reply(model, given, config, seed=seed, max_images=1, max_new_tokens=8)
        codes = told.images[0]
        settings = model.config
        ids = [settings.draw_start_id, *[settings.image_id] * 4, settings.draw_end_id]
        assert seen[1].ids.tolist() == context.ids.tolist() + ids and same(seen[1].codes, codes)
        # uncached and by hand: the words are those of whole passes over prompt, picture and words so far
        row = seen[1].ids[None]
        never = [settings.vision_start_id, settings.image_id, settings.vision_end_id, settings.draw_end_id]
        with torch.no_grad():
            for token in told.parts[1].tolist():
                known = torch.tensor([config.semantic_codes])
                scores = model(row, codes=codes, draw_semantic=known).logits[0, -1]
                scores[never] = -torch.inf
                assert int(scores.argmax()) == token
                row = torch.cat([row, torch.tensor([[token]])], 1)
        said.append(told.parts[1].tolist())
    assert said[0] != said[1]  # another picture, other words


def test_rows_stop_at_different_times_and_are_as_alone(monkeypatch):
    model, processor = shared()
    begin, end = model.config.draw_start_id, processor.tokenizer.eos_token_id
    a, b = (processor.tokenizer.encode(w)[0] for w in ("star", "circle"))
    plans = [
        [[a, end]],
        [[begin], [b, begin], [a, b, end]],
        [[a, b, begin], [end]],
        [[a, begin], [begin], [begin], [b, end]],
    ]

    def run(given, which):
        starts = [c.ids.tolist() for c in contexts_of(model, given)[0]]
        todo = {tuple(s): list(plans[i]) for s, i in zip(starts, which, strict=True)}
        batches = []

        def scripted(model, contexts, **options):
            prompts = [next(p for p in todo if tuple(c.ids[: len(p)].tolist()) == p) for c in contexts]
            batches.append([which[list(todo).index(p)] for p in prompts])
            return [torch.tensor(todo[p].pop(0)) for p in prompts]

        monkeypatch.setattr(interleaved, "write", scripted)
        return reply(model, given, GUIDED, seed=[10 * i for i in which], max_images=2), batches

    together, batches = run(inputs(processor, chats()), [0, 1, 2, 3])
    assert batches == [[0, 1, 2, 3], [1, 2, 3], [1, 3]]
    assert [len(r.images) for r in together] == [0, 2, 1, 2]
    assert [r.ended for r in together] == [True, True, True, False]
    words = [[p.tolist() for p in r.parts if isinstance(p, torch.Tensor)] for r in together]
    assert words == [[[a]], [[b], [a, b]], [[a, b]], [[a]]]
    for row, given in enumerate(alone(processor, chats())):
        (single,), _ = run(given, [row])
        assert len(single.parts) == len(together[row].parts) and single.ended == together[row].ended
        for one, two in zip(single.parts, together[row].parts, strict=True):
            assert same(one, two) if isinstance(one, DualCodes) else torch.equal(one, two)


def test_free_replies_of_a_batch_are_as_alone():
    """Without a script: random weights that like to draw now and then."""
    model, processor = shared()
    options = {"max_new_tokens": 6, "max_images": 2, "sequence_bias": [[[model.config.draw_start_id], 3.0]]}
    together = reply(model, inputs(processor, chats()), GUIDED, seed=[1, 2, 3, 4], **options)
    for row, given in enumerate(alone(processor, chats())):
        (single,) = reply(model, given, GUIDED, seed=row + 1, **options)
        assert len(single.parts) == len(together[row].parts) and single.ended == together[row].ended
        for one, two in zip(single.parts, together[row].parts, strict=True):
            assert same(one, two) if isinstance(one, DualCodes) else torch.equal(one, two)
    assert sum(len(r.images) for r in together) > 0
    assert any(isinstance(p, torch.Tensor) for r in together for p in r.parts)


def test_only_interleaved_replies_may_ask_for_a_picture():
    model, processor = shared()
    (context,), _ = contexts_of(model, inputs(processor, chats()[:1]))
    wish = bias(model.config.draw_start_id)
    assert write(model, [context], may_draw=True, **wish)[0].tolist() == [model.config.draw_start_id]
    assert model.config.draw_start_id not in write(model, [context], max_new_tokens=4, **wish)[0].tolist()


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 3}])
def test_what_does_not_fit_any_more_ends_the_reply_and_what_was_drawn_is_kept(options):
    given = inputs(shared()[1], chats()[:1])
    for left, words in ((0, 0), (1, 1), (5, 0), (4, 0)):  # after two pictures, each of 6 tokens
        model, processor = lively(context=given["input_ids"].shape[1] + 12 + left)
        word = processor.tokenizer.encode("star")[0]
        hook = Script(model, word, 2) if words else None
        if hook:  # words alone after the pictures
            hook.plan = [[model.config.draw_start_id]] * 2 + [[word] * 9]
        wish = {"logits_processor": [hook]} if hook else bias(model.config.draw_start_id)
        (told,) = reply(model, given, max_images=20, **wish, **options)
        assert len(told.images) == 2 + (left == 5) and not told.ended
        assert len(told.parts) - len(told.images) == words


def test_a_prompt_without_room_for_its_first_picture_is_one_error_with_both_numbers():
    given = inputs(shared()[1], chats()[:1])
    length = given["input_ids"].shape[1]
    model, _ = lively(context=length + 4)
    with pytest.raises(UserError, match=f"has {length + 1} tokens and the reply needs up to 4: more than the"):
        reply(model, given, **bias(model.config.draw_start_id))


def test_guidance_without_the_unconditional_prompt_is_a_mistake():
    model, processor = shared()
    given = inputs(processor, chats()[:1])
    bare = {name: given[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(UserError, match="guidance needs"):
        reply(model, bare, GUIDED, **bias(model.config.draw_start_id))
    assert len(reply(model, bare, PLAIN, max_images=1, **bias(model.config.draw_start_id))[0].images) == 1
