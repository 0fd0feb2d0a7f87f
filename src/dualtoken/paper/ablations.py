"""Tables 7 to 9 (which layer pixels come from) and 10 (multi-codebook against residual quantisation).

The miniature has two backbones: the bundled one of 6 blocks, and one of 12 blocks that is trained here in a few
minutes, so it knows less; each is compared with itself only. Kind and size of a backbone are not varied apart, so
Tables 7 and 8 have the same miniature rows.
"""

from dataclasses import replace
from functools import partial
from math import ceil

from dualtoken.paper.experiment import SPREAD, Result, Row, Setting
from dualtoken.paper.measure import Judge, over_seeds
from dualtoken.paper.numbers import paper_table
from dualtoken.paper.table3 import same_run
from dualtoken.paper.trained import Part, minutes, train_parts
from dualtoken.paper.variants import Taps, Variant, taps

ENCODER_STEPS = 1500
DEEPER = {"embed_dim": 96, "depth": 12, "num_heads": 4, "img_size": 48}
QUARTERS = {"table7": (1, 2, 3), "table8": (1, 2, 3)}
NEAR = (-1, 0, 1)  # Table 9: a layer less or more than the first quarter
SEEDS = 3


def deeper(setting: Setting) -> Part:
    """The second encoder: 12 blocks of width 96 behind a stem like the bundled one's."""
    steps = setting.steps(ENCODER_STEPS)
    return Part("train-encoder", "mini-encoder", {
        "steps": steps, "seed": setting.seed, "grow_stem": steps // 5, "optim": {"warmup": min(200, steps // 5)},
        "backbone": {"overrides": DEEPER, "stem": [32, 32, 64, 64, 96, 96], "pixel_layer": 3, "semantic_layer": 11},
        "loop": {"save_every": 250, "log_every": 50, "tracker": "none"},
    })  # fmt: skip


def chosen_layers(id: str, at: Taps) -> list[int]:
    """Pixel layers that a table compares on a backbone: quarters of its depth, or neighbors of the first quarter."""
    if id in QUARTERS:
        return [ceil(quarter * at.layers / 4) for quarter in QUARTERS[id]]  # of 27 layers 7, 14, 21, as Table 8 has it
    return [layer for layer in (at.shallow + step for step in NEAR) if 1 <= layer <= at.deep]


def layer_table(setting: Setting, id: str) -> Result:
    """Tokenizers for every pixel layer, in miniature with three seeds each; everything else is equal."""
    encoders: dict[str, Part | None] = {"mini": None, "mini-12": deeper(setting)}
    if setting.scale == "full":
        encoders = {setting.encoder: None}
    seeds, rows, said, trained, to_make = _seeds(setting), [], [], [], {}
    for name, encoder in encoders.items():
        at = taps(setting, encoder)
        to_make[name] = {layer: [_variant(setting, at, layer, encoder, seed).part(setting) for seed in seeds]
                         for layer in chosen_layers(id, at)}  # fmt: skip
    train_parts([part for made in to_make.values() for group in made.values() for part in group], setting)
    for name, encoder in encoders.items():
        at, made = taps(setting, encoder), to_make[name]
        parts = [part for group in made.values() for part in group]
        directory = str(encoder.model(setting)) if encoder else setting.encoder or "mini"
        judge = Judge(setting, directory)
        judge.measure_all(parts)
        found = {layer: over_seeds([judge.measure(part) for part in group]) for layer, group in made.items()}
        rows += [Row(f"{name} {layer}/{at.layers}", numbers) for layer, numbers in found.items()]
        if setting.scale == "mini":
            rows.append(Row(f"{name}, continuous encoder", judge.teacher_row()))
        said += layer_findings(id, name, found)
        trained += parts
    rows += [Row(row.name, {}, row.values) for row in paper_table(id).rows]
    return Result(rows, said, parts=minutes(trained, setting), seeds=seeds)


