"""The large classifiers of MLLM training: memory and time of their cross-entropy, forward and back.

References: logits whole, as most training code has them; torch's own chunked loss where this torch has it. Limit: the
three matrix products (logits, gradient of the rows, gradient of the weights) in blocks, with nothing between them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.drawing import parts_of, random_model
from benchmarks.measure import Case, Options, Work
from dualtoken.core.codes import DualCodes
from dualtoken.core.linear_loss import classification_loss
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.mllm.presets import SHAPES
from dualtoken.training.memory import BatchShape, stage_memory
from dualtoken.training.stages import STAGES, recompute_activations, set_trained

PATIENCE = 2**27  # logits beyond which torch's own loss takes minutes on a CPU, so it is left out

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows [M, W], weights [K, W], targets [M] -> scalar


def cases(options: Options) -> list[Case]:
    """Widths are smaller than the paper's 2048 so that a CPU is done in minutes; rows and classes are not."""
    if options.tiny:
        groups = {"text, tiny": (100, 8, (64,))}
    else:
        groups = {
            "a head's classifier, K 16384, W 256": (16384, 256, (1024, 2048, 4096, 8192, 16384)),
            "text, K 151936, W 256": (151936, 256, (512, 1024, 2048, 4096)),
            "the miniature's pixel classifier, K 1024, W 96": (1024, 96, (576,)),
        }
    kinds: dict[str, Loss] = {"ours": chunked, "logits whole": whole}
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        kinds["torch's linear_cross_entropy, chunked"] = library
    made = []
    for title, (classes, width, counts) in groups.items():
        for rows in (n for n in counts if n <= options.largest):
            group, sizes = f"{title}, {rows} rows", (rows, width, classes)
            series = "" if len(counts) == 1 else title.split(",")[0]
            for name, loss in kinds.items():
                if loss is library and rows * classes > PATIENCE:
                    continue
                line = series and f"{series}: {name}"
                made.append(Case(group, name, "ours" if name == "ours" else "reference",
                                 partial(work, loss, sizes, options), rows, line))  # fmt: skip
            made.append(Case(group, "its matrix products alone", "limit", partial(products, sizes, options),
                             rows, series and f"{series}: products"))  # fmt: skip
    if options.device == "cpu":
        made.append(
            Case("planned memory of stage 4-1 at 3B, 64 samples of 384 tokens", "ours", "ours", partial(plan, options))
        )
    if options.device == "cuda" or options.tiny:
        group = f"a step of stage 4-1, {'tiny' if options.tiny else '3B, 64 samples of 384 tokens'}, bfloat16"
        made.append(Case(group, "ours", "ours", partial(training_step, True, options)))
        made.append(Case(group, "one vocabulary alone (pixel)", "reference", partial(training_step, False, options)))
    return made


def chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return classification_loss(lambda rows: F.linear(rows, weight), x, target, len(weight))


def whole(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum")


def library(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, reduction="sum", options=options)


def tensors(sizes: tuple[int, int, int], options: Options) -> tuple[Tensor, Tensor]:
    rows, width, classes = sizes
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width), torch.randn(classes, width) * width**-0.5
    return tuple(t.to(options.device).requires_grad_() for t in (x, weight))


def work(loss: Loss, sizes: tuple[int, int, int], options: Options) -> Work:
    x, weight = tensors(sizes, options)
    target = torch.randint(len(weight), (len(x),), generator=torch.Generator().manual_seed(1)).to(options.device)

    def run() -> None:
        x.grad = weight.grad = None
        loss(x, weight, target).backward()

    return Work(run, len(x), "rows")


def products(sizes: tuple[int, int, int], options: Options) -> Work:
    x, weight = (t.detach() for t in tensors(sizes, options))
    gradient, block = torch.zeros_like(weight), max(1, 2**24 // len(weight))

    def run() -> None:
        for rows in x.split(block):
            logits = rows @ weight.t()
            logits @ weight
            gradient.addmm_(logits.t(), rows)

    return Work(run, len(x), "rows")


def plan(options: Options) -> Work:
    """GiB on a GPU by `training/memory.py`: dual codes against pixel codes alone, on one GPU and split over eight."""
    found = {}

    def run() -> None:
        model, batch = SHAPES["paper-3b"].build(), BatchShape(64, 384, 64, 64, 64 * 64)
        if options.tiny:
            model, batch = SHAPES["gpu-0.5b"].build(), BatchShape(2, 384, 2, 2, 2 * 64)
        settings = {"one GPU": {}, "8 GPUs, FSDP2": {"devices": 8, "shard": True}}
        dual = {name: stage_memory(model, STAGES["4-1"], batch, **told).total for name, told in settings.items()}
        without_semantics(model)
        for name, told in settings.items():
            single = stage_memory(model, STAGES["4-1"], batch, **told).total
            found.update({f"{name}: dual GiB": dual[name] / 2**30, f"{name}: single GiB": single / 2**30,
                          f"{name}: dual over single": dual[name] / single})  # fmt: skip

    return Work(run, facts=lambda: found)


def training_step(dual: bool, options: Options) -> Work:
    """Forward, backward and AdamW of stage 4-1 on one device, each sample one drawn picture and 64 tokens of text.

    A step is made before the measured ones, so that AdamW's moments are there: extra memory is gradients and
    activations, on top of weights and moments.
    """
    model = random_model(parts_of(options), options.device, torch.float32).train()
    recompute_activations(model, STAGES["4-1"])
    if not dual:
        model.config.output, model.semantic_head = "pixel", None
    learning = [p for group in set_trained(model, STAGES["4-1"]).values() for p in group]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)
    samples, length, words, positions = (2, 24, 8, 4) if options.tiny else (64, 384, 64, 256)
    ids = torch.full((samples, length), 40)
    start = length - positions - 2
    ids[:, start : start + positions + 2] = model.config.image_id
    ids[:, start], ids[:, -1] = model.config.draw_start_id, model.config.draw_end_id
    labels = torch.full_like(ids, -100)
    labels[:, start - words : start] = 40
    shape = (samples, positions, model.config.pixel_head["depth"])
    codes = torch.randint(model.config.pixel_head["codebook_size"], shape, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids.to(options.device), "labels": labels.to(options.device)}
    given["codes"] = DualCodes(codes, codes).to(options.device)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(options.device, torch.bfloat16):
            loss = model(**given).loss
        loss.backward()
        optimizer.step()

    run()
    return Work(run, samples, "samples")


def without_semantics(model: DualTokenForConditionalGeneration) -> None:
    """Take out what the second vocabulary brings: its head, its codebook, its half of the projector's first layer."""
    model.config.output = "pixel"
    first, branch = model.projector.joint[0], model.vision_tokenizer.semantic
    model.projector.joint[0] = nn.Linear(first.in_features // 2, first.out_features, device="meta")
    model.semantic_head, branch.quantizer, branch.post = None, nn.Identity(), nn.Identity()
