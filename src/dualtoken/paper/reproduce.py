"""`dualtoken reproduce ID`: a table or figure of the paper, in miniature in minutes or at full scale."""

import json
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Literal

from dualtoken.core.errors import UserError, at_least_one
from dualtoken.eval.reconstruction import INCEPTION
from dualtoken.eval.report import table
from dualtoken.paper.ablations import table7, table8, table9, table10
from dualtoken.paper.costs import check_figure6, figure6, table11
from dualtoken.paper.experiment import BUDGET, OPTIONS, Experiment, Setting, command_of, finished
from dualtoken.paper.layers import figure3, figure7, figure8
from dualtoken.paper.measure import check_measuring
from dualtoken.paper.multimodal import (
    figure5,
    figure5_of_models,
    figure5_prompts,
    table2,
    table4,
    table5,
    table6,
    table12,
)
from dualtoken.paper.numbers import paper_figure, paper_table
from dualtoken.paper.scored import TABLES, scored
from dualtoken.paper.side_by_side import run_all, usual_processes
from dualtoken.paper.summary import write_result, write_summary
from dualtoken.paper.table3 import table3
from dualtoken.paper.tables import check_table1, table1

IMAGENET = "ImageNet-1K's validation set (--data, a folder of class folders; https://image-net.org)"
TRAINED = f"{IMAGENET}, other pictures to train on (--train_data, as ImageNet's training set)"
PHOTOS = "other pictures than it was trained on (--data, as ImageNet's validation set)"


APART = "one backbone a run, each with an --output of its own and all with one --parts"
MEASURING = {"also": ("inception", "lpips"), "mini": ("data", "train_data", "encoder"), "ready": check_measuring}


def _reports(id: str, tools: str) -> str:
    """What a table of benchmarks needs."""
    names = ", ".join(f"{name}=REPORT" for name in TABLES[id].names)
    return f"reports of dualtoken eval scores on {tools} (--scores with some of {names}; docs/full-scale.md)"


EXPERIMENTS = {
    "table1": Experiment(
        paper_table("table1").title, "dual codes keep the encoder's zero-shot accuracy and come back better",
        table1, 1.5, ("data", "weights", "encoder"),
        f"{IMAGENET}, a tokenizer (--weights), the encoder that it started from (--encoder), --flickr8k for retrieval",
        also=("inception", "flickr8k"), mini=("data", "weights", "encoder"), ready=check_table1,
    ),
    "table3": Experiment(
        paper_table("table3").title, "one codebook for both objectives collapses, two at two layers beat either alone",
        table3, 32, ("data", "train_data", "encoder"), f"{TRAINED} and google/siglip-so400m-patch14-384 (--encoder)",
        **MEASURING,
    ),
    **{
        id: Experiment(
            paper_table(id).title, claim, make, minutes, ("data", "train_data", "encoder"),
            f"{TRAINED} and one of the backbones (--encoder); {APART}", **MEASURING,
        )
        for id, claim, make, minutes in (
            ("table7", "the first quarter of the layers is the place for pixels, deeper ones are worse", table7, 25),
            ("table8", "so it is for backbones of any size", table8, 25),
            ("table9", "a layer more or less near the first quarter changes little", table9, 25),
        )
    },
    "table10": Experiment(
        paper_table("table10").title, "with UniTok's quantizer, MCQ, dual codes are better still",
        table10, 7, ("data", "train_data", "encoder"), f"{TRAINED} and ViTamin-L/16-256 (--encoder)",
        **MEASURING,
    ),
    **{
        id: Experiment(title, claim, make, minutes, ("scores",), _reports(id, tools), models=TABLES[id].names,
                       full=partial(scored, id=id), ready=partial(scored, id=id), multimodal=True,
                       mini=("weights",) if id == "table12" else ())
        for id, title, claim, make, minutes, tools in (
            ("table2", paper_table("table2").title, "an LLM understands more through an encoder trained for meaning",
             table2, 17, "lmms-eval"),
            ("table4", paper_table("table4").title, "pixel codes beside the semantic ones help understanding",
             table4, 12, "lmms-eval"),
            ("table5", paper_table("table5b").title, "drawing both codes follows prompts better than pixel codes alone",
             table5, 14, "lmms-eval and GenAI-Bench"),
            ("table6", paper_table("table6").title, "one tokenizer draws better than two separate encoders",
             table6, 16, "MJHQ-30K"),
            ("table12", paper_table("table12").title, "competitive on GenEval and WISE", table12, 2,
             "GenEval and WISE"),
        )
    },
    "table11": Experiment(
        paper_table("table11").title, "a second kind of codes costs little", table11, 2, ("weights",),
        "a multimodal model (--weights), measured on this device", mini=("weights",), multimodal=True, alone=True,
    ),
    "fig5": Experiment(
        paper_figure("fig5").title, paper_figure("fig5").claim, figure5, 14, ("weights", "baseline", "data"),
        "two multimodal models, one that draws both codes (--weights) and one of pixel codes alone (--baseline, "
        "trained with --model.output pixel), and prompts, one a line (--data FILE): the first 8, or --pictures",
        full=figure5_of_models, ready=figure5_prompts, multimodal=True,
    ),
    "fig6": Experiment(
        paper_figure("fig6").title, paper_figure("fig6").claim, figure6, 6, ("data", "weights", "baseline"),
        f"a tokenizer (--weights), one of two encoders (--baseline, recipe dual-encoder), and {PHOTOS}",
        mini=("data", "weights", "baseline"), ready=check_figure6, package="umap",
    ),
    "fig3": Experiment(
        paper_figure("fig3").title, paper_figure("fig3").claim, figure3, 1, ("data", "encoder"),
        f"{IMAGENET} and google/siglip-so400m-patch14-384 (--encoder)", mini=("data", "encoder"),
    ),
    "fig7": Experiment(
        paper_figure("fig7").title, paper_figure("fig7").claim, figure7, 16, ("data", "encoder"),
        f"{IMAGENET} and one of the backbones (--encoder); {APART}", mini=("data", "encoder"),
    ),
    "fig8": Experiment(
        paper_figure("fig8").title, paper_figure("fig8").claim, figure8, 0.5, ("data", "encoder"),
        f"{IMAGENET} and google/siglip-so400m-patch14-384 (--encoder)", mini=("data", "encoder"),
    ),
}  # fmt: skip


