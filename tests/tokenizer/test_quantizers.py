"""What every kind of quantiser owes its users, and UniTok's own values for the multi-codebook one."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from dualtoken.app.info import info
from dualtoken.cli import main
from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_bytes
from dualtoken.eval.reconstruction import evaluate_reconstruction
from dualtoken.mllm.parts import ModelConfig, model_config, small_llm
from dualtoken.mllm.visual_head import VisualHead, VisualHeadConfig
from dualtoken.tokenizer.branch import BranchConfig
from dualtoken.tokenizer.library_quantizers import find_levels
from dualtoken.tokenizer.quantizer import QuantizerConfig, StraightThrough, entropy_loss
from dualtoken.tokenizer.quantizers import QUANTIZERS, build_quantizer
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer
from dualtoken.training.losses import LossConfig, generator_losses
from dualtoken.training.mllm import _attach
from dualtoken.training.tokenizer import set_trained, write_model
from tests import tiny

CASES = {
    "rvq": {"kind": "rvq"},
    "rvq-gradient": {"kind": "rvq", "codebook": "gradient"},
    "mcq": {"kind": "mcq", "entropy_weight": 0.1},
    "residual_lfq": {"kind": "residual_lfq"},
    "residual_lfq-4": {"kind": "residual_lfq", "code_dim": 4, "entropy_weight": 0.1},  # 4 signs: no projection
    "residual_fsq": {"kind": "residual_fsq"},
    "residual_fsq-levels": {"kind": "residual_fsq", "codebook_size": 18, "levels": [2, 3, 3]},
    "simvq": {"kind": "simvq"},
}
LIBRARY = [case for case in CASES if case.split("-")[0] in ("residual_lfq", "residual_fsq", "simvq")]
every_case = pytest.mark.parametrize("case", CASES)
every_kind = pytest.mark.parametrize("case", QUANTIZERS)


def config(case, **changes):
    return QuantizerConfig(**{"codebook_size": 16, "code_dim": 8, "depth": 2} | CASES[case] | changes)


def quantizer(case, seed=0, **changes):
    torch.manual_seed(seed)
    return build_quantizer(config(case, **changes)).eval()


def batch(like, seed=1):
    return torch.randn(4, 12, like.config.code_dim, generator=torch.Generator().manual_seed(seed))


def tokenizer(case, seed=0):
    return tiny.tokenizer(branch=BranchConfig(config(case)), seed=seed)


def test_every_kind_is_tested():
    assert {options["kind"] for options in CASES.values()} == set(QUANTIZERS) == set(QUANTIZERS) & set(CASES)


@every_case
@pytest.mark.parametrize("training", [False, True])
def test_results_have_the_sizes_of_the_config(case, training):
    q = quantizer(case).train(training)
    size, depth, x = q.config.codebook_size, q.config.depth, batch(q).bfloat16()
    result = q(x)
    assert result.quantized.shape == x.shape and result.quantized.dtype == torch.bfloat16
    assert result.codes.shape == (4, 12, depth) and result.codes.dtype == torch.int64
    assert result.codes.min() >= 0 and result.codes.max() < size
    assert result.commitment.shape == result.codebook_loss.shape == ()
    for d in range(depth):
        used = result.codes[..., d].unique(return_counts=True)[1] / 48
        assert result.usage[d] == pytest.approx(len(used) / size)
        assert result.perplexity[d] == pytest.approx(float((-used * used.log()).sum().exp()), rel=1e-4)


@every_case
def test_lookup_of_codes_is_the_quantised_value(case):
    q = quantizer(case)
    x, result = batch(q), q(batch(q))
    assert torch.equal(result.codes, q.encode(x))
    assert torch.equal(result.quantized, q.lookup(result.codes))
    assert len(result.quantized.flatten(0, 1).unique(dim=0)) > 4
    one = q.lookup(result.codes[2, 5])  # any leading sizes, as in drawing position by position
    assert one.shape == (q.config.code_dim,) and torch.allclose(one, result.quantized[2, 5], atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q.encode(x), result.codes)


@every_case
def test_weights_of_16_bits_give_nearly_the_same_codes(case):
    q = quantizer(case)
    x, codes = batch(q), q.encode(batch(q))
    half = q.bfloat16()
    result = half(x.bfloat16())
    assert (result.codes == codes).float().mean() > 0.8
    assert torch.equal(half.lookup(result.codes), result.quantized)


@pytest.mark.parametrize("case", [case for case in CASES if case != "mcq"])
def test_first_codes_are_those_of_a_shallower_residual_quantiser(case):
    deep, shallow = quantizer(case, depth=3), quantizer(case, 1, depth=2)
    wanted = shallow.state_dict().keys()
    shallow.load_state_dict({k: v for k, v in deep.state_dict().items() if k in wanted})
    codes = deep.encode(batch(deep))
    assert torch.equal(codes[..., :2], shallow.encode(batch(deep)))
    assert torch.equal(deep.lookup(codes[..., :2]), shallow.lookup(codes[..., :2]))
    assert not torch.equal(deep.lookup(codes[..., :2]), deep.lookup(codes))


def test_first_codes_of_mcq_are_the_first_parts():
    q = quantizer("mcq")
    codes = q.encode(batch(q))
    first = q.lookup(codes[..., :1])
    assert torch.equal(first[..., :4], q.lookup(codes)[..., :4]) and first[..., 4:].abs().max() == 0


@every_case
@pytest.mark.parametrize(("depths", "code", "words"), [(3, 0, "3 depths"), (2, 18, "reach 18"), (2, -1, "codebook")])
def test_foreign_codes_are_refused(case, depths, code, words):
    with pytest.raises(UserError, match=words):
        quantizer(case).lookup(torch.full((1, 2, depths), code))


@every_case
@pytest.mark.parametrize("training", [False, True])
def test_gradient_passes_straight_through(case, training):
    q = quantizer(case).train(training)
    x, probe = batch(q).requires_grad_(), batch(q, 2)
    (found,) = torch.autograd.grad((q(x).quantized * probe).sum(), x)
    if case in LIBRARY:  # as if nothing were between the two projections
        way = q._out(q._latent(x))
    elif case == "mcq":
        way = nn.functional.normalize(x.unflatten(-1, (2, 4)), dim=-1).flatten(2)
    else:
        way = x
    (wanted,) = torch.autograd.grad((way * probe).sum(), x)
    assert torch.allclose(found, wanted, atol=1e-6) and found.abs().min() > 0


@pytest.mark.parametrize("case", ["rvq", "rvq-gradient", "simvq", "residual_lfq-4"])
def test_commitment_is_that_of_eq_1(case):
    q = quantizer(case)
    x = batch(q).requires_grad_()
    sums = [q.lookup(q.encode(x)[..., :d]).detach() for d in (1, 2)]
    wanted = sum((x - s).square().mean() for s in sums) / 2
    found = q(x).commitment
    assert torch.allclose(found, wanted)
    assert torch.allclose(torch.autograd.grad(found, x)[0], torch.autograd.grad(wanted, x)[0], atol=1e-7)


@every_case
def test_training_keeps_what_the_input_says(case):
    """A decoder that learnt nothing from the codes would err by the variance; the input has two dimensions."""
    q = quantizer(case).train()
    width = q.config.code_dim
    x = batch(q)[..., :2] @ torch.randn(2, width)
    before, after = nn.Linear(width, width), nn.Linear(width, width)
    optimizer = torch.optim.Adam([*q.parameters(), *before.parameters(), *after.parameters()], 0.02)
    errors = []
    for _ in range(80):
        result = q(before(x))
        errors.append((after(result.quantized) - x).square().mean())
        optimizer.zero_grad()
        (errors[-1] + 0.25 * result.commitment + result.codebook_loss).backward()
        optimizer.step()
    assert errors[-1] < 0.3 * x.var() and errors[-1] < 0.5 * errors[0]


@every_case
def test_state_comes_back_bit_for_bit(case):
    first, second = quantizer(case), quantizer(case, 1)
    x = batch(first)
    for _ in range(3):
        first.train()(x)
    second.load_state_dict(first.eval().state_dict())
    assert torch.equal(first.encode(x), second.encode(x))
    assert torch.equal(first(x).quantized, second(x).quantized)


@every_case
def test_a_tokenizer_comes_back_from_its_directory(case, tmp_path):
    model, images = tokenizer(case), tiny.images(3)
    model.save_pretrained(tmp_path / "a")
    found = DualTokenVisionTokenizer.from_pretrained(tmp_path / "a")
    write_model(model, tmp_path / "b", torch.float16)
    half = DualTokenVisionTokenizer.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        codes, again = model.encode(images), found.encode(images)
        assert torch.equal(codes.pixel, again.pixel) and torch.equal(codes.semantic, again.semantic)
        assert torch.equal(model.decode(codes), found.decode(codes))
        pixel = model.pixel.quantizer.lookup(codes.pixel)
        assert torch.allclose(half.pixel.quantizer.lookup(codes.pixel), pixel, atol=0.02)
        assert (half.encode(images).pixel == codes.pixel).float().mean() > 0.5
    assert found.pixel.quantizer.config == config(case)


def test_a_config_from_before_there_were_kinds_is_of_residual_quantisers(tmp_path):
    model, images = tokenizer("rvq"), tiny.images(2)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for name in ("pixel", "semantic"):
        for new in ("kind", "levels", "entropy_weight", "entropy_temperature"):
            del stored[name]["quantizer"][new]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    found = DualTokenVisionTokenizer.from_pretrained(tmp_path)
    assert torch.equal(found.encode(images).pixel, model.encode(images).pixel)


@every_case
def test_a_step_of_training_moves_what_learns_and_nothing_else(case):
    model, images = tokenizer(case), tiny.images(4)
    teacher = torch.zeros(4, 4, 32), torch.zeros(4, 32)
    losses = LossConfig(perceptual=0.0, adversarial=0.0)

    def gradients(*trains):
        set_trained(model, trains)
        model.zero_grad()
        total = generator_losses(model(images), images, *teacher, losses, None, None, model.decoder.last_layer).total
        total.backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = gradients("backbone", "decoder")  # frozen vocabularies pass gradients on, and stand still
    assert {"decoder.conv_out.weight", "backbone.vit.blocks.0.mlp.fc1.weight"} <= found
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    found = gradients("backbone", "pixel", "semantic", "decoder")
    of_quantizers = {name for name, _ in model.named_parameters() if ".quantizer." in name}
    assert of_quantizers <= found and {"pixel.pre.projection.weight", "semantic.pre.projection.weight"} <= found
    torch.optim.SGD(model.parameters(), 0.01).step()
    after = model.state_dict()
    moved = {name for name in before if ".quantizer." in name and not torch.equal(before[name], after[name])}
    assert of_quantizers <= moved
    assert moved or case == "residual_lfq-4"  # the only one with nothing to learn


@every_kind
def test_storage_and_heads_follow_the_quantiser(case, tmp_path):
    vision = tokenizer(case)
    codes = vision.encode(tiny.images(3))
    codes.save(tmp_path / "codes.safetensors")
    assert torch.equal(DualCodes.load(tmp_path / "codes.safetensors")[0].pixel, codes.pixel)
    llm, _ = small_llm(tiny.WORDS, tiny.LLM)
    sizes = model_config(vision, llm.config, ModelConfig(head=tiny.HEAD), {}).pixel_head
    assert (sizes["codebook_size"], sizes["depth"]) == (16, 2)
    head = VisualHead(32, VisualHeadConfig(**sizes))
    assert head.loss(torch.randn(12, 32), codes.pixel.flatten(0, 1)).isfinite().all()


@pytest.fixture(scope="module")
def mllm():
    return tiny.mllm()[0]


@every_kind
def test_a_model_takes_its_own_tokenizer_and_no_other_of_the_same_sizes(case, mllm, monkeypatch):
    own, other = tokenizer(case), tokenizer(case, 1)
    there = {"own": tokenizer(case), "half": tokenizer(case).bfloat16().float(), "other": other}
    there["pixel"], there["semantic"] = tokenizer(case), tokenizer(case)
    there["pixel"].pixel, there["semantic"].semantic = other.pixel, other.semantic
    monkeypatch.setattr("dualtoken.training.mllm.open_tokenizer", lambda name, option: there[name])
    for name in ("own", "half"):
        mllm.attach(own)
        _attach(mllm, name, "start")
        assert mllm.vision_tokenizer is there[name]
    for name, words in (("other", "pixel"), ("pixel", "pixel"), ("semantic", "semantic")):
        mllm.attach(own)
        with pytest.raises(UserError, match=f"its {words} codebook is not the one"):
            _attach(mllm, name, "start")


def test_a_recipe_trains_another_kind_by_one_word(tmp_path, capsys):
    content = tiny.recipe(phases=[{"steps": 2}])
    content["pixel"] = {"quantizer": content["pixel"]["quantizer"] | {"kind": "mcq"}}
    content["semantic"] = {"quantizer": content["semantic"]["quantizer"] | {"kind": "residual_fsq"}}
    content["losses"] = {"adversarial": 0.0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    command = ["train-tokenizer", "--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]
    assert main(command) == 0
    info(str(tmp_path / "run/model"))
    text = capsys.readouterr().out
    assert "mcq of 16 codes, width 8, depth 2: 32 bits" in text and "residual_fsq of 16 codes" in text


@every_kind
def test_usage_counts_rows_of_all_codebooks(case):
    model, images = tokenizer(case), tiny.images(6)
    result = evaluate_reconstruction(model, [to_bytes(images)])
    codes = model.encode(images).pixel
    books = [codes.unique()] if case == "rvq" else [codes[..., d].unique() for d in range(2)]
    assert result.pixel_usage == pytest.approx(sum(len(book) for book in books) / (16 * len(books)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "vq"}, r"quantizer.kind='vq': the kinds are rvq, mcq, residual_lfq, residual_fsq, simvq"),
        ({"kind": "mcq", "depth": 3}, r"quantizer.code_dim=8 cannot be cut into quantizer.depth=3 .* multiple of 3"),
        ({"kind": "residual_lfq", "codebook_size": 1000}, "1000 is no power of two.* give 512 or 1024"),
        ({"kind": "residual_lfq", "codebook_size": 1}, "1 is no power of two.* give 2 or 4"),
        ({"kind": "residual_fsq", "codebook_size": 1009}, r"1009 is no product .* give 1008, or quantizer.levels"),
        ({"kind": "residual_fsq", "codebook_size": 2}, "2 is no product .* give 3"),
        ({"kind": "residual_fsq", "levels": [8, 5]}, "make 40 codes, .* is 16: .* quantizer.codebook_size 40"),
        ({"kind": "residual_fsq", "levels": [16, 1]}, "levels of at least 2"),
        ({"entropy_temperature": 0.0}, r"quantizer.entropy_temperature above 0"),
    ],
)
def test_sizes_that_a_kind_cannot_have_are_one_line_with_a_remedy(options, words):
    with pytest.raises(UserError, match=words) as found:
        build_quantizer(QuantizerConfig(**{"codebook_size": 16, "code_dim": 8, "depth": 2} | options))
    assert "\n" not in str(found.value)


def test_without_the_library_the_other_kinds_work_and_its_own_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    assert quantizer("rvq") and quantizer("mcq")
    for case in LIBRARY:
        with pytest.raises(UserError, match=r"vector-quantize-pytorch: pip install 'dualtoken\[quantizers\]'"):
            quantizer(case)


def test_levels_are_those_of_the_fsq_paper_where_they_can_be():
    for levels in ([8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 8, 8, 6, 5], [8, 8, 8, 5, 5, 5]):
        assert sorted(find_levels(int(torch.tensor(levels).prod()))) == sorted(levels)
    assert find_levels(16384) == [8, 8, 8, 8, 4] and find_levels(1009) is None


@pytest.mark.parametrize("case", LIBRARY)
def test_values_are_those_of_the_library(case):
    q = quantizer(case)
    x = batch(q)
    value, codes = q.inner(x)[:2]
    assert torch.equal(codes, q.encode(x)) and torch.allclose(value, q(x).quantized, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in LIBRARY if case != "simvq"])
def test_gradient_at_one_depth_is_that_of_the_library(case):
    q = quantizer(case, depth=1)
    x, probe = (0.3 * batch(q)).requires_grad_(), batch(q, 2)
    wanted, found = q.inner.train()(x)[0], q(x).quantized
    gradients = [torch.autograd.grad((value * probe).sum(), x)[0] for value in (wanted, found)]
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 0.1


def test_entropy_of_lfq_is_that_of_the_library():
    q, x = quantizer("residual_lfq-4", entropy_weight=1.0, depth=3), 0.05 * batch(quantizer("residual_lfq-4"))
    x = x.requires_grad_()
    found = q(x).codebook_loss
    for layer in q.inner.train().layers:
        layer.entropy_loss_weight = 1.0
    wanted = q.inner(x)[2].mean()
    assert torch.allclose(found, wanted, atol=1e-4) and abs(found) > 0.1
    (gradient,), (of_library,) = (torch.autograd.grad(value, x) for value in (found, wanted))
    assert torch.allclose(gradient, of_library, atol=1e-4 * gradient.abs().max()) and gradient.abs().max() > 0


MCQ = load_file(Path(__file__).parent.parent / "fixtures/unitok_mcq/mcq.safetensors")


def unitok(**options):
    q = build_quantizer(
        QuantizerConfig(kind="mcq", codebook_size=48, code_dim=32, depth=4, entropy_temperature=0.05, **options)
    )
    q.load_state_dict({"codebooks": MCQ["codebooks"]})
    return q


def test_codes_and_values_of_unitok():
    q = unitok()
    assert torch.equal(q.encode(MCQ["features"]), MCQ["codes"])
    assert torch.allclose(q.lookup(MCQ["codes"]), MCQ["quantized"], atol=1e-6)
    assert torch.allclose(q(MCQ["features"]).quantized, MCQ["quantized"], atol=1e-6)


@pytest.mark.parametrize(("weight", "name"), [(0.1, "with_entropy"), (0.0, "without_entropy")])
@pytest.mark.parametrize("training", [False, True])
def test_losses_and_gradients_of_unitok(weight, name, training):
    q, x = unitok(entropy_weight=weight).train(training), MCQ["features"].clone().requires_grad_()
    result = q(x)
    loss = 0.25 * result.commitment + result.codebook_loss
    assert torch.allclose(loss, MCQ["vq_loss"] + weight * MCQ["entropy_loss"], atol=1e-5)
    ((result.quantized * MCQ["probe"]).sum() + loss).backward()
    assert torch.allclose(x.grad, MCQ[f"{name}.grad_features"], atol=1e-5)
    assert torch.allclose(q.codebooks.grad, MCQ[f"{name}.grad_codebooks"], atol=1e-5)


def test_entropy_is_low_for_sure_and_varied_choices():
    rows = torch.eye(4)
    assert entropy_loss(rows, rows, 0.01) == pytest.approx(-torch.tensor(4.0).log().item(), abs=1e-3)
    assert entropy_loss(rows[:1].expand(4, 4), rows, 0.01) == pytest.approx(0.0, abs=1e-3)  # sure, but always the same


def test_straight_through_does_not_round():
    x, value = torch.full((1,), 1e8, requires_grad=True), torch.tensor([0.1])
    assert StraightThrough.apply(x, value) == value
    assert asdict(QuantizerConfig())["kind"] == "rvq"
