import pytest
import torch
from transformers import DynamicCache

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.generation import image, sampling
from dualtoken.generation.context import split
from dualtoken.generation.sampling import DrawConfig, HeadSampling, guide
from dualtoken.mllm.projector import ProjectorConfig
from tests import tiny
from tests.generation.lively import alone, chats, inputs, lively, picture, shared, user

LIKELIEST = HeadSampling(temperature=0.0)
FREE = HeadSampling(temperature=1.0, top_k=0, top_p=1.0)
POSITIONS, DEPTH = 4, 2


def config(guidance=1.0, pixel=FREE, semantic=FREE, **changes):
    return DrawConfig(guidance, pixel, semantic, **changes)


def draw(model, given, *args, **options):
    return model.generate(**given, generation_mode="image", draw=config(*args), **options)


def same(one, two):
    return torch.equal(one.pixel, two.pixel) and torch.equal(one.semantic, two.semantic)


@pytest.fixture
def seen(monkeypatch):
    """The logits of every draw, guided, in order."""
    logits, real = [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda given, *rest: logits.append(given) or real(given, *rest))
    return logits


def teacher_forced(model, contexts, codes, row, draw_semantic=None):
    """Logits [N, D, K] of both heads for one drawn image, from one whole pass."""
    settings = model.config
    whole = contexts[row].draw(settings, codes[row])
    known = None
    if draw_semantic is not None:
        known = torch.full((len(whole.codes),), draw_semantic)
    embeds = model.embed(whole.ids[None], whole.codes, known)
    start = len(contexts[row].ids)  # of `<image_gen_start>`, whose state predicts position 1
    hidden = model.hidden(embeds, use_cache=False).last_hidden_state[0, start : start + settings.positions]
    return {
        name: getattr(model, f"{name}_head")(hidden, getattr(codes[row], name)[0]) for name in ("pixel", "semantic")
    }


VARIANTS = {
    "paper": {},
    "project first, places": {"projector": ProjectorConfig("project_first", places=True)},
    "places": {"projector": ProjectorConfig(places=True)},
    "sums": {"projector": ProjectorConfig(places=True, sums=True)},
    "sums, draws pixels": {"projector": ProjectorConfig("project_first", sums=True), "output": "pixel"},
    "looks at pixels": {"input": "pixel"},
    "looks at meaning": {"input": "semantic"},
    "draws pixels": {"output": "pixel"},
}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_of_drawing_are_those_of_one_teacher_forced_pass(variant, guidance, seen):
    model, processor = lively(**VARIANTS[variant])
    given = inputs(processor, chats())
    codes = draw(model, given, guidance, LIKELIEST, LIKELIEST)
    shown = model.look(given["pixel_values"])
    contexts = split(model.config, given["input_ids"], given["attention_mask"], shown)
    plain = split(model.config, given["unconditional_ids"], given["unconditional_mask"], shown)
    both = model.config.output == "both"
    heads = ("pixel", "semantic") if both else ("pixel",)
    assert len(seen) == POSITIONS * DEPTH * len(heads)
    stepped = torch.stack(seen).view(POSITIONS, len(heads), DEPTH, len(contexts), -1)
    for row in range(len(contexts)):
        whole, without = (teacher_forced(model, c, codes, row) for c in (contexts, plain))
        for number, name in enumerate(heads):
            expected = whole[name] if guidance == 1 else without[name] + guidance * (whole[name] - without[name])
            assert (stepped[:, number, :, row] - expected).abs().max() < 1e-4
            assert torch.equal(expected.argmax(-1), getattr(codes[row], name)[0])
    assert len({tuple(row) for row in codes.pixel.flatten(1).tolist()}) > 1


@torch.no_grad()
def test_cached_passes_of_the_llm_are_those_of_the_whole():
    model, _ = shared()
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    whole = model.hidden(embeds, use_cache=False).last_hidden_state
    cache = DynamicCache()
    steps = [model.hidden(embeds[:, i : i + 1], past_key_values=cache, use_cache=True) for i in range(9)]
    assert (torch.cat([s.last_hidden_state for s in steps], 1) - whole).abs().max() < 1e-4


@torch.no_grad()
def test_cached_depths_of_a_head_are_those_of_all_at_once():
    model, _ = shared()
    generator = torch.Generator().manual_seed(0)
    hidden, codes = torch.randn(5, 32, generator=generator), torch.randint(16, (5, DEPTH), generator=generator)
    for head in (model.pixel_head, model.semantic_head):
        state = head.start()
        steps = torch.stack([head.step(state, hidden), head.step(state, codes[:, 0])], 1)
        assert (steps - head(hidden, codes)).abs().max() < 1e-5
        other = torch.stack([codes[:, 0].roll(1), codes[:, 1]], 1)
        assert (head(hidden, other)[:, 1] - steps[:, 1]).abs().max() > 1e-3  # the code before matters


