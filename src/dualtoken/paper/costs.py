"""Table 11 and appendix D: what a second vocabulary costs; Figure 6: whether two kinds of features share a space.

Measured by `analysis/cost.py` and `analysis/feature_space.py`, which are loaded when they are used.
"""

import torch
from torch import nn

from dualtoken.app.figures import draw_scatter
from dualtoken.app.look import Branches
from dualtoken.core.errors import UserError
from dualtoken.data.images import DataConfig, open_source, read_in_order
from dualtoken.mllm.presets import SHAPES, open_mllm
from dualtoken.mllm.projector import two_layers
from dualtoken.paper.experiment import Result, Row, Setting
from dualtoken.paper.measure import BATCH, device
from dualtoken.paper.multimodal import two_encoders
from dualtoken.paper.numbers import paper_table
from dualtoken.paper.trained import minutes, train_parts
from dualtoken.tokenizer.initial import open_backbone

FULL = "paper-3b"
MEASURES = ("training memory, MiB", "drawing one picture, s", "forward, GFLOPs")
TEXT = 64  # tokens of the prompt that is measured
SHARE = "share, percent"  # of the LLM's parameters
WIDTH = 512  # to which the features of a picture are averaged (appendix F.3)


def table11(setting: Setting) -> Result:
    """One kind of codes against two: measured on this device, and counted at the paper's size from shapes alone."""
    from dualtoken.analysis.cost import mllm_costs, ratio

    rows, said = [], []
    model = open_mllm(setting.model)[0].to(device())
    for name, built in ((setting.model, model), (f"{FULL}, counted from shapes", SHAPES[FULL].build())):
        costs = mllm_costs(built, TEXT, training=True)
        step, forward = costs["training step, gradients included"], costs["forward of a prompt and a picture"]
        drawing = costs.get("drawing one picture", {})
        for token in ("single", "dual"):
            seconds = drawing[token].seconds if token in drawing else None
            values = (step[token].memory / 2**20, seconds, forward[token].flops / 1e9)
            measured = {key: value for key, value in zip(MEASURES, values, strict=True) if value is not None}
            counted = built is not model
            printed = _printed("table11", f"{token} token") if counted else {}
            rows.append(Row(f"{name}: {token} token", measured, printed, "full" if counted else None))
        times = {"memory": ratio(step, "memory"), "GFLOPs": ratio(forward, "flops")}
        if drawing:
            times["time"] = ratio(drawing, "seconds")
        listed = ", ".join(f"{key} {value:.3f}" for key, value in times.items() if value)
        said.append(f"{name}, dual over single: {listed} (the paper: memory 1.060, time 1.136, GFLOPs 1.025).")
        setting.protocol[name] = (
            f"batch 1, a prompt of {TEXT} tokens and a picture of {built.config.positions} positions"
        )
    setting.protocol["paper"] = (
        "batch and lengths of Table 11 are not told, so even its ratios may be of another setting"
    )
    rows += appendix_d()
    together = rows[-1].measured[SHARE]
    said.append(
        f"At full size the second vocabulary adds {together:.2f} % of the LLM's parameters (the paper: 8.93 %)."
    )
    return Result(rows, said)


def appendix_d() -> list[Row]:
    """Parameters, in millions, that the second vocabulary adds at the paper's size."""
    built = SHAPES[FULL].build()  # on the meta device: no values
    hidden, head = built.config.text_config.hidden_size, built.semantic_head
    added = {
        "projector": _count(built.projector.joint) - _count(two_layers(built.feature_width, hidden, hidden)),
        "visual head": _count(head) - _count(head.embedding),
        "code embedding": _count(head.embedding),
    }
    rows = [
        Row(f"appendix D: {name}", {"parameters, M": n / 1e6}, _printed("appendixD", name), "full")
        for name, n in added.items()
    ]
    total = sum(added.values())
    measured = {"parameters, M": total / 1e6, SHARE: 100 * total / _count(built.llm)}
    return [*rows, Row("appendix D: together", measured, _printed("appendixD", "together"), "full")]


def _printed(table: str, row: str) -> dict[str, float | None]:
    """A row of the paper, its columns with their units."""
    units = {column.key: column.unit for column in paper_table(table).columns}
    return {f"{key}, {units[key]}": value for key, value in paper_table(table).row(row).values.items()}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def check_figure6(setting: Setting) -> None:
    """Raise UserError where models do not go together or pictures are too few, before the baseline is trained."""
    from dualtoken.analysis.feature_space import NEIGHBORS

    one = Branches(setting.model, False, "--weights").size
    two = Branches(setting.baseline, False, "--baseline") if setting.baseline else None
    if two is not None and (two.tokenizer is None or two.tokenizer.pixel_encoder is None or two.size != one):
        raise UserError(
            f"--baseline {setting.baseline}: give a tokenizer of two encoders (recipe dual-encoder) for {one} px"
        )
    if two is None and one != open_backbone("mini").image_size:
        raise UserError(f"--weights {setting.weights} takes {one} px: give a --baseline for as many")
    source, most = open_source(DataConfig(setting.source), one, "test", "--data"), setting.count(500, 1000)
    most = most if source.endless else min(most, len(source))
    if 2 * most <= NEIGHBORS:  # two points of each
        raise UserError(
            f"--pictures, --data: {most} pictures are too few for a map, give at least {NEIGHBORS // 2 + 1}"
        )


def figure6(setting: Setting) -> Result:
    """Shallow and deep layer of one encoder, and two separate encoders, each pair as points of one UMAP."""
    from dualtoken.analysis.feature_space import Clouds, embed, overlap

    parts = [] if setting.baseline else [two_encoders(setting).part(setting)]
    other = setting.baseline or str(*train_parts(parts, setting))
    one, two = Branches(setting.model, False, "--weights"), Branches(other, False, "--baseline")
    count = setting.count(500, 1000)
    clouds = {"one encoder: shallow and deep layer": Clouds(count, WIDTH), "two encoders": Clouds(count, WIDTH)}
    source = open_source(DataConfig(setting.source), one.size, "test", "--data")
    for batch in read_in_order(source, count, BATCH, setting.skipped):
        for cloud, branches in zip(clouds.values(), (one, two), strict=True):
            cloud.add(*branches(batch.images))
    rows, panels = [], {}
    for name, cloud in clouds.items():
        first, second = cloud.rows(normalize=True)
        points = torch.from_numpy(embed(torch.cat([first, second]), setting.seed))
        panels[name] = {"pixels": points[: len(first)], "meaning": points[len(first) :]}
        rows.append(Row(name, {"overlap on the map": overlap(*panels[name].values()),
                               "overlap in all dimensions": overlap(first, second)}))  # fmt: skip
    draw_scatter(setting.out / "fig6.png", panels)
    single, apart = (row.measured["overlap on the map"] for row in rows)
    verdict = "as in the paper" if single > apart + 0.1 else "no more than that, unlike the paper"
    said = [
        f"Neighbors of the other kind, 1 as if mixed: {single:.2f} in one encoder, {apart:.2f} between two encoders: "
        f"{verdict}. Every picture's features are brought to mean 0 and deviation 1 first."
    ]
    return Result(rows, said, {"fig6.png": "UMAP of unseen pictures"}, minutes(parts, setting))