def reproduce(
    id: str,
    scale: Literal["mini", "full"] = "mini",
    output: str = "reproduced",
    data: str | None = None,
    train_data: str | None = None,
    weights: str | None = None,
    encoder: str | None = None,
    pictures: int | None = None,
    seed: int = 0,
    again: bool = False,
    budget: float | None = None,
    parts: str | None = None,
    inception: str | None = None,
    lpips: str | None = None,
    baseline: str | None = None,
    flickr8k: str | None = None,
    scores: str | None = None,
    processes: int | None = None,
) -> None:
    """Make a table or figure of the paper.

    Args:
        id: table3, fig8, ...; "all" (at full scale what the options given allow); or "list", which says what there is,
            what each needs, and what is made.
        scale: "mini" (the bundled world and checkpoints, two cores) or "full" (the paper's, with data and weights).
        output: folder for ID.json, ID.md, ID.html and pictures; of `all` index.html in place of ID.html.
        data: pictures to measure on, at full scale; for fig5 a file of prompts.
        train_data: other pictures, for tables that train tokenizers; the miniature has scenes of its own.
        weights: what is measured: the directory of a tokenizer, for table11 and fig5 of a multimodal model.
        encoder: the image-text encoder, or its image tower: a directory of ours, of Hugging Face or of open_clip.
        pictures: how many, at most.
        seed: of everything random.
        again: make it also where the folder holds it, made at the same commit, and measure everything anew; trained
            parts are kept.
        budget: minutes of a table in miniature: at 30, the default, every part is trained for its own steps, at 15 for
            half of them.
        parts: folder of trained parts, which tables share; default: OUTPUT/parts.
        inception: torch-fidelity's Inception weights, for rFID at full scale.
        lpips: torchvision's VGG-16 weights, for LPIPS in the tokenizers that are trained at full scale; without it
            features of the encoder take its place.
        baseline: for fig5 and fig6, the model that --weights is compared with.
        flickr8k: folder with Flickr8k as it is published, for table1's retrieval at full scale.
        scores: NAME=REPORT,... for tables 2, 4, 5, 6 and 12 at full scale: reports of dualtoken eval scores.
        processes: of "all", tables made side by side, each with its share of the cores, its output in OUTPUT/ID.log; of
            one table in miniature, parts that are trained at a time. Default: in miniature on a CPU of at least two
            cores 2, otherwise 1.
    """
    if budget is not None and scale == "full":
        raise UserError(f"--budget {budget:g}: reproduce {id} does not take it at full scale")
    budget = BUDGET if budget is None else budget
    if budget <= 0 or seed < 0:
        raise UserError(f"--budget {budget:g}, --seed {seed}: give a budget above 0 and a seed of at least 0")
    if pictures is not None:
        at_least_one(pictures=pictures)
    if processes is not None and (processes < 1 or (processes > 1 and id != "all" and scale == "full")):
        raise UserError(f"--processes {processes}: give at least 1, and more at full scale for `all` alone")
    if inception is not None and not Path(inception).is_file():
        raise UserError(f"--inception {inception}: no such file; it is published as {INCEPTION}")
    if lpips is not None and not Path(lpips).is_file():
        raise UserError(f"--lpips {lpips}: no such file; it is torchvision's vgg16-397923af.pth")
    setting = Setting(
        scale, Path(output), data, train_data, weights, encoder, pictures, seed, budget,
        Path(parts) if parts else None, inception, lpips, baseline, flickr8k, _named(scores), again,
    )  # fmt: skip
    own = {name: experiment.own(setting) for name, experiment in EXPERIMENTS.items()}
    if id == "list":
        rows = [
            (name, f"{e.minutes * budget / BUDGET:.2g} min",
             "yes" if finished(setting.out / f"{name}.json", own[name]) else "no",
             ", ".join(e.missing(own[name])) or "-")
            for name, e in EXPERIMENTS.items()
        ]  # fmt: skip
        print(table(("id", "miniature, alone", f"in {output}", "missing here"), rows))
        print(f"\nOn two cores, about; `all` trains what tables share once: {2 * budget / BUDGET:.2g} hours.")
        for name, e in EXPERIMENTS.items():
            print(f"\n{name}: {e.title}\n    --scale full needs {e.wants}")
        return
    if id != "all" and id not in EXPERIMENTS:
        near = get_close_matches(id, EXPERIMENTS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(EXPERIMENTS)}, all and list"
        raise UserError(f"ID {id!r} is not a table or figure that can be made; {hint}")
    processes = processes or usual_processes(scale)
    if id == "all":
        _refuse_unknown(setting, own)
        chosen = [name for name in EXPERIMENTS if scale == "mini" or _possible(name, own[name])]
        if not chosen:
            raise UserError("reproduce all --scale full: nothing can be made of these options (see above)")
    else:
        EXPERIMENTS[id].refuse(id, setting)
        chosen = [id]
    for name in chosen:
        if scale == "mini" or id != "all":
            EXPERIMENTS[name].check(name, own[name])  # before any work
        _keep(setting.out / f"{name}.json", own[name])
    waiting = []
    for name in chosen:
        place = setting.out / f"{name}.json"
        if not again and finished(place, own[name]):
            print(f"{name} is done: {place}")
        else:
            waiting.append((name, EXPERIMENTS[name], own[name]))
    if id != "all":
        waiting = [(name, experiment, replace(setting, processes=processes)) for name, experiment, setting in waiting]
    run_all(waiting, processes)
    if id == "all":
        write_summary(setting.out, chosen)
    else:
        write_result(setting.out, id)


