from collections import Counter
from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    modeling_flash_attention_utils,
)

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.data.chat import ChatSample, Message, Picture
from dualtoken.data.collate import IGNORE, pack
from dualtoken.generation.sampling import DrawConfig
from dualtoken.mllm.config import DualTokenConfig
from dualtoken.mllm.model import Counts, DualTokenForConditionalGeneration
from dualtoken.mllm.parts import ModelConfig, from_parts, small_llm
from dualtoken.mllm.projector import ProjectorConfig
from dualtoken.tokenizer.backbone import BackboneConfig
from dualtoken.tokenizer.branch import BranchConfig
from dualtoken.tokenizer.quantizer import QuantizerConfig
from dualtoken.training.tokenizer import build_tokenizer
from tests import tiny

START, PADS, END = "<|vision_start|>", "<|image_pad|>" * 4, "<|vision_end|>"
RED = Image.new("RGB", (16, 16), "red")
CHAT = [{"role": "user", "content": [
    {"type": "image", "image": RED}, {"type": "text", "text": "what is the colour of the star ?"},
]}]  # fmt: skip


def codes_of(count, seed=0, prefix=0):
    torch.manual_seed(seed)
    return DualCodes(torch.randint(16, (count, 4, 2)), torch.randint(16, (count, 4 + prefix, 2)))


def sample(seed=0, looked=1, drawn=2):
    """A chat that looks at pictures, then speaks, draws and speaks."""
    codes = codes_of(looked + drawn, seed)
    pictures = [Picture(f"{seed}-{i}", codes=codes[i]) for i in range(looked + drawn)]
    said = [part for picture in pictures[looked:] for part in (f"a red star {seed}", picture)]
    return ChatSample(
        (Message("user", (*pictures[:looked], "tell a story")), Message("assistant", (*said, "a blue circle"))),
        "story",
        str(seed),
    )


def batch(processor, samples):
    return pack([processor.encode(s) for s in samples], 96, processor.tokenizer.pad_token_id).inputs


def changed(inputs, vocabulary, image):
    """The inputs with other codes of one vocabulary in one picture."""
    codes = DualCodes(inputs["codes"].pixel.clone(), inputs["codes"].semantic.clone())
    part = getattr(codes, vocabulary)
    part[image] = (part[image] + 1) % 16
    return inputs | {"codes": codes}


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**{k: v for k, v in inputs.items() if k not in ("labels",)}).logits


# -- the loss --


def plain_hidden(model, ids, codes):
    """The LLM's states [T, H] of one sample: features of both vocabularies joined, projected, put in place."""
    pixel, semantic = (
        F.layer_norm(getattr(model.vision_tokenizer, name).lookup(getattr(codes, name)), (model.feature_width,))
        for name in ("pixel", "semantic")
    )
    first, _, second = model.projector.joint
    seen = iter([
        second(F.gelu(first(torch.cat([pixel[m, n], semantic[m, n]])))) for m in range(len(codes)) for n in range(4)
    ])  # fmt: skip
    table = model.llm.get_input_embeddings().weight
    embeds = torch.stack([next(seen) if i == model.config.image_id else table[i] for i in ids.tolist()])
    return model.llm.model(inputs_embeds=embeds[None]).last_hidden_state[0]


def plain_depth_losses(head, state, codes):
    """Eq. 7 of one position, a depth at a time on what eq. 5 lets it see."""
    losses = []
    for depth, code in enumerate(codes.tolist()):
        rows = [head.projector(state)]
        for d in range(depth):
            rows.append(head.embed_in(sum(head.embedding.weight[c] for c in codes.tolist()[: d + 1])))
        x = (torch.stack(rows) + head.positions[: depth + 1])[None]
        for block in head.blocks:
            x = block(x)
        losses.append(-head.classifiers[depth](head.norm(x[0, -1])).log_softmax(-1)[code])
    return torch.stack(losses)


