"""`dualtoken eval scores`: what the scorers of benchmarks wrote, in one report, each number with how it was made.

The scorers' own files are read and their own sums are made; MJHQ-30K has no such file, its FID is computed here.
"""

import glob
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from dualtoken.core.errors import UserError
from dualtoken.core.images import FIT
from dualtoken.core.pretrained import load_torch_file
from dualtoken.data.images import ImageFolder, read_in_order
from dualtoken.eval.reconstruction import inception_distance
from dualtoken.eval.report import share, table, write_json

Found = dict[str, Any]  # "numbers": name -> value, "protocol": how, and counts

# Names, first prompt and weight of WISE's categories; the last prompt is before the next first, or 1000
WISE_LEGACY = {"culture": (1, 0.4), "time": (401, 0.167), "space": (568, 0.133),
               "biology": (701, 0.1), "physics": (801, 0.1), "chemistry": (901, 0.1)}  # fmt: skip
WISE_VERIFIED = {"culture": (1, 0.4), "time": (401, 0.12), "space": (521, 0.12),
                 "biology": (641, 0.12), "physics": (761, 0.12), "chemistry": (881, 0.12)}  # fmt: skip
WISE_PROMPTS = 1000
GENAI_GROUPS = {
    "basic": ("attribute", "scene", "spatial relation", "action relation", "part relation", "basic"),
    "advanced": ("counting", "comparison", "differentiation", "negation", "universal", "advanced"),
}


