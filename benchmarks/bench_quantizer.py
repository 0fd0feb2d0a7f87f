"""Residual quantiser against its own matrix products, a one-hot update and vector-quantize-pytorch, in one run.

    uv run python benchmarks/bench_quantizer.py [--codebook 16384 --width 32 --depth 8 --rows 4096]

Prints medians and ratios. "Largest tensor" is the largest single tensor made on the way, the inputs left out.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vector_quantize_pytorch import ResidualVQ

from dualtoken.tokenizer.quantizer import QuantizerConfig, ResidualQuantizer


class LargestTensor(TorchDispatchMode):
    """Remembers the size in bytes of the largest result of any operation; views of what is there do not count."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return result


def measure(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds, and MiB of the largest tensor."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    with LargestTensor() as largest:
        work()
    return statistics.median(times), largest.size / 2**20


def one_hot_update(weight, cluster_size, embed_sum, rows, codes, decay):
    """The EMA step as most implementations write it: a matrix of M x K a depth."""
    for depth in range(len(codes)):
        hot = F.one_hot(codes[depth], len(weight)).to(rows.dtype)
        cluster_size.mul_(decay).add_(hot.sum(0), alpha=1 - decay)
        embed_sum.mul_(decay).add_(hot.t() @ rows[depth], alpha=1 - decay)
    weight.copy_(embed_sum / cluster_size.clamp_min(1e-5)[:, None])


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("codebook", 16384), ("width", 32), ("depth", 8), ("rows", 4096), ("repeats", 5)):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = options.parse_args()
    torch.manual_seed(0)
    config = QuantizerConfig(codebook_size=o.codebook, code_dim=o.width, depth=o.depth)
    ours = ResidualQuantizer(config).to(o.device).eval()
    theirs = ResidualVQ(dim=o.width, codebook_size=o.codebook, num_quantizers=o.depth, shared_codebook=True)
    theirs = theirs.to(o.device).eval()
    x = torch.randn(o.rows // 256, 256, o.width, device=o.device)
    flat = x.flatten(0, 1)
    table = ours.codebook.weight.t().contiguous()

    def products() -> None:
        for _ in range(o.depth):
            for rows in flat.split(config.chunk):
                rows @ table

    rows, codes = ours._search(x)
    rows, codes = rows.flatten(1, 2), codes.flatten(0, 1).t()
    hot = [b.clone() for b in (ours.codebook.weight, ours.codebook.cluster_size, ours.codebook.embed_sum)]

    device = torch.cuda.get_device_name() if o.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; torch {torch.__version__}; Python {platform.python_version()}")
    print(f"K {o.codebook}, C {o.width}, D {o.depth}, {o.rows} rows, float32, median of {o.repeats}\n")
    print(f"{'':42}{'ms':>10}{'largest tensor [MiB]':>24}{'ratio to ours':>16}")
    groups = {
        "encode": {
            "ours": lambda: ours.encode(x),
            "its matrix products alone": products,
            "vector-quantize-pytorch ResidualVQ, shared": lambda: theirs(x),
        },
        "EMA update": {
            "ours": lambda: ours.codebook.update(rows, codes),
            "one-hot matrices": lambda: one_hot_update(*hot, rows, codes, config.decay),
        },
    }
    for group, entries in groups.items():
        print(group)
        base = None
        for name, work in entries.items():
            seconds, largest = measure(work, o.repeats)
            base = base or seconds
            print(f"  {name:40}{1000 * seconds:10.1f}{largest:24.1f}{seconds / base:16.2f}")


if __name__ == "__main__":
    main()
