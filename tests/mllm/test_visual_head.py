from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.generation.sampling import HeadSampling, guide, keep_likely, sample
from dualtoken.mllm.projector import Projector, ProjectorConfig
from dualtoken.mllm.visual_head import VisualHead, VisualHeadConfig
from tests import tiny

FIXTURE = Path(__file__).parents[1] / "fixtures/vilau_depth/head.safetensors"
CONFIG = VisualHeadConfig(codebook_size=12, depth=3, width=16, layers=2, heads=2, embed_dim=8)


def head(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    made = VisualHead(20, config)
    with torch.no_grad():  # norms and biases at their starts would hide a mistake
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made.eval()


def batch(rows=5, config=CONFIG):
    torch.manual_seed(1)
    return torch.randn(rows, 20), torch.randint(config.codebook_size, (rows, config.depth))


def attention_by_torch(block):
    """torch's own attention with the weights of a block."""
    width = block.out.in_features
    attention = torch.nn.MultiheadAttention(width, block.heads, batch_first=True)
    attention.in_proj_weight, attention.in_proj_bias = block.qkv.weight, block.qkv.bias
    attention.out_proj = block.out
    return attention.eval()


def plain_logits(made, hidden, codes):
    """Section 3.3 row by row and depth by depth, from the weights alone: logits [M, D, K]."""
    rows = []
    for state, chosen in zip(hidden, codes.tolist(), strict=True):
        first, _, second = made.projector
        inputs = [second(F.gelu(first(state)))]
        for d in range(1, len(chosen)):
            inputs.append(made.embed_in(sum(made.embedding.weight[code] for code in chosen[:d])))  # eq. 5
        x = torch.stack(inputs) + made.positions
        for block in made.blocks:
            normed = F.layer_norm(x, x.shape[-1:], block.norm.weight, block.norm.bias, 1e-6)
            later = torch.ones(len(x), len(x)).triu(1).bool()
            x = x + attention_by_torch(block)(normed, normed, normed, attn_mask=later, need_weights=False)[0]
            x = x + block.mlp(x)
        x = F.layer_norm(x, x.shape[-1:], made.norm.weight, made.norm.bias, 1e-6)
        rows.append(torch.stack([made.classifiers[d].weight @ x[d] for d in range(len(x))]))
    return torch.stack(rows)


@torch.no_grad()
def test_forward_is_the_plain_restatement():
    made, (hidden, codes) = head(), batch()
    logits = made(hidden, codes)
    assert logits.shape == (5, 3, 12)
    assert torch.allclose(logits, plain_logits(made, hidden, codes), atol=1e-5)


@torch.no_grad()
def test_steps_give_the_logits_of_the_whole():
    made, (hidden, codes) = head(), batch()
    state, given, steps = made.start(), hidden, []
    for depth in range(CONFIG.depth):
        steps.append(made.step(state, given))
        given = codes[:, depth]
    assert torch.allclose(torch.stack(steps, 1), made(hidden, codes), atol=1e-5)


@torch.no_grad()
def test_a_depth_sees_the_codes_before_it_and_no_other():
    made, (hidden, codes) = head(), batch()
    before = made(hidden, codes)
    for depth in range(CONFIG.depth):
        changed = codes.clone()
        changed[:, depth] = (codes[:, depth] + 1) % CONFIG.codebook_size
        moved = (made(hidden, changed) - before).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [d > depth for d in range(CONFIG.depth)]


@torch.no_grad()
def test_sums_before_a_depth_do_not_know_the_order_of_codes():
    made, (hidden, codes) = head(), batch()
    swapped = codes[:, [1, 0, 2]]
    last = made(hidden, codes)[:, 2] - made(hidden, swapped)[:, 2]
    assert last.abs().max() > 1e-4  # depth 2 differs, and depth 3 attends to it ...
    for block in made.blocks:
        block.out.weight.zero_()
    assert torch.allclose(made(hidden, codes)[:, 2], made(hidden, swapped)[:, 2], atol=1e-5)  # ... its input does not


def test_every_depth_has_its_own_classifier():
    made, (hidden, codes) = head(), batch()
    assert len({id(c.weight) for c in made.classifiers}) == CONFIG.depth
    before = made(hidden, codes)
    with torch.no_grad():
        made.classifiers[1].weight.zero_()
    after = made(hidden, codes)
    assert torch.equal(after[:, 1], torch.zeros(5, 12))
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    made.loss(hidden, codes)[2].backward()
    assert made.classifiers[2].weight.grad.abs().sum() > 0
    assert made.classifiers[0].weight.grad is None or not made.classifiers[0].weight.grad.any()


def test_depths_with_codebooks_of_their_own_have_embeddings_of_their_own():
    made = head(replace(CONFIG, shared_embedding=False))
    assert made.embedding.num_embeddings == CONFIG.depth * CONFIG.codebook_size
    hidden, codes = batch()
    codes[:] = 1
    with torch.no_grad():
        before = made(hidden, codes)
        made.embedding.weight[1] += 1.0  # code 1 of the first depth: seen from the second depth on
        after = made(hidden, codes)
        assert torch.equal(before[:, 0], after[:, 0]) and not torch.allclose(before[:, 1], after[:, 1])
        made.embedding.weight[CONFIG.codebook_size + 1] += 1.0  # of the second: seen from the third on
        last = made(hidden, codes)
        assert torch.equal(after[:, :2], last[:, :2])
        assert CONFIG.depth < 3 or not torch.allclose(after[:, 2], last[:, 2])
        state, given = made.start(), hidden
        for depth in range(CONFIG.depth):
            torch.testing.assert_close(made.step(state, given), last[:, depth])
            given = codes[:, depth]


def test_loss_is_cross_entropy_by_depth_summed_over_positions():
    made, (hidden, codes) = head(), batch()
    logits = plain_logits(made, hidden, codes).log_softmax(-1)
    wanted = [-sum(logits[m, d, codes[m, d]] for m in range(5)) for d in range(3)]
    assert torch.allclose(made.loss(hidden, codes), torch.stack(wanted), rtol=1e-5)


def test_loss_made_again_in_pieces_has_the_same_gradients(monkeypatch):
    monkeypatch.setattr("dualtoken.mllm.visual_head.PIECE", 3)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        head = VisualHead(24, VisualHeadConfig(32, 3, 16, 2, 2, 8))
        head.recompute = again
        hidden = torch.randn(7, 24, requires_grad=True)
        codes = torch.randint(32, (7, 3))
        loss = head.loss(hidden, codes)
        assert loss.shape == (3,)
        (loss @ torch.tensor([1.0, 0.5, 0.2])).backward()
        found.append([loss.detach(), hidden.grad, *(p.grad for p in head.parameters())])
    for plain, pieces in zip(*found, strict=True):
        torch.testing.assert_close(plain, pieces, atol=1e-5, rtol=1e-5)


def test_one_depth_is_allowed_and_odd_widths_are_not():
    config = VisualHeadConfig(codebook_size=12, depth=1, width=16, layers=1, heads=2, embed_dim=8)
    made, (hidden, codes) = head(config), batch(config=config)
    assert made(hidden, codes).shape == (5, 1, 12)
    with pytest.raises(UserError, match=r"head\.width 10 must be a multiple of head\.heads 4"):
        VisualHeadConfig(width=10, heads=4)


# -- against VILA-U's head (tests/fixtures/vilau_depth/README.md) --


@torch.no_grad()
def test_inputs_of_depths_are_vila_us_cumulated_code_embeddings():
    stored = load_file(FIXTURE)
    codes = stored["tf.codes"].flatten(0, 1)
    made = head(VisualHeadConfig(codebook_size=97, depth=4, width=16, layers=1, heads=2, embed_dim=24))
    made.embedding.weight.copy_(stored["codebook"])
    seen = []
    made.embed_in.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    made(torch.randn(len(codes), 20), codes)
    wanted = stored["tf.code_embeds_cumsum"].flatten(0, 1)
    assert torch.allclose(seen.pop(), wanted[:, :3], atol=1e-6)
    state = made.start()
    made.step(state, torch.randn(len(codes), 20))
    for depth in range(3):
        made.step(state, codes[:, depth])
        assert torch.allclose(seen.pop(), wanted[:, depth], atol=1e-6)


VILA_U = VisualHeadConfig(
    codebook_size=96, depth=4, width=48, layers=3, heads=4, embed_dim=24, gated=False, shared_classifier=True,
    linear_projector=True,
)  # fmt: skip


def vila_u():
    """Our head with VILA-U's weights; its codebook is the code embedding."""
    stored = load_file(FIXTURE.parent / "weights.safetensors")
    ours = {"embedding.weight": stored.pop("quantizer.codebooks.0.weight")[:-1]}
    theirs = {k.removeprefix("rqtransformer."): v for k, v in stored.items()}
    ours["positions"] = theirs.pop("pos_emb_d")[0]
    table = {"in_mlp_2": "projector", "in_mlp_1": "embed_in", "classifier_mlp.layer_norm": "norm",
             "classifier_mlp.linear": "classifiers.0"}  # fmt: skip
    for layer in range(3):
        block = f"head_transformer.blocks.{layer}"
        parts = {"ln1": "norm", "attn.proj": "out", "ln2": "mlp.0", "mlp.0": "mlp.1", "mlp.2": "mlp.3"}
        table |= {f"{block}.{a}": f"blocks.{layer}.{b}" for a, b in parts.items()}
        for kind in ("weight", "bias"):
            joined = [theirs.pop(f"{block}.attn.{part}.{kind}") for part in ("query", "key", "value")]
            ours[f"blocks.{layer}.qkv.{kind}"] = torch.cat(joined)
    for key, value in theirs.items():
        name, _, kind = key.rpartition(".")
        ours[f"{table[name]}.{kind}"] = value
    made = VisualHead(64, VILA_U).eval()
    made.load_state_dict(ours)
    return made


@torch.no_grad()
def test_with_its_weights_the_head_gives_vila_us_logits_and_loss():
    stored, made = load_file(FIXTURE) | load_file(FIXTURE.parent / "io.safetensors"), vila_u()
    hidden, codes = stored["tf.hidden"].flatten(0, 1), stored["tf.codes"].flatten(0, 1)
    torch.testing.assert_close(made(hidden, codes), stored["tf.logits"].flatten(0, 1), atol=1e-4, rtol=0)
    assert made.loss(hidden, codes).sum() / codes.numel() == pytest.approx(float(stored["tf.loss"]), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("run", "scale"), [("cfg3", 3.0), ("cfg1", 1.0)])
def test_step_by_step_under_guidance_it_draws_vila_us_codes(run, scale):
    stored, made = load_file(FIXTURE) | load_file(FIXTURE.parent / "io.safetensors"), vila_u()
    state, given = made.start(), stored["gen.hidden"][:, 0]
    for depth in range(4):
        logits = guide(made.step(state, given), scale)
        torch.testing.assert_close(logits, stored[f"gen.{run}.logits"][:, depth], atol=2e-4, rtol=0)
        given = logits.argmax(-1).repeat(2)  # the same code with and without the prompt
        assert torch.equal(given, stored[f"gen.{run}.codes"][:, 0, depth])


def test_guidance_is_vila_us():
    stored = load_file(FIXTURE)
    before = stored["gen.cfg1.teacher_forced_logits"][:, 0]  # [6, D, K], first half with the prompt
    for depth in range(4):
        assert torch.allclose(guide(before[:, depth], 1.0), stored["gen.cfg1.logits"][:, depth], atol=1e-5)
    assert torch.allclose(guide(before[:, 0], 3.0), stored["gen.cfg3.logits"][:, 0], atol=1e-5)  # no code before it
    for run in ("cfg1", "cfg3"):
        greedy = [sample(stored[f"gen.{run}.logits"][:, d], HeadSampling(0.0), torch.zeros(3)) for d in range(4)]
        assert torch.equal(torch.stack(greedy, -1), stored[f"gen.{run}.codes"][:3, 0])


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (HeadSampling(1.0, 10, 1.0), "filter.top_k10_logits"),
        (HeadSampling(1.0, 0, 0.96), "filter.top_p96_probs"),
        (HeadSampling(1.0, 10, 0.96), "filter.top_k10_then_p96_probs"),
    ],
)
def test_top_k_and_top_p_are_vila_us(sampling, name):
    stored = load_file(FIXTURE)
    wanted = stored[name].softmax(-1) if "logits" in name else stored[name]
    probabilities, codes = keep_likely(stored["filter.logits"], sampling)
    found = torch.zeros_like(wanted).scatter(1, codes, probabilities)
    assert torch.equal(found > 0, wanted > 0)
    assert torch.allclose(found, wanted, atol=1e-6)


