"""Kernels for a few rows against the layers they stand for, in Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

from dualtoken.mllm.visual_head import VisualHead, VisualHeadConfig

BEGIN = """
import torch
from torch import nn
from torch.nn import functional as F
torch.manual_seed(0)
torch.set_grad_enabled(False)
device = "cuda" if torch.cuda.is_available() else "cpu"
same = lambda one, two: torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
"""

LAYERS = """
from dualtoken.generation.few_rows import GELU, GELU_TANH, linear, three
for rows, width, size in ((1, 24, 10), (2, 64, 33), (3, 30, 7), (4, 16, 9), (2, 9000, 5)):
    x, residual = torch.randn(rows, width, device=device), torch.randn(rows, size, device=device)
    layer, gate, norm = nn.Linear(width, size), nn.Linear(width, size), nn.LayerNorm(width, eps=1e-6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    layer, gate, norm = (m.to(device) for m in (layer, gate, norm))
    same(linear(x, layer), layer(x))
    same(linear(x, layer, residual=residual), layer(x) + residual)
    same(linear(x, layer, residual=residual[0]), layer(x) + residual[0])
    if width > 8192:  # too wide for norms
        continue
    same(linear(x, layer, norm, GELU), F.gelu(layer(norm(x))))
    same(linear(x, layer, norm, GELU_TANH, gate), F.gelu(gate(norm(x)), approximate="tanh") * layer(norm(x)))
    parts = [nn.Linear(width, n, bias=False).to(device) for n in (10, 3, 5)]
    same(three(x, parts, norm), torch.cat([part(norm(x)) for part in parts], 1))
"""

HEADS = """
from dualtoken.generation.fused_head import FusedHead, fits
from dualtoken.mllm.visual_head import VisualHead, VisualHeadConfig
sizes = {"codebook_size": 40, "depth": 3, "width": 32, "layers": 2, "heads": 4, "embed_dim": 12}
for kind in ({}, {"gated": False, "shared_embedding": False}, {"linear_projector": True, "shared_classifier": True}):
    head = VisualHead(24, VisualHeadConfig(**sizes, **kind)).to(device)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    fused = FusedHead(head)
    assert fits(head, 3) and not fits(head, 5)
    states, given = [head.start(), fused.start()], torch.randn(3, 24, device=device)
    for _ in range(3):
        same(fused.step(states[1], given), head.step(states[0], given))
        given = torch.randint(40, (3,), device=device)
"""

SAMPLING = """
from dualtoken.generation.fused_sampling import sample_gpu
from dualtoken.generation.sampling import HeadSampling, choose
for guidance, rows in ((1.0, 3), (3.0, 6)):
    logits = torch.randn(rows, 50, device=device) * 3
    for values in ((1.0, 0, 1.0), (0.7, 20, 0.9), (0.0, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.5), (1e-3, 10, 0.9)):
        sampling = HeadSampling(*values)
        for uniform in (torch.zeros(3, device=device), torch.rand(3, device=device)):
            given = logits, sampling, guidance, uniform
            assert torch.equal(sample_gpu(*given), choose(*given)), given
one = lambda logits, sampling, number: sample_gpu(
    torch.tensor([logits], device=device), sampling, 1.0, torch.tensor([number], device=device)).item()
likely = [1.0, 2.0, 2.0, 2.0, 0.0, 2.0]
assert [one(likely, HeadSampling(1.0, 2, 1.0), u) for u in (0.0, 0.3, 0.6, 0.9)] == [1, 1, 2, 2]  # of equals the first
assert [one(likely, HeadSampling(1.0, 0, 0.6), u) for u in (0.0, 0.3, 0.6, 0.9)] == [1, 1, 2, 3]
assert one([0.0, -1.0, -1e4, 5.0], HeadSampling(1.0, 0, 1.0), 1 - 2.0**-24) in (0, 1, 3)  # never what cannot be
"""


@pytest.mark.parametrize("script", [LAYERS, HEADS, SAMPLING], ids=["layers", "heads", "sampling"])
def test_the_kernels_are_the_layers_they_stand_for(script):
    pytest.importorskip("triton")
    settings = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    code = [sys.executable, "-c", BEGIN + script]
    done = subprocess.run(code, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_heads_of_other_kinds_are_left_as_they_are():
    pytest.importorskip("triton")
    from dualtoken.generation.fused_head import fits

    sizes = {"codebook_size": 8, "depth": 2, "width": 12, "layers": 1, "embed_dim": 8}
    head = VisualHead(8, VisualHeadConfig(**sizes, heads=3))
    assert fits(head, 4) and not fits(head, 5)
    assert not fits(VisualHead(8, VisualHeadConfig(**sizes, heads=2)), 2)  # six numbers a head
    head.norm.register_forward_hook(lambda *_: None)
    assert not fits(head, 2)
    mixed = VisualHead(8, VisualHeadConfig(**sizes, heads=3))
    mixed.norm.to(torch.bfloat16)
    assert not fits(mixed, 2)