def _keep(place: Path, setting: Setting) -> None:
    """Raise UserError where a file holds the result of another scale or of other options, unless --again."""
    try:
        found = json.loads(place.read_text())
    except (OSError, ValueError):
        return
    other = found.get("scale") != setting.scale or found.get("options", {}) != setting.asked["options"]
    if other and not setting.again:
        raise UserError(f"{place} holds what `{command_of(found)}` made: give another --output, or --again true")


def _refuse_unknown(setting: Setting, own: dict[str, Setting]) -> None:
    """Raise UserError for what is given to `all` and taken by no table."""
    for name in OPTIONS:
        given, taken = getattr(setting, name), [getattr(one, name) for one in own.values()]
        if isinstance(given, dict):
            if setting.scale == "mini":
                raise UserError(f"--{name}: no table takes it in miniature")
            known = {model for experiment in EXPERIMENTS.values() for model in experiment.models}
            if unknown := [model for model in given if model not in known]:
                raise UserError(f"--{name} {unknown[0]}=...: no table has a model of that name")
        elif given is not None and given not in taken:
            scale = "at full scale" if setting.scale == "full" else "in miniature"
            raise UserError(f"--{name} {given}: no table takes it {scale}")


def _possible(name: str, setting: Setting) -> bool:
    """Whether full scale has all that an experiment needs; what it lacks is said."""
    try:
        EXPERIMENTS[name].check(name, setting)
    except UserError as error:
        print(f"left out: {error}")
        return False
    return True


def _named(scores: str | None) -> dict[str, str] | None:
    """NAME=REPORT,... -> name -> file."""
    if scores is None:
        return None
    pairs = [part.partition("=") for part in scores.split(",") if part]
    wrong = [name for name, _, file in pairs if not file]
    if wrong or not pairs:
        raise UserError(f"--scores {scores}: give NAME=REPORT,... with reports of dualtoken eval scores")
    if missing := [file for _, _, file in pairs if not Path(file).is_file()]:
        raise UserError(f"--scores {missing[0]}: no such file; dualtoken eval scores --output writes it")
    return {name: file for name, _, file in pairs}