# -- the projector of what is seen --


def both(order, places=False, width=32):
    torch.manual_seed(0)
    return Projector(6, width, 4, ProjectorConfig(order, places)), torch.randn(2, 4, 6), torch.randn(2, 4, 6)


def layers(part, x):
    return part[2](F.gelu(part[0](x)))


def normal(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def test_concat_first_joins_features_then_projects():
    made, pixel, semantic = both("concat_first")
    seen = normal(pixel), normal(semantic)
    joined = torch.stack([torch.cat([seen[0][m, n], seen[1][m, n]]) for m in range(2) for n in range(4)])
    assert made.joint[0].in_features == 12
    assert torch.allclose(made(pixel, semantic).flatten(0, 1), layers(made.joint, joined), atol=1e-6)


@pytest.mark.parametrize("width", [32, 33])
def test_project_first_gives_each_vocabulary_half_of_the_width(width):
    made, pixel, semantic = both("project_first", width=width)
    out = made(pixel, semantic)
    assert out.shape == (2, 4, width)
    assert torch.allclose(out[..., :16], layers(made.pixel, normal(pixel)), atol=1e-6)
    assert torch.allclose(out[..., 16:], layers(made.semantic, normal(semantic)), atol=1e-6)


def test_places_add_what_is_learnt_for_a_position_also_step_by_step():
    made, pixel, semantic = both("concat_first", places=True)
    out, bare = made(pixel, semantic), layers(made.joint, torch.cat([normal(pixel), normal(semantic)], -1))
    for n in range(4):
        assert torch.allclose(out[:, n], bare[:, n] + made.places[n], atol=1e-6)
        step = made(pixel[:, n : n + 1], semantic[:, n : n + 1], first=n)
        assert torch.allclose(step[:, 0], out[:, n], atol=1e-6)


def test_sums_are_shown_as_they_are_behind_the_normalised_features():
    torch.manual_seed(0)
    made = Projector(6, 8, 4, ProjectorConfig(sums=True), (3, 2))
    pixel, semantic = torch.randn(2, 4, 9), torch.randn(2, 4, 8)
    joined = [normal(pixel[..., :6]), pixel[..., 6:], normal(semantic[..., :6]), semantic[..., 6:]]
    assert torch.allclose(made(pixel, semantic), layers(made.joint, torch.cat(joined, -1)), atol=1e-6)
    model, _ = tiny.mllm(projector=ProjectorConfig(sums=True))
    codes = DualCodes(*(torch.randint(16, (2, 4, 2)) for _ in range(2)))
    for name, seen in zip(("pixel", "semantic"), model.features(codes), strict=True):
        branch = getattr(model.vision_tokenizer, name)
        rows = branch.quantizer.codebook.weight[getattr(codes, name)].sum(-2)
        assert torch.equal(seen, torch.cat([branch.lookup(getattr(codes, name)), rows], -1))


def test_features_of_any_scale_give_the_same_embeds():
    made, pixel, semantic = both("concat_first")
    assert torch.allclose(made(pixel, 100 * semantic + 3), made(pixel, semantic), atol=1e-3)


def test_unknown_order_is_one_line():
    with pytest.raises(UserError, match=r"projector\.order='last' must be 'concat_first' or 'project_first'"):
        Projector(6, 8, 4, ProjectorConfig("last"))


@pytest.mark.parametrize("order", ["concat_first", "project_first"])
def test_whole_models_have_either_projector(order):
    model, processor = tiny.mllm(projector=ProjectorConfig(order, places=True))
    inputs = processor("<|vision_start|><|image_pad|><|vision_end|>", [tiny.images(1)[0].byte().numpy()])
    with torch.no_grad():
        before = model(**inputs).logits
        model.projector.places.data[2] += 1
        moved = (model(**inputs).logits - before).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False, False, False, True, True, True]  # position 2 and what comes after it
