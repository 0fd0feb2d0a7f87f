"""Residual quantisation: encoding over rows and depths, and a training step.

References: vector-quantize-pytorch's ResidualVQ with a shared codebook, all distances with one-hot updates
(`plain_quantizer.py`), with --reference the paper's repository's. Limit: the matrix products alone, in blocks that stay
in the cache.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.measure import Case, Options, Work
from benchmarks.plain_quantizer import PlainResidualQuantizer
from dualtoken.tokenizer.quantizer import QuantizerConfig, ResidualQuantizer, rows_at_once

REFERENCE_FILE = "modeling/rqvaesigliptransformer/rqvaesiglip/quantizations.py"
SLOW = 2**14  # rows above which the references are left out: minutes, or tens of GB of distances


def cases(options: Options) -> list[Case]:
    """Encoding from 1k to 1M rows at depths 4 and 8, then a training step over 8 pictures of 27 x 27 positions."""
    size, width = (64, 8) if options.tiny else (16384, 32)
    counts = (64, 128) if options.tiny else tuple(4**k for k in range(5, 11))
    made = []
    for depth in (4, 8):
        sizes = QuantizerConfig(codebook_size=size, code_dim=width, depth=depth)
        for rows in (n for n in counts if n <= options.largest):
            kinds = {"ours": ours, "its matrix products alone": products}
            if options.device == "cuda":
                kinds["ours, in blocks as on a CPU"] = ours_in_blocks
            if rows <= SLOW:
                kinds |= {"vector-quantize-pytorch ResidualVQ, shared": library, "all distances at once": plain}
                kinds |= {"the paper's repository": paper} if options.reference else {}
            for name, kind in kinds.items():
                made.append(Case(
                    f"encode, D {depth}, {rows} rows, K {size}, C {width}", name, role(name),
                    partial(kind, sizes, rows, False, options), rows, f"D {depth}, {name}",
                ))  # fmt: skip
    training = {"ours": ours, "all distances, one-hot updates": plain,
                "vector-quantize-pytorch ResidualVQ, shared": library}  # fmt: skip
    training |= {"the paper's repository": paper} if options.reference else {}
    training["matrix products of its search alone"] = products
    rows, sizes = (2 * 27 * 27 if options.tiny else 8 * 27 * 27), sizes
    for name, kind in training.items():
        made.append(Case(f"training step with EMA, D 8, {rows} rows, K {size}, C {width}", name, role(name),
                         partial(kind, sizes, rows, True, options)))  # fmt: skip
    return made


def role(name: str) -> str:
    """What a line is, by its name."""
    return "ours" if name == "ours" else "limit" if "products" in name else "reference"


def inputs(config: QuantizerConfig, rows: int, device: str) -> Tensor:
    """Rows [1, M, C] of the scale of the codebook, the same for all."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, rows, config.code_dim, generator=generator).to(device)


def step(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """Forward, and backward to the input; `forward` gives the sum of what is learnt from."""
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        forward(x).backward()

    return run


def ours(config: QuantizerConfig, rows: int, training: bool, options: Options) -> Work:
    torch.manual_seed(0)
    quantizer, x = ResidualQuantizer(config).to(options.device), inputs(config, rows, options.device)
    if training:
        return Work(step(lambda x: (q := quantizer.train()(x)).quantized.sum() + q.commitment, x))
    quantizer.eval()
    facts = partial(agreement, quantizer, x) if rows <= SLOW else dict
    return Work(lambda: quantizer.encode(x), rows, "rows", facts)


def ours_in_blocks(config: QuantizerConfig, rows: int, training: bool, options: Options) -> Work:
    return ours(replace(config, search="blocks"), rows, training, options)


def agreement(quantizer: ResidualQuantizer, x: Tensor) -> dict[str, int]:
    """Codes that differ from those of all distances at once where both see the same residual, and how many are ties.

    A tie is a pair of rows whose distances, in float64, are nearer than float32 can tell.
    """
    weight, residual, differ, ties = quantizer.codebook.weight, x.flatten(0, 1), 0, 0
    for codes in quantizer.encode(x).flatten(0, 1).unbind(-1):
        norms = residual.square().sum(1, keepdim=True) + weight.square().sum(1)
        other = (norms - 2 * residual @ weight.t()).argmin(1)
        at = (other != codes).nonzero()[:, 0]
        gaps = [(residual[at].double() - weight[c[at]].double()).square().sum(1) for c in (codes, other)]
        differ += len(at)
        ties += int(((gaps[0] - gaps[1]).abs() < 1e-5 * norms[at, codes[at]].clamp_min(1)).sum())
        residual = residual - weight[codes]
    return {"codes": x.shape[1] * quantizer.config.depth, "unlike all distances at once": differ, "of these ties": ties}


def products(config: QuantizerConfig, rows: int, training: bool, options: Options) -> Work:
    x = inputs(config, rows, options.device)[0]
    table = torch.randn(config.code_dim, config.codebook_size, device=options.device)
    block = SLOW if x.is_cuda else rows_at_once(config.chunk, config.codebook_size, x.device)

    def run() -> None:
        for _ in range(config.depth):
            for part in x.split(block):
                part @ table

    return Work(run, rows, "rows")


def library(config: QuantizerConfig, rows: int, training: bool, options: Options) -> Work:
    from vector_quantize_pytorch import ResidualVQ

    torch.manual_seed(0)
    sizes = {"dim": config.code_dim, "codebook_size": config.codebook_size, "num_quantizers": config.depth}
    model = ResidualVQ(**sizes, shared_codebook=True, decay=config.decay).to(options.device)
    x = inputs(config, rows, options.device)
    if training:
        return Work(step(lambda x: (out := model.train()(x))[0].sum() + out[2].sum(), x))
    model.eval()
    return Work(torch.no_grad()(lambda: model(x)), rows, "rows")


def plain(config: QuantizerConfig, rows: int, training: bool, options: Options) -> Work:
    torch.manual_seed(0)
    model = PlainResidualQuantizer(config.codebook_size, config.code_dim, config.depth).to(options.device)
    x = inputs(config, rows, options.device)[0]
    if training:
        return Work(step(lambda x: (out := model(x))[0].sum() + out[1], x))
    return Work(lambda: model.encode(x), rows, "rows")


def paper(config: QuantizerConfig, rows: int, training: bool, options: Options) -> Work:
    """The quantiser of the paper's repository, on rows as one map of rows x 1."""
    module, shape = load(Path(options.reference)), (rows, 1, config.code_dim)
    torch.manual_seed(0)
    model = module.RQBottleneck(shape, (rows, 1, config.depth), config.codebook_size, shared_codebook=True)
    model = model.to(options.device)
    x = inputs(config, rows, options.device).view(1, *shape)
    if training:
        return Work(step(lambda x: (out := model.train()(x))[0].sum() + out[1], x))
    model.eval()
    return Work(torch.no_grad()(lambda: model(x)), rows, "rows")


def load(checkout: Path) -> ModuleType:
    """The reference's quantiser by its file."""
    file = checkout / REFERENCE_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"--reference {checkout}: no {REFERENCE_FILE} in it; give a checkout of songweii/DualToken"
        )
    spec = importlib.util.spec_from_file_location("reference_quantizations", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