def scores(
    geneval: str | None = None,
    wise: str | None = None,
    genai_bench: str | None = None,
    genai_skills: str | None = None,
    mjhq: str | None = None,
    mjhq_reference: str | None = None,
    inception_weights: str | None = None,
    lmms: str | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Read the result files of benchmarks' scorers into one report.

    Args:
        geneval: results.jsonl of evaluate_images.py.
        wise: score files (.jsonl) of gpt_eval.py or vllm_eval.py: names or patterns with commas between them.
        genai_bench: scores (.pt) of genai_bench/evaluate.py.
        genai_skills: genai_skills.json, published beside genai_image.json.
        mjhq: folder of drawings, a subfolder a category.
        mjhq_reference: the published pictures, mjhq30k_imgs.
        inception_weights: torch-fidelity's Inception file, for MJHQ-30K's FID.
        lmms: results (.json) of lmms_eval.
        output: JSON file to write, with a page to read (.html) and a table in Markdown beside it.
    """
    found: dict[str, Found] = {}
    if geneval is not None:
        found["GenEval"] = read_geneval(geneval)
    if wise is not None:
        found["WISE"] = read_wise(wise)
    if genai_bench is not None:
        found["GenAI-Bench"] = read_genai_bench(genai_bench, genai_skills)
    if mjhq is not None:
        found["MJHQ-30K"] = mjhq_distance(mjhq, mjhq_reference, inception_weights)
    if lmms is not None:
        found["lmms-eval"] = read_lmms(lmms)
    if not found:
        raise UserError("nothing to report: give --geneval, --wise, --genai_bench, --mjhq or --lmms")
    rows = [(f"{name}: {key}", value) for name, one in found.items() for key, value in one["numbers"].items()]
    text = [table(("benchmark", "measured"), rows), *(f"{name}: {one['protocol']}" for name, one in found.items())]
    print("\n".join(text))
    write_json(output, found)
    if output is not None:
        lines = ["| benchmark | measured | how |", "|---|---|---|"]
        lines += [
            f"| {name}: {key} | {'-' if value is None else f'{value:.4g}'} | {one['protocol']} |"
            for name, one in found.items() for key, value in one["numbers"].items()
        ]  # fmt: skip
        Path(output).with_suffix(".md").write_text("\n".join(lines) + "\n")
    return found


def read_geneval(path: str) -> Found:
    """Overall score (mean over tasks of the share of right pictures), as summary_scores.py has it, and by task."""
    by_task, by_prompt = defaultdict(list), defaultdict(list)
    for entry in _lines(
        path, "--geneval", "results.jsonl of GenEval's evaluate_images.py", ("tag", "correct", "metadata")
    ):
        by_task[str(entry["tag"])].append(bool(entry["correct"]))
        by_prompt[json.dumps(entry["metadata"], sort_keys=True)].append(bool(entry["correct"]))
    tasks = {tag: share(values) for tag, values in by_task.items()}
    numbers = {"overall": fmean(one.value for one in tasks.values())}
    numbers |= {tag: one.value for tag, one in tasks.items()}
    pictures = sum(one.total for one in tasks.values())
    return {
        "numbers": numbers, "pictures": pictures, "prompts": len(by_prompt),
        "right_pictures": sum(one.right for one in tasks.values()) / pictures,
        "right_prompts": fmean(any(values) for values in by_prompt.values()),
        "intervals": {tag: list(one.interval) for tag, one in tasks.items()},
        "protocol": f"{pictures} pictures of {len(by_prompt)} prompts, GenEval's detector (Mask2Former) and rules; "
                    "overall is the mean of its tasks",
    }  # fmt: skip


def read_wise(listed: str) -> Found:
    """WiScore overall and by category, by the weights of the release that wrote the files, which their keys tell."""
    legacy, verified = ("consistency", "realism", "aesthetic_quality"), ("score",)
    scored: dict[int, float] = {}
    kinds = set()
    for path in _files(listed, "--wise"):
        for entry in _lines(path, "--wise", "scores (.jsonl) of WISE's gpt_eval.py or vllm_eval.py", ("prompt_id",)):
            kind = next((k for k in (legacy, verified) if all(isinstance(entry.get(v), int | float) for v in k)), None)
            number = str(entry["prompt_id"])  # 12 or "12"
            if kind is None or not (number.isdecimal() and 1 <= int(number) <= WISE_PROMPTS):
                raise UserError(
                    f"--wise {path}: a line without scores, or of no prompt of WISE: {json.dumps(entry)[:120]}"
                )
            kinds.add(kind)
            weights = (0.35, 0.1, 0.05) if kind == legacy else (1.0,)  # of scores from 0 to 2, or from 0 to 1
            scored[int(number)] = sum(w * entry[name] for w, name in zip(weights, kind, strict=True))
    if len(kinds) > 1:
        raise UserError(f"--wise {listed}: files of WISE and of WISE_Verified together; their scores differ in kind")
    categories = WISE_LEGACY if kinds == {legacy} else WISE_VERIFIED
    firsts = [first for first, _ in categories.values()] + [WISE_PROMPTS + 1]
    by_category = {
        name: [scored[n] for n in range(first, firsts[i + 1]) if n in scored]
        for i, (name, (first, _)) in enumerate(categories.items())
    }
    numbers: dict[str, float | None] = {name: fmean(v) if v else None for name, v in by_category.items()}
    whole = None not in numbers.values()
    overall = sum(weight * numbers[name] for name, (_, weight) in categories.items()) if whole else None
    missing = WISE_PROMPTS - len(scored)
    release = "WISE, GPT-4o's scores (the paper's)" if categories is WISE_LEGACY else "WISE_Verified, scores 0 or 1"
    return {
        "numbers": {"overall": overall, **numbers}, "prompts": len(scored), "missing": missing,
        "protocol": f"{release}, {len(scored)} prompts"
                    + (f"; {missing} of {WISE_PROMPTS} are missing, so it is no published score" if missing else ""),
    }  # fmt: skip


def read_genai_bench(path: str, skills: str | None) -> Found:
    """Mean VQAScore overall, of basic and advanced prompts, and by skill."""
    where = "genai_skills.json, published beside genai_image.json"
    if skills is None or not Path(skills).is_file():
        raise UserError(f"--genai_skills {skills}: no such file; it is {where}")
    values = load_torch_file(path, "--genai_bench", "scores written by t2v_metrics' genai_bench/evaluate.py")
    if not isinstance(values, torch.Tensor) or values.ndim < 2:
        raise UserError(
            f"--genai_bench {path}: no scores [prompts, pictures, texts] written by genai_bench/evaluate.py"
        )
    means = values.float().flatten(1).mean(1)
    try:
        tags = {tag: [int(n) for n in listed] for tag, listed in json.loads(Path(skills).read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"--genai_skills {skills}: not {where}") from None
    last = max((n for listed in tags.values() for n in listed), default=-1)
    if last < 0 or last >= len(means):
        raise UserError(f"--genai_skills {skills}: names prompt {last}, --genai_bench {path} has {len(means)} scores")
    every = sorted({n for listed in tags.values() for n in listed})
    numbers = {"overall": float(means[every].mean())}
    order = [tag for group in ("advanced", "basic") for tag in reversed(GENAI_GROUPS[group])]
    numbers |= {tag: float(means[tags[tag]].mean()) for tag in sorted(tags, key=lambda t: (t not in order, t))}
    return {
        "numbers": numbers, "prompts": len(every), "deviation": float(means[every].std()),
        "scorer": Path(path).stem,
        "protocol": f"VQAScore by {Path(path).stem}, one picture of each of {len(every)} prompts",
    }  # fmt: skip


class _AsTheyAre(nn.Module):
    """In place of a feature extractor, for features that were computed once for several distances."""

    num_features = 2048  # Inception's; torchmetrics asks for it

    def forward(self, features: Tensor) -> Tensor:
        return features


@torch.no_grad()
def mjhq_distance(drawn: str, reference: str | None, weights: str | None, batch_size: int = 50) -> Found:
    """FID of a folder of drawings against the reference, overall and by category; pictures pass one batch at a time."""
    if reference is None or not Path(reference).is_dir():
        raise UserError(
            f"--mjhq_reference {reference}: no such folder; it is mjhq30k_imgs.zip, unpacked, published at "
            "https://huggingface.co/datasets/playgroundai/MJHQ-30K"
        )
    if weights is None:
        raise UserError("--mjhq needs --inception_weights: torch-fidelity's pt_inception-2015-12-05-6726825d.pth")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inception = inception_distance(weights).inception.to(device)
    distances = {"all": FrechetInceptionDistance(_AsTheyAre()).to(device)}
    counts, skipped = {"drawn": defaultdict(int), "reference": defaultdict(int)}, []
    sides = {"drawn": ImageFolder(drawn, 299, "--mjhq"), "reference": ImageFolder(reference, 299, "--mjhq_reference")}
    for side, source in sides.items():
        for batch in read_in_order(source, len(source), batch_size, skipped):
            features = inception(batch.images.to(device))
            of = {"all": torch.arange(len(features))}
            for label in sorted(set(batch.labels.tolist()) - {-1}):
                of[source.classes[label]] = (batch.labels == label).nonzero()[:, 0]
            for name, rows in of.items():
                if name not in distances:
                    distances[name] = FrechetInceptionDistance(_AsTheyAre()).to(device)
                distances[name].update(features[rows.to(device)], real=side == "reference")
                counts[side][name] += len(rows)
    if min(counts["drawn"]["all"], counts["reference"]["all"]) < 2:
        raise UserError(f"--mjhq {drawn}: a distance needs at least two pictures on either side")
    numbers = {}
    for name, distance in tqdm(distances.items(), desc="distances", disable=None):
        enough = min(counts[side][name] for side in counts) > 1
        numbers["FID" if name == "all" else f"FID, {name}"] = float(distance.compute()) if enough else None
    drawn_count, reference_count = (counts[side]["all"] for side in ("drawn", "reference"))
    return {
        "numbers": numbers, "pictures": {side: dict(of) for side, of in counts.items()}, "skipped": skipped,
        "protocol": f"FID by torchmetrics and torch-fidelity's Inception, {drawn_count} drawings against "
                    f"{reference_count} pictures of {Path(reference).name}, both: {FIT}, to 299 px in 8 bits",
    }  # fmt: skip


def read_lmms(path: str) -> Found:
    """All numbers of an lmms-eval result file by task and metric."""
    what = "results (.json) written by lmms_eval --output_path"
    content = _json(path, "--lmms", what)
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict):
        raise UserError(f"--lmms {path}: not {what}")
    numbers = {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        if isinstance(metrics, dict)
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in metric
    }
    if not numbers:
        raise UserError(f"--lmms {path}: holds no number")
    version, limit = content.get("lmms_eval_version", "of unknown version"), (content.get("config") or {}).get("limit")
    few = f", --limit {limit:g}, so it is no published score" if isinstance(limit, int | float) else ""
    return {"numbers": numbers, "protocol": f"lmms-eval {version}, its own prompts and metrics{few}"}


def _files(listed: str, option: str) -> list[str]:
    """Names or patterns with commas between them -> files. Raises UserError for one that fits none."""
    found = []
    for name in (part.strip() for part in listed.split(",") if part.strip()):
        matches = [name] if Path(name).is_file() else sorted(glob.glob(name))
        if not matches:
            raise UserError(f"{option} {name}: no such file")
        found += matches
    return found


def _lines(path: str, option: str, what: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Entries of a file of JSON lines. Raises UserError for another file, and for an empty one."""
    if not Path(path).is_file():
        raise UserError(f"{option} {path}: no such file; it is {what}")
    some = False
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            missing = [key for key in keys if key not in entry]
        except (ValueError, TypeError):
            raise UserError(f"{option} {path}, line {number}: no JSON; it should be {what}") from None
        if not isinstance(entry, dict) or missing:
            raise UserError(
                f"{option} {path}, line {number}: lacks {', '.join(missing) or 'keys'}; it should be {what}"
            )
        some = True
        yield entry
    if not some:
        raise UserError(f"{option} {path}: holds no result; it should be {what}")


def _json(path: str, option: str, what: str) -> Any:
    if not Path(path).is_file():
        raise UserError(f"{option} {path}: no such file; it is {what}")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{option} {path}: not {what}") from None
