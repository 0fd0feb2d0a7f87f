"""`dualtoken reproduce ID`: a table or figure of the paper, in miniature in minutes or at full scale."""

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from dualtoken.core.errors import UserError
from dualtoken.eval.reconstruction import INCEPTION
from dualtoken.eval.report import table
from dualtoken.paper.ablations import table7, table8, table9, table10
from dualtoken.paper.costs import figure6, table11
from dualtoken.paper.experiment import BUDGET, Experiment, Setting, finished, run
from dualtoken.paper.layers import figure3, figure7, figure8
from dualtoken.paper.multimodal import figure5, table2, table4, table5, table6, table12
from dualtoken.paper.numbers import paper_figure, paper_table
from dualtoken.paper.summary import write_summary
from dualtoken.paper.table3 import table3
from dualtoken.paper.tables import table1
from dualtoken.tokenizer.presets import tokenizer_directory

IMAGENET = "ImageNet-1K's validation set (--data, a folder of class folders; https://image-net.org)"
TRAINED = f"{IMAGENET}, other pictures to train on (--train_data, as ImageNet's training set)"
LATER = (
    "train with dualtoken train-mllm (recipes qwen2.5-3b and qwen2.5-7b; --model.input, --model.output for ablations) "
    "and measure with the benchmarks' own tools"
)
EXPERIMENTS = {
    "table1": Experiment(
        paper_table("table1").title, "dual codes keep the encoder's zero-shot accuracy and come back better",
        table1, 1.5, ("data", "weights", "encoder"),
        f"{IMAGENET}, a tokenizer (--weights) and the encoder that it started from (--encoder)",
    ),
    "table3": Experiment(
        paper_table("table3").title, "one codebook for both objectives collapses, two at two layers beat either alone",
        table3, 30, ("data", "train_data", "encoder"), f"{TRAINED} and google/siglip-so400m-patch14-384 (--encoder)",
    ),
    **{
        id: Experiment(
            paper_table(id).title, claim, make, minutes, ("data", "train_data", "encoder"),
            f"{TRAINED} and one of the backbones (--encoder); one backbone a run",
        )
        for id, claim, make, minutes in (
            ("table7", "the first quarter of the layers is the place for pixels, deeper ones are worse", table7, 18),
            ("table8", "so it is for backbones of any size", table8, 1),
            ("table9", "a layer more or less near the first quarter changes little", table9, 5),
        )
    },
    "table10": Experiment(
        paper_table("table10").title, "with UniTok's quantizer, MCQ, dual codes are better still",
        table10, 4, ("data", "train_data", "encoder"), f"{TRAINED} and ViTamin-L/16-256 (--encoder)",
    ),
    **{
        id: Experiment(title, claim, make, minutes, (), LATER, full=False)
        for id, title, claim, make, minutes in (
            ("table2", paper_table("table2").title, "an LLM understands more through an encoder trained for meaning",
             table2, 28),
            ("table4", paper_table("table4").title, "pixel codes beside the semantic ones help understanding",
             table4, 28),
            ("table5", paper_table("table5b").title, "drawing both codes follows prompts better than pixel codes alone",
             table5, 20),
            ("table6", paper_table("table6").title, "one tokenizer draws better than two separate encoders",
             table6, 25),
            ("table12", paper_table("table12").title, "competitive on GenEval and WISE", table12, 2),
            ("table11", paper_table("table11").title, "a second kind of codes costs little", table11, 2),
            ("fig5", paper_figure("fig5").title, paper_figure("fig5").claim, figure5, 1),
        )
    },
    "fig6": Experiment(
        paper_figure("fig6").title, paper_figure("fig6").claim, figure6, 6, (), LATER, full=False, package="umap",
    ),
    "fig3": Experiment(
        paper_figure("fig3").title, paper_figure("fig3").claim, figure3, 1, ("data", "encoder"),
        f"{IMAGENET} and google/siglip-so400m-patch14-384 (--encoder)",
    ),
    "fig7": Experiment(
        paper_figure("fig7").title, paper_figure("fig7").claim, figure7, 8, ("data", "encoder"),
        f"{IMAGENET} and one of the backbones (--encoder)",
    ),
    "fig8": Experiment(
        paper_figure("fig8").title, paper_figure("fig8").claim, figure8, 0.5, ("data", "encoder"),
        f"{IMAGENET} and google/siglip-so400m-patch14-384 (--encoder)",
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
    budget: float = BUDGET,
    parts: str | None = None,
    inception: str | None = None,
) -> None:
    """Make a table or figure of the paper.

    Args:
        id: table3, fig8, ...; "all"; or "list", which says what there is, what each needs, and what is made.
        scale: "mini" (the bundled world and checkpoints, two cores) or "full" (the paper's, with data and weights).
        output: folder for ID.json, ID.md and pictures.
        data: pictures to measure on, at full scale.
        train_data: other pictures, for tables that train tokenizers; the miniature has scenes of its own.
        weights: the tokenizer that is measured: a directory.
        encoder: the image-text encoder, or its image tower: a directory of ours, of Hugging Face or of open_clip.
        pictures: how many, at most.
        seed: of everything random.
        again: make it also where the folder holds it, made at the same commit.
        budget: minutes of a table in miniature: at 30 every part is trained for its own steps, at 15 for half of them.
        parts: folder of trained parts, which tables share; default: OUTPUT/parts.
        inception: torch-fidelity's Inception weights, for rFID at full scale.
    """
    if budget <= 0 or seed < 0:
        raise UserError(f"--budget {budget:g}, --seed {seed}: give a budget above 0 and a seed of at least 0")
    if pictures is not None and pictures < 1:
        raise UserError(f"--pictures {pictures}: give at least 1")
    if inception is not None and not Path(inception).is_file():
        raise UserError(f"--inception {inception}: no such file; it is published as {INCEPTION}")
    if weights is not None:
        tokenizer_directory(weights, "--weights")
    setting = Setting(
        scale, Path(output), data, train_data, weights, encoder, pictures, seed, budget,
        Path(parts) if parts else None, inception,
    )  # fmt: skip
    if id == "list":
        rows = [
            (name, e.title, f"{e.minutes * budget / BUDGET:.2g} min",
             "yes" if finished(setting.out / f"{name}.json", setting) else "no", ", ".join(e.missing(setting)) or "-",
             e.wants if e.full else f"not by this command: {e.wants}")
            for name, e in EXPERIMENTS.items()
        ]  # fmt: skip
        print(table(("id", "what", "miniature", f"in {output}", "missing here", "full scale needs"), rows))
        return
    if id != "all" and id not in EXPERIMENTS:
        near = get_close_matches(id, EXPERIMENTS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(EXPERIMENTS)}, all and list"
        raise UserError(f"ID {id!r} is not a table or figure that can be made; {hint}")
    chosen = [id]
    if id == "all":
        chosen = [name for name, experiment in EXPERIMENTS.items() if experiment.full or scale == "mini"]
    for name in chosen:
        EXPERIMENTS[name].check(name, setting)  # before any work
    for name in chosen:
        place = setting.out / f"{name}.json"
        if not again and finished(place, setting):
            print(f"{name} is done: {place}")
            continue
        run(name, EXPERIMENTS[name], setting)
    if id == "all":
        write_summary(setting.out, chosen)