def plain_losses(model, tokens, drawn):
    """Eq. 6 and 7 of one sample, token by token: mean text loss, then [D] pixel and [D] semantic."""
    hidden = plain_hidden(model, tokens.ids, tokens.codes)
    words = [
        -model.llm.lm_head(hidden[t - 1]).log_softmax(-1)[label]
        for t, label in enumerate(tokens.labels.tolist())
        if label != IGNORE
    ]
    places = (tokens.ids == model.config.image_id).nonzero()[:, 0].view(-1, 4)
    parts = {}
    for name in ("pixel", "semantic"):
        head, codes = getattr(model, f"{name}_head"), getattr(tokens.codes, name)
        parts[name] = [plain_depth_losses(head, hidden[places[m, n] - 1], codes[m, n]) for m in drawn for n in range(4)]
    return torch.stack(words).mean(), *(torch.stack(parts[name]).mean(0) for name in ("pixel", "semantic"))


@torch.no_grad()
def test_loss_parts_are_equations_6_and_7():
    model, processor = tiny.mllm(text_weight=0.5, pixel_weight=2.0, semantic_weight=3.0)
    tokens = processor.encode(sample())
    text, pixel, semantic = plain_losses(model, tokens, drawn=[1, 2])
    out = model(tokens.ids[None], codes=tokens.codes, labels=tokens.labels[None])
    assert torch.allclose(out.text, text, rtol=1e-5)
    assert out.pixel.shape == (2,) and torch.allclose(out.pixel, pixel, rtol=1e-5)
    assert out.semantic.shape == (2,) and torch.allclose(out.semantic, semantic, rtol=1e-5)
    assert torch.allclose(out.loss, 0.5 * text + 2 * pixel.sum() + 3 * semantic.sum(), rtol=1e-5)


@torch.no_grad()
def test_depths_may_weigh_differently():
    model, processor = tiny.mllm(pixel_weight=2.0, depth_weights=[1.0, 0.25])
    tokens = processor.encode(sample())
    out = model(tokens.ids[None], codes=tokens.codes, labels=tokens.labels[None])
    wanted = out.text + 2 * (out.pixel[0] + 0.25 * out.pixel[1]) + out.semantic[0] + 0.25 * out.semantic[1]
    assert torch.allclose(out.loss, wanted, rtol=1e-5)
    with pytest.raises(UserError, match=r"depth_weights \[1.0\]: give one for each of the 2 depths"):
        tiny.mllm(depth_weights=[1.0])


@torch.no_grad()
def test_vocabularies_may_have_different_depths(tmp_path):
    torch.manual_seed(0)
    deeper = BranchConfig(QuantizerConfig(kind="mcq", codebook_size=24, code_dim=8, depth=4))
    build_tokenizer((tiny.BACKBONE, None), deeper, tiny.BRANCH, tiny.DECODER).save_pretrained(tmp_path)
    model, processor = from_parts(str(tmp_path), *small_llm(tiny.WORDS, tiny.LLM), ModelConfig(head=tiny.HEAD))
    codes = model.vision_tokenizer.encode(tiny.images(1))
    drawn = ChatSample((Message("user", ("draw",)), Message("assistant", (Picture("a", codes=codes),))), "t", "a")
    tokens = processor.encode(drawn)
    out = model.eval()(tokens.ids[None], codes=tokens.codes, labels=tokens.labels[None])
    assert out.pixel.shape == (4,) and out.semantic.shape == (2,)
    assert torch.allclose(out.loss, out.text + out.pixel.sum() + out.semantic.sum())
    assert model.pixel_head.embedding.num_embeddings == 4 * 24 and model.semantic_head.embedding.num_embeddings == 16
    prompt = tokens.ids[: int((tokens.ids == model.config.draw_start_id).nonzero())]
    made = model.generate(prompt[None], generation_mode="image", draw=DrawConfig(guidance=1.0))
    assert made.pixel.shape == (1, 4, 4) and int(made.pixel.max()) < 24 and made.semantic.shape == (1, 4, 2)


