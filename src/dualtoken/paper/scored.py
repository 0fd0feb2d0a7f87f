"""Tables 2, 4, 5, 6 and 12 at full scale: what the benchmarks' own tools found, beside the paper's rows.

Models are trained with `dualtoken train-mllm` and answer or draw for the benchmarks' tools (docs/evaluation.md);
`dualtoken eval scores` makes a report of the results of each, and `--scores NAME=REPORT,...` brings the reports.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dualtoken.core.errors import UserError
from dualtoken.paper.experiment import Result, Row, Setting
from dualtoken.paper.numbers import PaperTable, paper_table

Numbers = dict[str, float]


@dataclass(frozen=True)
class Source:
    """Where a column comes from: a benchmark of the report, numbers of it that are summed, and a factor to the unit."""

    benchmark: str
    numbers: tuple[str, ...]
    times: float = 1.0


def _lmms(*numbers: str, times: float = 1.0) -> Source:
    return Source("lmms-eval", numbers, times)


UNDERSTANDING = {  # tasks and metrics of lmms-eval 0.7; some are shares, some percent
    "mmb": _lmms("mmbench_en_dev gpt_eval_score"),
    "mme": _lmms("mme mme_perception_score"),
    "seed": _lmms("seedbench seed_image", times=100),
    "vqav2": _lmms("vqav2_val exact_match", times=100),
    "mmvet": _lmms("mmvet gpt_eval_score"),
    "ai2d": _lmms("ai2d exact_match,flexible-extract", times=100),
    "mmmu": _lmms("mmmu_val mmmu_acc", times=100),
    "pope": _lmms("pope pope_f1_score", times=100),
    "ocrb": _lmms("ocrbench ocrbench_accuracy", times=100),
    "tvqa": _lmms("textvqa_val exact_match", times=100),
    "mathvista": _lmms("mathvista_testmini_format llm_as_judge_eval"),
}
SKILLS = {"count": "counting", "differ": "differentiation", "compare": "comparison", "negate": "negation",
          "universal": "universal", "overall": "advanced"}  # fmt: skip
UNSAID = (
    "POPE is F1, SEED-Bench its pictures alone, VQAv2 its validation split, MME perception alone (Table 4: the share "
    "of all 2800 points); the paper does not say which of these its numbers are."
)
MME_TOTAL = _lmms("mme mme_perception_score", "mme mme_cognition_score", times=100 / 2800)  # of Table 4


@dataclass(frozen=True)
class Scored:
    """A table made of reports.

    Args:
        models: name in `--scores` -> the paper's row of it, by table.
        sources: column of the paper -> where it comes from.
        compared: two of the models, the one that the paper has ahead first.
    """

    models: dict[str, dict[str, str]]
    sources: dict[str, Source]
    compared: tuple[str, str] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models."""
        return tuple(name for models in self.models.values() for name in models)


def _pick(*names: str) -> dict[str, Source]:
    return {name: UNDERSTANDING[name] for name in names}


SIZES = {f"{billions}b-{size}": f"DualToken-{billions}B ({size}px)" for billions in (3, 7) for size in (256, 384)}
TABLES = {
    "table2": Scored(
        {"table2": {"contrastive": "CLIP-based", "scratch": "CLIP-based (reconstruction)", "vqvae": "VQVAE-based"}},
        _pick("mmb", "mme", "seed", "vqav2"), ("contrastive", "scratch"),
    ),
    "table4": Scored(
        {"table4": {"continuous": "SigLIP-L/16-256", "one-codebook": "VILA-U", "semantic": "DualToken (semantic only)",
                    "both": "DualToken (semantic + pixel)"}},
        {name: MME_TOTAL if name == "mme" else source
         for name, source in UNDERSTANDING.items() if name != "mathvista"},
        ("both", "semantic"),
    ),
    "table5": Scored(
        {"table5b": {"dual": "DualToken-3B (256px)", "pixel": "DualToken-3B (pixel only)"}, "table5a": SIZES},
        _pick("pope", "mmb", "seed", "mmmu", "mmvet", "mathvista", "mme")
        | {key: Source("GenAI-Bench", (number,)) for key, number in SKILLS.items()},
        ("dual", "pixel"),
    ),
    "table6": Scored(
        {"table6": {"dual": "DualToken-3B", "two-encoders": "Dual encoder"}}, {"fid": Source("MJHQ-30K", ("FID",))},
        ("dual", "two-encoders"),
    ),
    "table12": Scored(
        {"table12": {"3b": "DualToken-3B", "7b": "DualToken-7B"}},
        {"geneval": Source("GenEval", ("overall",)), "wise": Source("WISE", ("overall",))},
    ),
}  # fmt: skip


