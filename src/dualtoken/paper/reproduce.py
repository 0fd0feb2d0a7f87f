"""`dualtoken reproduce ID`: a table or figure of the paper, in miniature in minutes or at full scale."""

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from dualtoken.core.errors import UserError
from dualtoken.eval.report import table
from dualtoken.paper.experiment import Experiment, Setting, finished, run
from dualtoken.paper.layers import figure3, figure7, figure8
from dualtoken.paper.numbers import paper_figure, paper_table
from dualtoken.paper.tables import table1

IMAGENET = "ImageNet-1K's validation set (--data, a folder of class folders)"
EXPERIMENTS = {
    "table1": Experiment(
        paper_table("table1").title, "dual codes keep the encoder's zero-shot accuracy and come back better",
        table1, 1.5, ("data", "weights", "encoder"),
        f"{IMAGENET}, a tokenizer (--weights) and the encoder that it started from (--encoder)",
    ),
    "fig3": Experiment(
        paper_figure("fig3").title, paper_figure("fig3").claim, figure3, 1, ("data", "encoder"),
        f"{IMAGENET} and google/siglip-so400m-patch14-384 (--encoder)",
    ),
    "fig7": Experiment(
        paper_figure("fig7").title, paper_figure("fig7").claim, figure7, 0.5, ("data", "encoder"),
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
    weights: str | None = None,
    encoder: str | None = None,
    pictures: int | None = None,
    seed: int = 0,
    again: bool = False,
) -> None:
    """Make a table or figure of the paper.

    Args:
        id: table1, fig3, fig7, fig8; "all"; or "list", which says what each needs.
        scale: "mini" (the bundled world and checkpoints, two cores) or "full" (the paper's, with data and weights).
        output: folder for ID.json, ID.md and pictures.
        data: pictures, at full scale.
        weights: the tokenizer that is measured: a directory.
        encoder: the image-text encoder, or its image tower: a directory of ours, of Hugging Face or of open_clip.
        pictures: how many, at most.
        seed: of everything random.
        again: make it also where the folder holds it, made at the same commit.
    """
    if id == "list":
        rows = [(name, e.title, f"{e.minutes:g} min", e.wants) for name, e in EXPERIMENTS.items()]
        print(table(("id", "what", "miniature", "full scale needs"), rows))
        return
    if id != "all" and id not in EXPERIMENTS:
        near = get_close_matches(id, EXPERIMENTS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(EXPERIMENTS)}, all and list"
        raise UserError(f"ID {id!r} is not a table or figure that can be made; {hint}")
    setting = Setting(scale, Path(output), data, weights, encoder, pictures, seed)
    chosen = list(EXPERIMENTS) if id == "all" else [id]
    for name in chosen:
        EXPERIMENTS[name].check(name, setting)  # before any work
    for name in chosen:
        place = setting.out / f"{name}.json"
        if not again and finished(place, setting):
            print(f"{name} is done: {place}")
            continue
        run(name, EXPERIMENTS[name], setting)
    if id == "all":
        summary = [f"- [{EXPERIMENTS[name].title}]({name}.md) ({name})" for name in chosen]
        (setting.out / "README.md").write_text("\n".join([f"# The paper, {scale} scale", "", *summary]) + "\n")