def test_images_only_looked_at_carry_no_loss():
    model, processor = tiny.mllm()
    inputs = batch(processor, [sample(looked=2, drawn=0)])
    out = model(**inputs)
    assert not out.pixel.any() and not out.semantic.any() and torch.allclose(out.loss, out.text)
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.pixel_head.parameters())
    assert model.projector.joint[0].weight.grad.any()
    assert all(p.grad is None for p in model.vision_tokenizer.parameters())


@torch.no_grad()
def test_counts_make_parts_of_a_step_add_up():
    model, processor = tiny.mllm()
    samples = [sample(0), sample(1, looked=0, drawn=1), sample(2, drawn=0)]
    whole = model(**batch(processor, samples))
    parts = [batch(processor, [s]) for s in samples]
    counts = Counts(sum(int((p["labels"] >= 0).sum()) for p in parts), 3 * 4, 3 * 4)
    outs = [model(**p, counts=counts) for p in parts]
    for name in ("loss", "text", "pixel", "semantic"):
        assert torch.allclose(sum(getattr(o, name) for o in outs), getattr(whole, name), rtol=1e-5)


@torch.no_grad()
def test_no_labels_at_all_is_a_loss_of_zero():
    model, processor = tiny.mllm()
    inputs = batch(processor, [sample(drawn=0)])
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORE)
    assert float(model(**inputs).loss) == 0


# -- what is seen, what is learnt --


@pytest.mark.parametrize(
    ("given", "seen"), [("both", ("pixel", "semantic")), ("pixel", ("pixel",)), ("semantic", ("semantic",))]
)
def test_input_says_what_is_seen_of_a_picture_looked_at(given, seen):
    model, processor = tiny.mllm(input=given)
    inputs = batch(processor, [sample()])
    before = logits_of(model, inputs)
    for vocabulary in ("pixel", "semantic"):
        moved = not torch.equal(logits_of(model, changed(inputs, vocabulary, 0)), before)
        assert moved == (vocabulary in seen)
        assert not torch.equal(logits_of(model, changed(inputs, vocabulary, 1)), before)  # of what it drew, all


@torch.no_grad()
def test_output_pixel_neither_sees_nor_learns_meaning_in_what_it_draws():
    model, processor = tiny.mllm(output="pixel")
    inputs = batch(processor, [sample()])
    before, out = logits_of(model, inputs), model(**inputs)
    assert not out.semantic.any() and out.pixel.all()
    assert torch.allclose(out.loss, out.text + out.pixel.sum())
    for image in (1, 2):
        other = changed(inputs, "semantic", image)
        assert torch.equal(logits_of(model, other), before) and torch.equal(model(**other).loss, out.loss)
    assert not torch.equal(logits_of(model, changed(inputs, "semantic", 0)), before)  # looked at
    assert not torch.equal(logits_of(model, changed(inputs, "pixel", 1)), before)


@torch.no_grad()
def test_hidden_semantic_codes_are_neither_seen_nor_learnt():
    model, processor = tiny.mllm()
    inputs = batch(processor, [sample()])
    full = model(**inputs)
    hidden = inputs | {"draw_semantic": torch.tensor([True, True, False])}
    out, before = model(**hidden), logits_of(model, hidden)
    assert torch.equal(logits_of(model, changed(hidden, "semantic", 2)), before)
    assert torch.equal(model(**changed(hidden, "semantic", 2)).semantic, out.semantic)
    assert not torch.equal(model(**changed(hidden, "semantic", 1)).semantic, out.semantic)
    first = plain_losses(model, processor.encode(sample()), drawn=[1])[2]  # the picture that is not hidden
    assert torch.allclose(out.semantic, first, rtol=1e-5) and not torch.allclose(full.semantic, first, rtol=1e-3)
    none = model(**inputs | {"draw_semantic": torch.zeros(3, dtype=torch.bool)})
    assert not none.semantic.any() and none.pixel.all()


def test_unknown_switches_are_one_line():
    with pytest.raises(UserError, match="input='codes' must be one of both, pixel, semantic"):
        DualTokenConfig(input="codes")
    with pytest.raises(UserError, match="output='semantic' must be one of both, pixel"):
        DualTokenConfig(output="semantic")


