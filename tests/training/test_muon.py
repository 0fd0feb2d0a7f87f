"""Muon beside AdamW: against torch's own in bfloat16, against exact orthogonal factors, and over a saved state."""

import copy
import shutil

import pytest
import torch
from torch import nn

from dualtoken.cli import main
from dualtoken.training.loop import Loop
from dualtoken.training.muon import MuonAdamW, orthogonal, split_groups
from dualtoken.training.stages import StageOptim
from tests.training.mllm_runs import differing, error, model_of, recipe, weights, write


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 16)
        self.first, self.second = nn.Linear(16, 40), nn.Linear(40, 16)
        self.classifiers = nn.ModuleList([nn.Linear(16, 12)])

    def loss(self, step: int) -> torch.Tensor:
        ids = torch.randint(12, (32,), generator=torch.Generator().manual_seed(step))
        x = self.second(torch.relu(self.first(self.embedding(ids))))
        return nn.functional.cross_entropy(self.classifiers[0](x), (ids * 5 + 1) % 12)


def build(net: nn.Module, kind: str = "muon", rate: float = 2e-2) -> torch.optim.AdamW:
    names = {p: name for name, p in net.named_parameters()}
    groups = [{"params": list(net.parameters()), "lr": rate, "rate": rate}]
    return StageOptim(kind=kind, weight_decay=0.1).build(groups, names)


def take(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = net.loss(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_orthogonal_keeps_directions_and_makes_all_of_nearly_one_size(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ orthogonal(matrices, 9) @ right.mT  # of the same singular vectors: diagonal
    sizes = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(sizes)).abs().max() < 1e-3
    assert sizes.min() > 0.6 and sizes.max() < 1.3


@pytest.mark.parametrize("shape", [(32, 32), (24, 64), (64, 24)])
def test_a_step_is_that_of_torchs_own_muon_within_its_16_bits(shape):
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.1}
    mine = MuonAdamW([{"params": [ours], "muon": True}], iterations=5, **options)
    reference = torch.optim.Muon([theirs], momentum=0.95, ns_steps=5, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        before = ours.detach().clone()
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
        taken = (ours - before).norm()
        assert (ours - theirs).norm() < 0.05 * taken
        theirs.data.copy_(ours.data)


def test_tables_classifiers_and_vectors_take_adamws_steps():
    plain, mixed = Net(), Net()
    adamw, muon = build(plain, "adamw"), build(mixed)
    assert type(adamw) is torch.optim.AdamW
    take(plain, adamw, range(1)), take(mixed, muon, range(1))  # the same gradients: one step only
    changed = {
        n for (n, p), q in zip(plain.named_parameters(), mixed.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert changed == {"first.weight", "second.weight"}


def test_groups_are_split_with_their_rates():
    net = Net()
    names = {p: name for name, p in net.named_parameters()}
    pairs = [{"params": [net.first.weight, net.first.bias], "rate": 1.0}, {"params": [net.second.bias], "rate": 2.0}]
    found = [(group["rate"], group["muon"], len(group["params"])) for group in split_groups(pairs, names)]
    assert found == [(1.0, True, 1), (1.0, False, 1), (2.0, False, 1)]


def test_it_learns_and_goes_on_from_a_saved_state_to_the_bit():
    whole, stopped = Net(), Net()
    optimizer = build(whole)
    losses = take(whole, optimizer, range(20))
    assert losses[-1] < 0.3 * losses[0]
    before = build(stopped)
    first = take(stopped, before, range(8))
    state, again = copy.deepcopy(before.state_dict()), build(stopped)
    again.load_state_dict(state)
    assert first + take(stopped, again, range(8, 20)) == losses
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), stopped.parameters(), strict=True))


def test_a_step_with_infinite_gradients_is_left_out_under_fp16():
    net = Net()
    optimizer, scaler = build(net), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in net.parameters()]
    scaler.scale(net.loss(0)).backward()
    net.second.weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0
    take(net, optimizer, range(1))
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_stage_trained_with_it_changes_the_same_parts_and_goes_on_to_the_bit(tmp_path, start, capsys):
    optim = {"kind": "muon", "warmup": 0.25}
    stage = recipe("4-1", steps=4)
    assert main(write(tmp_path / "whole", start, recipe=stage, optim=optim)) == 0
    names = differing(start, model_of(tmp_path / "whole", "4-1"))
    assert names == {name for name in weights(start) if not name.startswith("vision_tokenizer.")}
    assert main(write(tmp_path / "adamw", start, recipe=stage)) == 0
    assert differing(model_of(tmp_path / "whole", "4-1"), model_of(tmp_path / "adamw", "4-1"))
    assert main(write(tmp_path / "stopped", start, recipe=stage, optim=optim)) == 0
    folder = tmp_path / "stopped/run/stage-4-1"
    shutil.rmtree(folder / "states/step-00000004")
    shutil.rmtree(folder / "model")
    assert main(write(tmp_path / "stopped", start, recipe=stage, optim=optim)) == 0
    assert "going on from step 2" in capsys.readouterr().out
    assert not differing(*(model_of(tmp_path / name, "4-1") for name in ("whole", "stopped")))


def test_split_matrices_are_refused(tmp_path, start, monkeypatch, capsys):
    monkeypatch.setattr(Loop, "sharded", property(lambda self: True, lambda self, value: None), raising=False)
    assert main(write(tmp_path, start, "--optim.kind", "muon", recipe=recipe())) == 2
    assert "--optim.kind muon takes whole matrices: it does not go with FSDP; use adamw" in error(capsys)