@torch.no_grad()
def test_features_position_by_position_are_those_of_the_whole_image():
    tokenizer = tiny.tokenizer()
    generator = torch.Generator().manual_seed(0)
    codes = DualCodes(*(torch.randint(16, (3, POSITIONS, DEPTH), generator=generator) for _ in range(2)))
    for name, whole in zip(("pixel", "semantic"), tokenizer.features(codes), strict=True):
        step = image.FeatureSteps(getattr(tokenizer, name))
        each = [step(getattr(codes, name)[:, i : i + 1]) for i in range(POSITIONS)]
        assert (torch.cat(each, 1) - whole).abs().max() < 1e-5
        apart = image.FeatureSteps(getattr(tokenizer, name))(getattr(codes, name)[:, -1:])
        assert (apart - whole[:, -1:]).abs().max() > 1e-3  # positions before matter


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_is_the_same_alone_or_anywhere_in_a_batch(guidance):
    model, processor = shared()
    seeds = [3, 4, 5, 6]
    together = draw(model, inputs(processor, chats()), guidance, seed=seeds)
    for row, one in enumerate(alone(processor, chats())):
        assert same(draw(model, one, guidance, seed=seeds[row]), together[row])
    order = [2, 0, 3, 1]
    turned = draw(model, inputs(processor, [chats()[i] for i in order]), guidance, seed=[seeds[i] for i in order])
    for place, row in enumerate(order):
        assert same(turned[place], together[row])
    assert len({tuple(row) for row in together.pixel.flatten(1).tolist()}) == 4


def test_several_images_of_a_prompt_have_the_seeds_that_follow():
    model, processor = shared()
    given = inputs(processor, chats()[:2])
    several = draw(model, given, 3.0, seed=[10, 20], num_images_per_prompt=3)
    assert len(several) == 6
    for j in range(3):
        single = draw(model, given, 3.0, seed=[10 + j, 20 + j])
        assert same(single[0], several[j]) and same(single[1], several[3 + j])
    images = {tuple(row) for row in several.pixel[:3].flatten(1).tolist()}
    assert len(images) == 3  # other seeds give other images
    assert same(draw(model, given, 3.0, seed=10)[1], draw(model, given, 3.0, seed=[0, 10])[1])


def test_guidance_needs_the_prompt_without_text_and_one_does_not():
    model, processor = shared()
    given = inputs(processor, chats()[:1])
    bare = {name: given[name] for name in ("input_ids", "attention_mask")}
    assert same(draw(model, bare, 1.0), draw(model, given, 1.0))
    for guidance in (3.0, 0.0):
        with pytest.raises(UserError, match="guidance needs the prompt without its text"):
            draw(model, bare, guidance)


def test_guidance_changes_what_both_heads_draw():
    model, processor = shared()
    given = inputs(processor, chats())
    plain, guided = (draw(model, given, g, LIKELIEST, LIKELIEST) for g in (1.0, 5.0))
    assert not torch.equal(plain.pixel[:, 0], guided.pixel[:, 0])
    assert not torch.equal(plain.semantic[:, 0], guided.semantic[:, 0])


def test_guidance_zero_is_drawing_without_the_text():
    model, processor = shared()
    given = inputs(processor, chats())
    without = {"input_ids": given["unconditional_ids"], "attention_mask": given["unconditional_mask"],
               "pixel_values": given["pixel_values"]}  # fmt: skip
    assert same(draw(model, given, 0.0), draw(model, without, 1.0))


def test_each_head_is_sampled_by_its_own_settings():
    model, processor = shared()
    given = inputs(processor, chats())
    best = draw(model, given, 1.0, LIKELIEST, LIKELIEST)
    one = HeadSampling(top_k=1)
    drawn = draw(model, given, 1.0, one, FREE, seed=7), draw(model, given, 1.0, FREE, one, seed=7)
    # the first position has nothing drawn before it, so a head that takes the likeliest gives the best there
    assert torch.equal(drawn[0].pixel[:, 0], best.pixel[:, 0])
    assert torch.equal(drawn[1].semantic[:, 0], best.semantic[:, 0])
    assert not torch.equal(drawn[0].semantic[:, 0], best.semantic[:, 0])
    assert not torch.equal(drawn[1].pixel[:, 0], best.pixel[:, 0])
    assert same(draw(model, given, 1.0, one, one, seed=8), best)


def test_the_models_own_settings_are_used_unless_told_otherwise():
    model, processor = lively(draw=config(1.0, LIKELIEST, LIKELIEST))
    given = inputs(processor, chats()[:1])
    assert same(model.generate(**given, generation_mode="image"), draw(model, given, 1.0, LIKELIEST, LIKELIEST))


def test_progress_is_told_after_every_position():
    model, processor = shared()
    told = []
    draw(model, inputs(processor, chats()[:2]), 3.0, callback=lambda *at: told.append(at))
    assert told == [(i, POSITIONS) for i in range(1, POSITIONS + 1)]


def forbid(model, monkeypatch):
    """Let nothing of the semantic head be asked for."""

    def fail(*args):
        raise AssertionError("the semantic head was used")

    for name in ("start", "step", "forward"):
        monkeypatch.setattr(model.semantic_head, name, fail)