# -- attention --


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
def test_a_token_sees_what_is_before_it_alone_in_new_and_in_opened_models(tmp_path, back_end):
    model, _ = tiny.mllm()
    assert model.llm.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    opened = DualTokenForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=back_end)
    assert opened.llm.config._attn_implementation == back_end
    ids = torch.arange(10, 22)[None]
    other = ids.clone()
    other[0, 6] = 40
    for one in (model, opened):
        moved = (logits_of(one, {"input_ids": other}) - logits_of(one, {"input_ids": ids})).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [t >= 6 for t in range(12)]


@pytest.fixture
def flash_in_torch(monkeypatch):
    """Flash attention as transformers calls it, computed by torch, as its kernels need a GPU; the calls by kind."""
    calls = Counter()

    def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        calls["plain"] += 1
        return attend(q, k, v, softmax_scale, causal)

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        calls["packed"] += 1
        pieces = [slice(a, b) for a, b in pairwise(cu_seqlens_q.tolist())]
        return torch.cat([attend(q[None, p], k[None, p], v[None, p], softmax_scale, causal)[0] for p in pieces])

    def attend(q, k, v, scale, causal):
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(
        modeling_flash_attention_utils, "_lazy_imports", lambda *args, **kwargs: (flash, varlen, None, None, None)
    )
    yield calls
    modeling_flash_attention_utils._loaded_implementation = None


@pytest.mark.parametrize("back_end", ["sdpa", "eager", "flex_attention", "flash_attention_2"])
def test_a_packed_batch_has_the_loss_of_its_samples_alone(back_end, flash_in_torch):
    model, processor = tiny.mllm()
    if back_end == "flash_attention_2":
        model.llm.config._attn_implementation = back_end  # asked for by its setter it would have to be installed
    else:
        model.llm.set_attn_implementation(back_end)
    tokens = [processor.encode(s) for s in (sample(0), sample(1, 0, 1), sample(2, 1, 0), sample(3, 0, 2))]
    packed = pack(tokens, 96, processor.tokenizer.pad_token_id)
    assert 1 < packed.input_ids.shape[0] < len(tokens)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        out = model(**packed.inputs)
        text, drawn, pixel, semantic = 0, 0, 0, 0
        words = 0
        for one in tokens:
            alone = model(one.ids[None], codes=one.codes, labels=one.labels[None])
            spoken, positions = int((one.labels >= 0).sum()), int((one.ids == model.config.draw_start_id).sum()) * 4
            text, words = text + alone.text * spoken, words + spoken
            pixel, semantic = pixel + alone.pixel * positions, semantic + alone.semantic * positions
            drawn += positions
    assert torch.allclose(out.text, text / words, atol=1e-5)
    assert torch.allclose(out.pixel, pixel / drawn, atol=1e-5)
    assert torch.allclose(out.semantic, semantic / drawn, atol=1e-5)
    assert (flash_in_torch["packed"] > 0) == (back_end == "flash_attention_2")