def _variant(setting: Setting, at: Taps, layer: int, encoder: Part | None, seed: int) -> Variant:
    """Pixels from a layer; the first quarter of the bundled encoder is row (d) of Table 3."""
    if encoder is None and setting.scale == "mini" and layer == at.shallow:
        return same_run(setting, "d", seed=seed)
    return Variant(layer, at.deep, encoder=encoder, seed=seed)


def _seeds(setting: Setting) -> list[int]:
    return [setting.seed + i for i in range(SEEDS if setting.scale == "mini" else 1)]


def layer_findings(id: str, name: str, found: dict[int, dict[str, float | None]]) -> list[str]:
    """Whether the shallowest layer is better than the deepest (Tables 7, 8), or how much a layer changes (Table 9).

    Nothing of what was not measured.
    """
    layers, said = sorted(found), []
    for key, unit in (("psnr", "dB"), ("zero_shot", "points of zero-shot accuracy")):
        values = [found[layer][key] for layer in layers]
        if None in values:
            continue
        spreads = [found[layer].get(key + SPREAD) or 0.0 for layer in layers]
        listed = ", ".join(
            f"layer {layer} {value:.2f} ± {sd:.2f}" for layer, value, sd in zip(layers, values, spreads, strict=True)
        )
        if id == "table9":
            said.append(f"{name}: between neighbors {max(values) - min(values):.2f} {unit} ({listed}).")
            continue
        fall, spread = values[0] - values[-1], spreads[0] + spreads[-1]
        verdict = "within the spread of the seeds" if spread else "one seed"
        if abs(fall) > spread > 0:
            verdict = "as in the paper" if fall > 0 else "against the paper"
        way = "less" if fall > 0 else "more"
        said.append(f"{name}: the deepest of the layers gives {abs(fall):.2f} {unit} {way}, {verdict} ({listed}).")
    return said


table7, table8, table9 = (partial(layer_table, id=id) for id in ("table7", "table8", "table9"))


def table10(setting: Setting) -> Result:
    """RVQ and MCQ in two vocabularies; and one vocabulary with MCQ, as UniTok has it."""
    seeds = _seeds(setting)
    kinds = {
        "UniTok": ("one codebook at the deep layer, MCQ", {"name": "a", "quantizer": "mcq"}),
        "DualToken (RVQ)": ("two vocabularies, RVQ", {"name": "d", "quantizer": "rvq"}),
        "DualToken (MCQ)": ("two vocabularies, MCQ", {"name": "d", "quantizer": "mcq"}),
    }
    judge, rows, made, means = Judge(setting, setting.encoder or "mini"), [], {}, {}
    for paper, (_, told) in kinds.items():
        variants = [replace(same_run(setting, told["name"], seed=seed), quantizer=told["quantizer"]) for seed in seeds]
        made[paper] = [variant.part(setting) for variant in variants]
    parts = [part for group in made.values() for part in group]
    train_parts(parts, setting)
    judge.measure_all(parts)
    for paper, (label, _) in kinds.items():
        means[label] = over_seeds([judge.measure(part) for part in made[paper]])
        rows.append(Row(label, means[label], paper_table("table10").row(paper).values))
    said = []
    for key, unit in (("psnr", "dB"), ("zero_shot", "% zero-shot")):
        rvq, mcq = (means[f"two vocabularies, {kind}"] for kind in ("RVQ", "MCQ"))
        if None in (rvq[key], mcq[key]):
            continue
        spread = (rvq.get(key + SPREAD) or 0.0) + (mcq.get(key + SPREAD) or 0.0)
        change = mcq[key] - rvq[key]
        verdict = "the same within the seeds' spread" if spread else "one seed"
        if abs(change) > spread > 0:
            verdict = "better" if change > 0 else "worse"
        said.append(f"MCQ {mcq[key]:.2f} {unit}, RVQ {rvq[key]:.2f}: {verdict} (the paper: better).")
    return Result(rows, said, parts=minutes(parts, setting), seeds=seeds)
