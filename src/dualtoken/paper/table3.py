"""Table 3: do the two objectives disturb each other, and what resolves that: codebooks of their own, or layers?

Every row has the same budget and the same seeds. How much the semantic objective weighs is not chosen: each variant
with both objectives is trained with several weights, and the curves of PSNR against R@1 are compared. Rows without
(a) to (d) are not in the paper.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from dualtoken.app.figures import draw_curves
from dualtoken.paper.experiment import SPREAD, Result, Row, Setting
from dualtoken.paper.measure import Judge, over_seeds
from dualtoken.paper.numbers import paper_table
from dualtoken.paper.trained import Part, minutes, train_parts
from dualtoken.paper.variants import Taps, Variant, taps

WEIGHTS = (1.0, 0.3, 0.1, 0.03)
SEEDS = 3
MEANING = "text_to_image"  # R@1
COLLAPSED = 15.0  # dB; the paper's row (a) has 12.64


@dataclass(frozen=True)
class Case:
    """A row: where the objectives act (`deep`, `shallow`), and whether they share a codebook."""

    label: str
    pixel: str
    semantic: str
    joined: bool = True
    draws: bool = True
    means: bool = True
    frozen: bool = False
    paper: str | None = None

    @property
    def both(self) -> bool:
        """Whether it has both objectives, so that their weight matters."""
        return self.draws and self.means

    def variant(self, at: Taps, weight: float, seed: int) -> Variant:
        """The tokenizer of this row with one weight and seed."""
        layers = {"deep": at.deep, "shallow": at.shallow}
        return Variant(
            layers[self.pixel], layers[self.semantic], self.joined, self.draws,
            weight if self.means else 0.0, self.frozen, seed=seed,
        )  # fmt: skip


CASES = {
    "initial": Case("initial state, quantized", "deep", "deep", draws=False, frozen=True,
                    paper="initial state, quantized"),
    "meaning": Case("semantics only, deep", "deep", "deep", draws=False),
    "a": Case("(a) one codebook, deep", "deep", "deep", paper="(a)"),
    "shallow": Case("one codebook, shallow", "shallow", "shallow"),
    "two": Case("two codebooks, both deep", "deep", "deep", joined=False),
    "b": Case("(b) reconstruction only, deep", "deep", "deep", means=False, paper="(b)"),
    "c": Case("(c) reconstruction only, shallow", "shallow", "shallow", means=False, paper="(c)"),
    "d": Case("(d) two codebooks, shallow and deep", "shallow", "deep", joined=False, paper="(d)"),
}  # fmt: skip
Numbers = dict[str, float | None]


def table3(setting: Setting) -> Result:
    """All rows, all weights, all seeds; the curves as a picture."""
    at, judge = taps(setting), Judge(setting, setting.encoder or "mini")
    seeds = [setting.seed + i for i in range(SEEDS if setting.scale == "mini" else 1)]
    runs: dict[tuple[str, float], list[Part]] = {}
    for name, weight in product(CASES, WEIGHTS):
        if CASES[name].both or weight == WEIGHTS[0]:
            runs[name, weight] = [CASES[name].variant(at, weight, seed).part(setting) for seed in seeds]
    parts = [part for group in runs.values() for part in group]
    train_parts(parts, setting)
    judge.measure_all(parts)
    found = {
        (name, weight): over_seeds([judge.measure(part, CASES[name].draws, CASES[name].means) for part in group])
        for (name, weight), group in runs.items()
    }
    paper = paper_table("table3")
    rows = [Row("initial state", judge.teacher_row() if setting.scale == "mini" else {},
                paper.row("initial state").values)]  # fmt: skip
    for (name, weight), numbers in found.items():
        case = CASES[name]
        printed = paper.row(case.paper).values if case.paper and weight == WEIGHTS[0] else {}
        label = f"{case.label}, semantic weight {weight:g}" if case.both else case.label
        rows.append(Row(label, {k: v for k, v in numbers.items() if v is not None}, printed))
    result = Result(rows, parts=minutes(parts, setting), seeds=seeds)
    if setting.scale == "mini":
        _picture(setting, found, rows[0].measured, result)
        result.findings += findings(found, rows[0].measured)
    return result


def _picture(setting: Setting, found: dict, teacher: Numbers, result: Result) -> None:
    curves = {
        case.label: [(found[name, w][MEANING], found[name, w]["psnr"]) for w in WEIGHTS]
        for name, case in CASES.items() if case.both
    }  # fmt: skip
    levels = {CASES[name].label: found[name, WEIGHTS[0]]["psnr"] for name in "bc"}
    marks = {"continuous encoder": teacher[MEANING]}
    draw_curves(setting.out / "table3.png", curves, levels, marks, ("text to image, R@1 in %", "PSNR in dB"))
    weights = ", ".join(f"{w:g}" for w in WEIGHTS)
    result.pictures["table3.png"] = f"Each curve: semantic weights {weights}; means over {len(result.seeds)} seeds"


def findings(found: dict[tuple[str, float], Numbers], teacher: Numbers) -> list[str]:
    """What the numbers say of the paper's claims, computed; where the miniature does not show a claim, it says so."""
    at = {name: found[name, WEIGHTS[0]] for name in CASES}
    said = [_against("a", "b", at, "reconstruction suffers from the semantic objective in one codebook")]
    if at["a"]["psnr"] >= COLLAPSED:
        said.append(
            f"Row (a) keeps {at['a']['psnr']:.1f} dB: the collapse to 12.6 dB that the paper reports is not seen here."
        )
    said.append(_against("a", "d", at, "two codebooks at two layers come back better than one"))
    said.append(_against("c", "d", at, "semantics beside it make reconstruction better than reconstruction alone"))
    gain = _gain(at["a"], at["d"])
    if gain > _spread(at["a"], at["d"]):
        share = (at["two"]["psnr"] - at["a"]["psnr"]) / gain
        said.append(
            f"Of the {gain:.2f} dB between (a) and (d), {100 * share:.0f} % come with separate codebooks at one layer, "
            "the rest with separate layers."
        )
    for name in ("a", "two", "shallow"):
        beaten = sum(any(_dominates(found["d", v], found[name, w]) for v in WEIGHTS) for w in WEIGHTS)
        said.append(
            f"Curves: of the {len(WEIGHTS)} points of '{CASES[name].label}', {beaten} are beaten in PSNR and in R@1 at "
            "once by a point of (d)."
        )
        pairs = [(found[name, w], found["d", w]) for w in WEIGHTS]
        gains = [(_gain(*pair, MEANING), _spread(*pair, MEANING)) for pair in pairs]
        above, beyond = sum(gain > 0 for gain, _ in gains), sum(gain > spread for gain, spread in gains)
        said.append(
            f"R@1 of (d) is above that of '{CASES[name].label}' at {above} of {len(WEIGHTS)} weights, at {beyond} by "
            "more than the spreads over the seeds together."
        )
    best = max(found["d", w][MEANING] for w in WEIGHTS)
    said.append(f"R@1 of (d) reaches {best:.1f} %, the continuous encoder {teacher['text_to_image']:.1f} %.")
    return said