@torch.no_grad()
def test_padding_on_the_left_changes_nothing():
    model, processor = tiny.mllm()
    chats = [CHAT, [{"role": "user", "content": "draw a picture of a red circle and a blue star"}]]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True)
    mask = inputs["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(inputs["input_ids"], inputs["pixel_values"], attention_mask=mask, position_ids=places).logits
    for row, chat in enumerate(chats):
        alone = model(**processor.apply_chat_template(chat, add_generation_prompt=True)).logits
        assert torch.allclose(together[row, mask[row] > 0], alone[0], atol=1e-5)


@torch.no_grad()
def test_pictures_and_their_codes_are_the_same_to_the_model():
    model, processor = tiny.mllm()
    inputs = processor(f"{START}<|image_pad|>{END}<|im_start|>", RED)
    codes = model.look(inputs["pixel_values"])
    assert codes.pixel.shape == codes.semantic.shape == (1, 4, 2)
    assert torch.equal(model(**inputs).logits, model(inputs["input_ids"], codes=codes).logits)


# -- parts that do not fit --


@pytest.mark.parametrize(
    ("text", "images", "words"),
    [
        (START + PADS + END, 2, "4 image placeholders, 2 images of 4 positions need 8"),
        (START + PADS + "<|image_pad|>" + END, 1, "5 image placeholders, 1 images of 4 positions need 4"),
        (START + PADS + END, 0, "4 image placeholders, 0 images of 4 positions need 0"),
        ("no picture", 1, "0 image placeholders, 1 images of 4 positions need 4"),
    ],
)
def test_placeholders_that_do_not_fit_the_images_are_one_line(text, images, words):
    model, processor = tiny.mllm()
    ids = torch.tensor([processor.tokenizer.encode(text)])
    for codes in [codes_of(images)] if images else [None, codes_of(1)[:0]]:
        with pytest.raises(UserError, match=words):
            model(ids, codes=codes)


def narrow(**changes):
    return BranchConfig(QuantizerConfig(**{"codebook_size": 16, "code_dim": 8, "depth": 2} | changes))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"branch": narrow(codebook_size=32)}, "pixel codebook 32 x depth 2 there, 16 x depth 2 in the model"),
        ({"branch": narrow(depth=3)}, "pixel codebook 16 x depth 3 there, 16 x depth 2 in the model"),
        ({"backbone": BackboneConfig(tiny.BACKBONE.name, tiny.OVERRIDES | {"img_size": 24}, pixel_layer=1)},
         "positions 9 there, 4 in the model"),
        ({"backbone": BackboneConfig(tiny.BACKBONE.name, tiny.OVERRIDES | {"embed_dim": 64}, pixel_layer=1)},
         "width 64 there, 32 in the model"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_does_not_match_is_one_line(other, words):
    model, _ = tiny.mllm()
    own = model.vision_tokenizer
    with pytest.raises(UserError, match=f"the tokenizer does not match the model: .*{words}"):
        model.attach(tiny.tokenizer(**other))
    assert model.vision_tokenizer is own


def test_sums_of_another_width_do_not_match():
    model, _ = tiny.mllm(projector=ProjectorConfig(sums=True))
    with pytest.raises(UserError, match="pixel codes of width 16 there, 8 in the model"):
        model.attach(tiny.tokenizer(branch=narrow(code_dim=16)))


def test_training_leaves_the_vision_tokenizer_as_it_is():
    model, processor = tiny.mllm()
    before = {k: v.clone() for k, v in model.vision_tokenizer.state_dict().items()}
    assert model.train() is model and model.training and model.llm.training and model.projector.training
    assert not any(m.training for m in model.vision_tokenizer.modules())
    assert not any(p.requires_grad for p in model.vision_tokenizer.parameters())
    inputs = processor(f"{START}<|image_pad|>{END}", RED)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(torch.equal(v, before[k]) for k, v in model.vision_tokenizer.state_dict().items())
    other = tiny.tokenizer(seed=1).train()
    model.attach(other)
    assert not other.training and not any(p.requires_grad for p in other.parameters())
    assert not model.eval().llm.training


@torch.no_grad()
def test_class_tokens_are_not_for_the_llm(tmp_path):
    tiny.tokenizer(BackboneConfig("vit_base_patch16_clip_224", tiny.OVERRIDES)).save_pretrained(tmp_path)
    llm, text = small_llm(tiny.WORDS, tiny.LLM)
    model, processor = from_parts(str(tmp_path), llm, text, ModelConfig(tiny.HEAD))
    assert model.look(tiny.images(1)).semantic.shape == (1, 4, 2)
    inputs = batch(processor, [sample()])
    longer = DualCodes(inputs["codes"].pixel, torch.cat([codes_of(3, 5).semantic[:, :1], inputs["codes"].semantic], 1))
    assert torch.equal(logits_of(model, inputs | {"codes": longer}), logits_of(model, inputs))
    assert torch.equal(model(**inputs | {"codes": longer}).loss, model(**inputs).loss)
