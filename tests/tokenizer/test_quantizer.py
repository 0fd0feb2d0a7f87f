import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dualtoken.analysis.cost import AliveTensors
from dualtoken.core.errors import UserError
from dualtoken.tokenizer.quantizer import QuantizerConfig, ResidualQuantizer, nearest_codes

TINY = {"codebook_size": 32, "code_dim": 8, "depth": 3}


def quantizer(**changes):
    torch.manual_seed(0)
    return ResidualQuantizer(QuantizerConfig(**{**TINY, **changes}))


def batch(seed, rows=12):
    return torch.randn(4, rows, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nearest_code_equals_brute_force_for_any_chunk(chunk):
    x, weight = torch.randn(50, 8), torch.randn(20, 8)
    assert torch.equal(nearest_codes(x, weight, chunk), torch.cdist(x.double(), weight.double()).argmin(1))


@pytest.mark.parametrize("codes", [100, 256, 1024])
def test_nearest_code_is_the_first_of_equal_ones_whether_or_not_the_codebook_falls_into_runs(codes):
    weight = torch.randint(-3, 4, (codes, 2)).float()  # 49 different rows; arithmetic is exact
    x = torch.randint(-3, 4, (300, 2)).float()
    wanted = [next(k for k, row in enumerate(weight) if torch.equal(row, one)) if (weight == one).all(1).any() else None
              for one in x]  # fmt: skip
    found = nearest_codes(x, weight, 64).tolist()
    assert sum(w is not None for w in wanted) > 200
    assert all(f == w for f, w in zip(found, wanted, strict=True) if w is not None)


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_lookup_of_codes_is_the_quantised_value(kind):
    rvq, x = quantizer(codebook=kind).eval(), batch(1)
    result = rvq(x)
    assert torch.equal(result.codes, rvq.encode(x))
    assert torch.equal(result.quantized, rvq.lookup(result.codes))
    errors = [(x - rvq.lookup(result.codes[..., :d])).square().mean() for d in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    assert torch.allclose(result.commitment, torch.stack(errors).mean())


def test_codes_of_first_depths_do_not_depend_on_the_number_of_depths():
    deep, shallow, x = quantizer(depth=5), quantizer(depth=2), batch(1)
    assert torch.equal(deep.encode(x)[..., :2], shallow.encode(x))


def test_gradient_passes_straight_through_and_commitment_pulls():
    rvq, x = quantizer().eval(), batch(1).requires_grad_()
    rvq(x).quantized.mul(3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))
    x.grad = None
    rvq(x).commitment.backward()
    sums = [rvq.lookup(rvq.encode(x)[..., :d]) for d in (1, 2, 3)]
    assert torch.allclose(x.grad, sum(2 * (x - s) for s in sums).detach() / (3 * x.numel()), atol=1e-7)


def test_ema_step_equals_a_one_hot_restatement():
    rvq, x = quantizer(restart_below=0.0), batch(2)
    old = rvq.codebook.weight.clone()
    codes = rvq(x).codes
    counts, sums, residual = torch.zeros(32), torch.zeros(32, 8), x.reshape(-1, 8)
    for depth in range(3):
        hot = torch.nn.functional.one_hot(codes[..., depth].flatten(), 32).float()
        counts, sums = counts + hot.sum(0), sums + hot.t() @ residual
        residual = residual - hot @ old
    size = 0.99 + 0.01 * counts
    assert torch.allclose(rvq.codebook.cluster_size, size)
    assert torch.allclose(rvq.codebook.weight, (0.99 * old + 0.01 * sums) / size[:, None], atol=1e-6)


def test_unused_rows_restart_inside_the_batch_without_global_random_state():
    rvq, x = quantizer(depth=1, restart_below=0.995, codebook_size=200), batch(3)
    state = torch.get_rng_state()
    used = rvq(x).codes
    assert torch.equal(state, torch.get_rng_state())
    restarted = torch.ones(200, dtype=torch.bool).index_fill_(0, used.flatten(), False)
    assert restarted.sum() > 150
    assert (
        torch.cdist(rvq.codebook.weight[restarted], x.reshape(-1, 8), compute_mode="donot_use_mm_for_euclid_dist")
        .min(1)
        .values.max()
        < 1e-3
    )


def test_training_uses_more_codes_and_errs_less():
    rvq = quantizer(codebook_size=64)
    before = rvq.eval()(batch(9)).commitment
    rvq.train()
    for seed in range(300):
        rvq(batch(seed % 7))
    after = rvq.eval()(batch(3))
    assert after.commitment < 0.8 * before
    assert (after.perplexity > 5).all()
    assert ((after.usage > 0) & (after.usage <= 1)).all()


def test_gradient_codebook_learns():
    rvq = quantizer(codebook="gradient")
    optimizer = torch.optim.Adam(rvq.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = rvq(batch(0)).codebook_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_saved_state_goes_on_bit_for_bit():
    first = quantizer(restart_below=0.5)
    for seed in range(60):
        first(batch(seed))
    second = quantizer(restart_below=0.5)
    second.load_state_dict(first.state_dict())
    for seed in range(60, 70):
        first(batch(seed))
        second(batch(seed))
    assert torch.equal(first.codebook.weight, second.codebook.weight)


@pytest.mark.parametrize(
    ("codes", "words"),
    [(torch.zeros(1, 2, 4, dtype=torch.int64), "4 depths"), (torch.full((1, 2, 3), 32), "reach 32")],
)
def test_foreign_codes_are_refused(codes, words):
    with pytest.raises(UserError, match=words):
        quantizer().lookup(codes)


def test_wrong_options_are_named():
    with pytest.raises(UserError, match=r"quantizer.decay=1.5"):
        QuantizerConfig(decay=1.5)


def _process(number, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    rvq = quantizer(restart_below=0.9)
    for seed in range(30):
        result = rvq(batch(seed)[2 * number : 2 * number + 2])
    torch.save({"state": rvq.state_dict(), "usage": result.usage}, f"{folder}/{number}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (0, 1))
    one = quantizer(restart_below=0.9)
    for seed in range(30):
        result = one(batch(seed))
    for name, value in one.state_dict().items():
        assert torch.equal(first["state"][name], second["state"][name])
        assert torch.allclose(first["state"][name], value, atol=1e-5)
    assert torch.equal(first["usage"], result.usage)


def test_memory_of_encoding_does_not_grow_with_the_rows(monkeypatch):
    quantizer = ResidualQuantizer(QuantizerConfig(codebook_size=32, code_dim=8, depth=4, chunk=16)).eval()
    rows = torch.randn(1, 1024, 8, generator=torch.Generator().manual_seed(0))
    whole = quantizer.encode(rows)
    monkeypatch.setattr("dualtoken.tokenizer.quantizer.ROWS", 64)
    extra = []
    for count in (128, 1024):
        with AliveTensors([rows, *quantizer.buffers()]) as alive:
            before = alive.now
            codes = quantizer.encode(rows[:, :count])
        extra.append(alive.peak - before - codes.nbytes)
        assert torch.equal(codes, whole[:, :count])
    assert extra[0] == extra[1]
