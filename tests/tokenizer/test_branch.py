import pytest
import torch
from safetensors.torch import load_file

from dualtoken.core.errors import UserError
from dualtoken.tokenizer.branch import AttentionCache, AttentionProjection, Branch, BranchConfig, FixedCache
from dualtoken.tokenizer.convert import projection_name
from dualtoken.tokenizer.quantizer import QuantizerConfig
from tests.tokenizer.reference import FIXTURE, stored_state

CODES = QuantizerConfig(codebook_size=32, code_dim=8, depth=3)


@pytest.fixture
def features():
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))


def test_lookup_of_codes_equals_forward(features):
    torch.manual_seed(0)
    branch = Branch(32, BranchConfig(CODES)).eval()
    result = branch(features)
    assert result.features.shape == (2, 9, 32)
    assert torch.equal(result.codes, branch.encode(features))
    assert torch.equal(result.features, branch.lookup(result.codes))


def test_before_sees_all_positions_after_sees_only_the_past(features):
    torch.manual_seed(0)
    down, up = AttentionProjection(32, 8, causal=False), AttentionProjection(32, 64, causal=True)
    changed = features.clone()
    changed[:, -1] = features[:, -1].flip(-1)
    assert not torch.allclose(down(features)[:, 0], down(changed)[:, 0])
    assert torch.allclose(up(features)[:, :-1], up(changed)[:, :-1], atol=1e-6)


@torch.no_grad()
def test_step_by_step_equals_at_once(features):
    torch.manual_seed(0)
    up, cache = AttentionProjection(32, 64, causal=True).eval(), AttentionCache()
    steps = [up.step(features[:, n : n + 1], cache) for n in range(9)]
    assert torch.allclose(torch.cat(steps, 1), up(features), atol=1e-5)
    at = torch.zeros(1, dtype=torch.int64)
    fixed = FixedCache(up, 2, 12, at)  # room for more than there will be
    for n, step in enumerate(steps):
        at.fill_(n)
        assert torch.allclose(up.step(features[:, n : n + 1], fixed), step, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(up.step(features[:, -1:], fixed).float(), steps[-1], atol=0.05)
    with pytest.raises(UserError, match="causal"):
        AttentionProjection(32, 8, causal=False).step(features[:, :1], AttentionCache())


def test_every_parameter_learns(features):
    torch.manual_seed(0)
    branch = Branch(32, BranchConfig(CODES, shortcut_scale=0.6))
    result = branch(features, features.flip(0))
    (result.features.square().mean() + result.commitment).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branch.parameters())


def test_mistakes_are_named(features):
    with pytest.raises(UserError, match="shortcut_scale"):
        Branch(32, BranchConfig(CODES, shortcut_scale=0.6))(features)
    with pytest.raises(UserError, match="code_dim 8 must divide the backbone's width 36"):
        Branch(36, BranchConfig(CODES))


@pytest.mark.parametrize(
    ("part", "source", "target"),
    [
        ("prequant_pix", "hidden_6", "prequant_pix_out"),
        ("prequant_shortcut", "hidden_4", "prequant_shortcut_out"),
        ("prequant_sem", "hidden_7", "latent_sem_prequant"),
        ("postquant_sem", "latent_sem_quantised", "zq_sem_postquant"),
    ],
)
def test_projection_equals_the_reference(part, source, target):
    stored, io = stored_state(), load_file(FIXTURE / "infer.safetensors")
    parts = {projection_name(k.removeprefix(f"{part}.")): v for k, v in stored.items() if k.startswith(f"{part}.")}
    assert not parts.pop(None).any()
    x, expected = (io[name].flatten(1, -2) for name in (source, target))
    projection = AttentionProjection(x.shape[-1], expected.shape[-1], causal=part.startswith("post"))
    projection.load_state_dict(parts, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(projection(x), expected, atol=1e-4, rtol=1e-4)
