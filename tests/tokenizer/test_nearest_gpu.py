"""The GPU's search for nearest codes, in Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dualtoken.core.errors import UserError
from dualtoken.tokenizer import quantizer
from dualtoken.tokenizer.quantizer import QuantizerConfig, nearest_codes

SCRIPT = """
import torch
from dualtoken.tokenizer.nearest_gpu import nearest_codes_gpu, residual_codes_gpu
from dualtoken.tokenizer.quantizer import QuantizerConfig, ResidualQuantizer, nearest_codes
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
for rows, codes, width in ((130, 200, 12), (64, 64, 16), (1, 70, 32), (0, 5, 8), (90, 500, 33)):
    x, weight = torch.randn(rows, width, device=device), torch.randn(codes, width, device=device)
    assert torch.equal(nearest_codes_gpu(x, weight), nearest_codes(x, weight, 64)), (rows, codes, width)
    x, weight = x.round(), weight.round()  # whole numbers have no rounding, so ties are ties
    weight[codes // 2] = weight[-1] = weight[3]  # in the same block of codes and in another
    x[: rows // 2] = weight[3]
    found = nearest_codes_gpu(x, weight)
    assert torch.equal(found, nearest_codes(x, weight, 64)) and (found[: rows // 2] <= 3).all(), (rows, codes, width)

sizes = QuantizerConfig(codebook_size=300, code_dim=24, depth=5, search="blocks")
quantizer = ResidualQuantizer(sizes).to(device).eval()
x = torch.randn(1, 100, 24, device=device)
x[:, 3], x[:, 4], x[:, 5] = 0, 1e-6 * x[:, 4], 1e6 * x[:, 5]  # far from the codebook's scale
found = residual_codes_gpu(x[0], quantizer.codebook.weight, 5)
assert torch.equal(found, quantizer.encode(x)[0])
x[0, 0] = float("nan")
assert (residual_codes_gpu(x[0], quantizer.codebook.weight, 5)[0] == 0).all()
small = torch.randn(90, 16, device=device)
for scale in (1e-5, 1.0, 1e5):  # both of one scale, as learnt codebooks are
    assert torch.equal(nearest_codes_gpu(scale * small, scale * small[:40]), nearest_codes(small, small[:40], 64))
"""


def test_the_kernel_finds_the_codes_of_the_plain_search():
    pytest.importorskip("triton")
    settings = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_cpu_takes_blocks_whatever_is_asked_for_and_other_words_are_refused():
    x, weight = torch.randn(9, 4), torch.randn(5, 4)
    assert torch.equal(QuantizerConfig(search="triton").nearest(x, weight), nearest_codes(x, weight, 256))
    with pytest.raises(UserError, match=r"quantizer\.search='fast' must be"):
        QuantizerConfig(search="fast")


class Driver:
    """In place of Triton's, which compiles C when it is first asked."""

    def __init__(self, error):
        self.error = error

    @property
    def utils(self):
        if self.error is not None:
            raise self.error
        return object()


@pytest.mark.parametrize(
    ("error", "cuda", "capability", "ready"),
    [
        (None, "13.0", (9, 0), True),
        (RuntimeError("Failed to find C compiler"), "13.0", (9, 0), False),
        (subprocess.CalledProcessError(1, "gcc"), "13.0", (9, 0), False),  # no Python.h
        (None, "13.0", (7, 5), False),
        (None, None, (9, 0), False),
    ],
)
def test_the_kernel_is_at_hand_where_triton_works(monkeypatch, error, cuda, capability, ready):
    runtime = ModuleType("triton.runtime")
    runtime.driver = SimpleNamespace(active=Driver(error))
    for module in (ModuleType("triton"), runtime):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(quantizer, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert quantizer.kernel_at_hand.__wrapped__(torch.device("cuda")) is ready