def scored(setting: Setting, id: str) -> Result:
    """A table from the reports in `setting.scores`, and below it the paper's other rows.

    Its names are those of the table. Raises UserError for another file, and a report with none of the numbers.
    """
    chosen, rows, found, shown = TABLES[id], [], {}, set()
    for name, file in setting.scores.items():
        table, theirs = next((paper_table(t), models[name]) for t, models in chosen.models.items() if name in models)
        report = _report(name, file)
        found[name] = _numbers(chosen, name, file, report, table)
        if id == "table4" and len(found[name]) == len(chosen.sources):
            found[name]["average"] = fmean(found[name].values())
        rows.append(Row(f"{name}, {Path(file).name}", found[name], table.row(theirs).values))
        shown.add((table.id, theirs))
        setting.protocol[name] = {benchmark: one["protocol"] for benchmark, one in report.items()}
    for table in map(paper_table, chosen.models):
        rows += [Row(row.name, {}, row.values) for row in table.rows if (table.id, row.name) not in shown]
    return Result(rows, _findings(chosen, found) + _lacking(chosen, found) + _protocols(chosen))


def _report(name: str, file: str) -> dict[str, Any]:
    what = "a report that dualtoken eval scores --output wrote"
    try:
        report = json.loads(Path(file).read_text(encoding="utf-8"))
        return {benchmark: {"numbers": one["numbers"], "protocol": one["protocol"]}
                for benchmark, one in report.items()}  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"--scores {name}={file}: not {what}") from None


def _numbers(chosen: Scored, name: str, file: str, report: dict[str, Any], table: PaperTable) -> Numbers:
    """Column -> number, for the table's columns that the report has."""
    columns = [column.key for column in table.columns if column.key in chosen.sources]
    found = {}
    for key in columns:
        source = chosen.sources[key]
        values = [report.get(source.benchmark, {"numbers": {}})["numbers"].get(number) for number in source.numbers]
        if None not in values:
            found[key] = source.times * sum(values)
    if not found:
        wanted = [f"{chosen.sources[key].benchmark} {' + '.join(chosen.sources[key].numbers)}" for key in columns]
        raise UserError(f"--scores {name}={file}: holds none of {', '.join(wanted)}")
    return found


def _findings(chosen: Scored, found: dict[str, Numbers]) -> list[str]:
    """How the two models that the paper compares stand, in ours and in the paper's numbers."""
    if chosen.compared is None or not set(chosen.compared) <= set(found):
        return []
    ahead, other = chosen.compared
    table, theirs = next((paper_table(table), models) for table, models in chosen.models.items() if ahead in models)
    paper = [table.row(theirs[name]).values for name in chosen.compared]
    lower = {column.key for column in table.columns if column.better == "lower"}
    shared = [key for key in found[ahead] if key in found[other] and key not in ("average", "overall")]
    ours, printed = (
        sum((side[0][key] < side[1][key]) == (key in lower) and side[0][key] != side[1][key] for key in shared)
        for side in ((found[ahead], found[other]), paper)
    )
    return [
        f"{ahead} is ahead of {other} in {ours} of {len(shared)} columns, in the paper in {printed}; how sure a "
        "difference is, the reports do not say."
    ]


def _lacking(chosen: Scored, found: dict[str, Numbers]) -> list[str]:
    """Columns without a number, by model."""
    said = []
    for name, numbers in found.items():
        (table,) = (paper_table(table) for table, models in chosen.models.items() if name in models)
        absent = [c.key for c in table.columns if c.key in chosen.sources and c.key not in numbers]
        said += [f"The report of {name} lacks {', '.join(absent)}."] if absent else []
    return said


def _protocols(chosen: Scored) -> list[str]:
    """Where a benchmark can be counted in several ways and the paper does not say in which."""
    return [UNSAID] if "pope" in chosen.sources or "seed" in chosen.sources else []