def _against(first: str, second: str, at: dict[str, Numbers], claim: str) -> str:
    """One comparison of PSNR between two rows: is the second better, and by more than the seeds differ?"""
    low, high = at[first], at[second]
    change, spread = _gain(low, high), _spread(low, high)
    verdict = "Shown" if change > spread else "The reverse" if change < -spread else "Not decided"
    return (
        f"{verdict}: {claim}. '{CASES[second].label}' {high['psnr']:.2f} dB, '{CASES[first].label}' "
        f"{low['psnr']:.2f} dB, spreads over the seeds together {spread:.2f}."
    )


def _gain(first: Numbers, second: Numbers, measure: str = "psnr") -> float:
    return second[measure] - first[measure]


def _spread(first: Numbers, second: Numbers, measure: str = "psnr") -> float:
    """Standard deviations over the seeds, added."""
    return (first.get(measure + SPREAD) or 0.0) + (second.get(measure + SPREAD) or 0.0)


def _dominates(one: Numbers, other: Numbers) -> bool:
    return all(one[key] >= other[key] for key in ("psnr", MEANING))


def same_run(setting: Setting, name: str, weight: float = 1.0, seed: int | None = None, **changes: Any) -> Variant:
    """A row of this table for another table, which then shares its training."""
    made = CASES[name].variant(taps(setting), weight, setting.seed if seed is None else seed)
    return replace(made, **changes)