@pytest.mark.parametrize("how", ["semantic_codes=False", "output=pixel"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pixel_codes_alone_need_no_semantic_head(how, guidance, monkeypatch):
    projector = ProjectorConfig(sums=True)
    model, processor = lively(projector=projector, **({"output": "pixel"} if how == "output=pixel" else {}))
    settings = config(guidance, semantic_codes=how == "output=pixel")
    given = inputs(processor, chats())
    before = model.generate(**given, generation_mode="image", draw=settings)
    forbid(model, monkeypatch)
    after = model.generate(**given, generation_mode="image", draw=settings)
    assert same(before, after)
    assert after.pixel.shape == after.semantic.shape == (4, POSITIONS, DEPTH) and not after.semantic.any()
    assert model.decode_image_tokens(after).shape == (4, 3, tiny.SIZE, tiny.SIZE)
    monkeypatch.undo()
    other = model.generate(
        **given, generation_mode="image", draw=config(guidance, semantic_codes=not settings.semantic_codes)
    )
    assert torch.equal(other.pixel, after.pixel) == (how == "output=pixel")  # only a model of both has a choice


@torch.no_grad()
def test_without_semantic_codes_the_logits_are_those_of_a_pass_that_sees_none(seen):
    model, processor = shared()
    given = inputs(processor, chats()[:2])
    settings = config(1.0, LIKELIEST, LIKELIEST, semantic_codes=False)
    codes = model.generate(**given, generation_mode="image", draw=settings)
    shown = model.look(given["pixel_values"])
    contexts = split(model.config, given["input_ids"], given["attention_mask"], shown)
    stepped = torch.stack(seen).view(POSITIONS, DEPTH, 2, -1)
    for row in range(2):
        hidden = teacher_forced(model, contexts, codes, row, draw_semantic=False)["pixel"]
        assert (stepped[:, :, row] - hidden).abs().max() < 1e-4
        told = teacher_forced(model, contexts, codes, row)["pixel"]
        assert (stepped[:, :, row] - told).abs().max() > 1e-2


def test_pictures_given_as_codes_with_a_class_token_draw_the_same():
    model, processor = shared()
    given = inputs(processor, chats()[1:2])
    codes = model.look(given.pop("pixel_values"))
    longer = DualCodes(codes.pixel, torch.cat([codes.semantic[:, :1], codes.semantic], 1))
    assert same(draw(model, given, 3.0, codes=longer), draw(model, given, 3.0, codes=codes))


def test_half_the_batch_is_guided_by_the_other_half():
    both = torch.arange(8.0).view(4, 2)  # rows 0 and 1 with the prompt, 2 and 3 without
    assert torch.equal(guide(both, 2.0), both[2:] + 2 * (both[:2] - both[2:]))


def test_unknown_mode_and_numbers_that_do_not_fit_are_mistakes():
    model, processor = shared()
    given = inputs(processor, chats()[:2])
    with pytest.raises(UserError, match="generation_mode 'video' is unknown: choose one of text, image, interleaved"):
        model.generate(**given, generation_mode="video")
    with pytest.raises(UserError, match="num_images_per_prompt 0: give at least 1"):
        draw(model, given, num_images_per_prompt=0)
    with pytest.raises(UserError, match="seed: 3 numbers for 2 prompts"):
        draw(model, given, seed=[1, 2, 3])


def test_a_picture_too_few_or_too_many_is_one_error_with_both_numbers():
    model, processor = shared()
    given = inputs(processor, chats()[3:])
    shown = given.pop("pixel_values")
    for mode in ("text", "image", "interleaved"):
        with pytest.raises(UserError, match="8 image placeholders, 0 images of 4 positions need 0"):
            model.generate(**given, generation_mode=mode)
        with pytest.raises(UserError, match="8 image placeholders, 1 images of 4 positions need 4"):
            model.generate(**given, generation_mode=mode, pixel_values=shown[:1])
        with pytest.raises(UserError, match="8 image placeholders, 3 images of 4 positions need 12"):
            model.generate(**given, generation_mode=mode, pixel_values=torch.cat([shown, shown[:1]]))


def test_an_image_that_does_not_fit_the_context_is_one_error_with_both_numbers():
    model, processor = shared()
    many = inputs(processor, [user(*[picture(i) for i in range(22)])])
    length = many["input_ids"].shape[1] + 1
    assert length > 128
    with pytest.raises(UserError, match=f"{length} tokens .* up to 4: more than the 128"):
        draw(model, many)
    model, processor = lively(context=inputs(processor, chats()[:1])["input_ids"].shape[1] + 1 + POSITIONS)
    given = inputs(processor, chats()[:1])
    assert len(draw(model, given)) == 1  # just fits
    model.config.text_config.max_position_embeddings -= 1
    with pytest.raises(UserError, match=f"up to 4: more than the {model.context}"):
        draw(model, given)
