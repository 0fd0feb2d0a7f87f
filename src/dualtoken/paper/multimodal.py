"""Tables 4, 5 and 12 and Figure 5: what the small LLM reads and draws with one kind of codes, and with both.

Trained as the recipes mini-look and mini-draw say, from random weights, with equal steps, data and order; only what
is compared differs. The bundled tokenizer and, for Table 12, the bundled multimodal model are used as they are.
"""

from pathlib import Path
from textwrap import fill

import numpy as np
import torch
import yaml
from torch import Tensor

from dualtoken.app.figures import draw_rows
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_float
from dualtoken.data.scenes import Scene
from dualtoken.eval.generation import draw_all, draw_prompts, judge_drawings
from dualtoken.eval.understanding import understanding
from dualtoken.eval.zero_shot import embed_texts
from dualtoken.mllm.assistant import Assistant
from dualtoken.paper.experiment import Result, Row, Setting
from dualtoken.paper.measure import Judge
from dualtoken.paper.numbers import paper_table
from dualtoken.paper.prompts import Prompt, geneval_prompts, judge, skill_prompts
from dualtoken.paper.table3 import same_run
from dualtoken.paper.trained import Part, minutes, remembered, train_parts
from dualtoken.paper.variants import LONG, Variant, taps
from dualtoken.tokenizer.presets import RECIPES
from dualtoken.tokenizer.pretrained import open_image_text

LOOK_STEPS, DRAW_STEPS, BATCH = 450, 600, 50
LOOP = {"save_every": 150, "eval_every": 0, "log_every": 20, "tracker": "none"}
SHOWN = 8  # prompts of Figure 5
FIGURE5 = {"fig5.png": "One column a prompt: drawn with both codes, and with pixel codes alone"}
CHANCE = 1.96  # standard errors of a difference, two-sided 95 %
Numbers = dict[str, float]


def pool(steps: int) -> dict[str, int]:
    """Scenes to learn from: about as many as the steps take pictures."""
    scenes = max(64, 16 * steps)
    return {"scenes": scenes, "stories": scenes // 8}


def look_part(setting: Setting, input: str, tokenizer: Part | None = None) -> Part:
    """The small LLM that learns to look at codes of a tokenizer (None = the bundled one)."""
    steps = setting.steps(LOOK_STEPS)
    changes = {
        "seed": setting.seed, "model": {"input": input}, "recipe": {"look": {"steps": steps}}, "loop": LOOP,
        "data": {"scenes": pool(steps), "held_out": 1},
    }  # fmt: skip
    return Part("train-mllm", "mini-look", changes, {"vision_tokenizer": tokenizer} if tokenizer else {})


def draw_part(setting: Setting, output: str) -> Part:
    """That LLM learning to draw: both codes, or pixel codes alone."""
    steps = setting.steps(DRAW_STEPS)
    changes = {
        "seed": setting.seed, "model": {"output": output}, "recipe": {"draw": {"steps": steps}}, "loop": LOOP,
        "data": {"scenes": pool(steps), "held_out": 1},
    }  # fmt: skip
    return Part("train-mllm", "mini-draw", changes, {"start": look_part(setting, "both")})


def understands(setting: Setting, part: Part) -> Numbers:
    """Answers by type and captions of unseen scenes, in percent; kept in the part's folder."""
    number = setting.count(300, 300)

    def ask() -> Numbers:
        found = understanding(str(part.model(setting)), number, number)
        shares = {"questions": found["vqa"], "commonest answer": {"share": found["vqa"]["commonest_answer"]}}
        shares |= found["vqa_by_type"] | {f"caption: {name}": value for name, value in found["captions"].items()}
        return {name: 100 * value["share"] for name, value in shares.items()}

    return remembered(part.folder(setting) / f"understands-{number}.json", setting, ask)


def verdict(ours: float, other: float, number: int, claimed: bool = True) -> str:
    """Two shares in percent, each of `number`, and what their difference says.

    claimed: the paper has ours above the other, so it is said whether that is so here.
    """
    error = (sum(share * (100 - share) for share in (ours, other)) / number) ** 0.5
    word = "no difference beyond chance"
    if abs(ours - other) > CHANCE * error:
        higher = ours > other
        word = f"{'more' if higher else 'less'} beyond chance"
        word += f", {'as in' if higher else 'against'} the paper" if claimed else ""
    return f"{ours:.1f} % and {other:.1f} % of {number}, {word} (one seed)."


def table4(setting: Setting) -> Result:
    """One codebook for all (as VILA-U has it), semantic codes alone, both, and pixel codes alone, under one LLM."""
    one, dual = (same_run(setting, name).part(setting) for name in "ad")
    cases = {
        "one codebook, both objectives": (look_part(setting, "pixel", one), "VILA-U"),
        "semantic codes": (look_part(setting, "semantic", dual), "DualToken (semantic only)"),
        "semantic and pixel codes": (look_part(setting, "both", dual), "DualToken (semantic + pixel)"),
        "pixel codes": (look_part(setting, "pixel", dual), None),
    }
    parts, paper, number = [part for part, _ in cases.values()], paper_table("table4"), setting.count(300, 300)
    train_parts(parts, setting)
    rows = [Row(name, understands(setting, part), paper.row(theirs).values if theirs else {})
            for name, (part, theirs) in cases.items()]  # fmt: skip
    rows.append(Row("SigLIP-L/16-256", {}, paper.row("SigLIP-L/16-256").values))
    _, semantic, both, _ = (row.measured for row in rows[:4])
    said = [
        "With pixel codes beside the semantic ones, and without them, the LLM answers so many questions: "
        + verdict(both["questions"], semantic["questions"], 5 * number)
        + f" The commonest answer alone gives {both['commonest answer']:.1f} %.",
        *(f"Captions, {name}: " + verdict(both[f"caption: {name}"], semantic[f"caption: {name}"], number, False)
          for name in ("color and shape of the main object", "background")),
    ]  # fmt: skip
    return Result(rows, said, parts=minutes(parts, setting))


def draws(setting: Setting, model: str, texts: list[str]) -> list[np.ndarray]:
    """A picture uint8 [S, S, 3] of each prompt, picture i from seed + i."""
    assistant = Assistant.open(model)
    made = draw_all(assistant, texts, assistant.model.draw_config, BATCH, setting.seed)
    return [np.asarray(picture) for picture in made]


def by_kind(prompts: list[Prompt], pictures: list[np.ndarray]) -> Numbers:
    """Right ones by kind and, last, the mean over kinds, in percent."""
    found = {kind: 100 * value.value for kind, value in judge(prompts, pictures).items()}
    return found | {"overall": float(np.mean(list(found.values())))}


@torch.no_grad()
def own_prompt(prompts: list[Prompt], pictures: list[np.ndarray]) -> float:
    """Share of pictures, in percent, to which the contrastive encoder finds the text of their own prompt nearest."""
    pair = open_image_text("mini")
    images = _stack(pictures)
    said = [prompt.text.removeprefix("draw ") for prompt in prompts]
    texts = embed_texts(pair.encoder, pair.tokenizer, said)
    nearest = (pair.encoder.embed_image(to_float(images)) @ texts.t()).argmax(1).tolist()
    found = sum(said[near] == own for near, own in zip(nearest, said, strict=True))  # some prompts are the same
    return 100 * found / len(said)


def _stack(pictures: list[np.ndarray]) -> Tensor:
    """uint8 [S, S, 3] each -> uint8 [M, 3, S, S]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _two_models(setting: Setting) -> dict[str, Part]:
    parts = {name: draw_part(setting, output) for name, output in (("both codes", "both"), ("pixel codes", "pixel"))}
    train_parts(list(parts.values()), setting)
    return parts


def table5(setting: Setting) -> Result:
    """Prompts by skill, drawn with both codes and with pixel codes alone, judged by rule and by the encoder."""
    prompts = skill_prompts(setting.count(50, 50), setting.seed)
    parts, rows = _two_models(setting), []
    for name, part in parts.items():
        pictures = draws(setting, str(part.model(setting)), [prompt.text for prompt in prompts])
        rows.append(Row(name, by_kind(prompts, pictures) | {"own prompt nearest": own_prompt(prompts, pictures)}))
    rows += [Row(row.name, {}, row.values) for row in paper_table("table5b").rows]
    rows += [Row(row.name, {}, row.values) for row in paper_table("table5a").rows if row.ours]
    both, pixel = (row.measured["overall"] for row in rows[:2])
    said = [
        "Judged by rule, so many prompts are drawn right with both codes, and with pixel codes alone: "
        + verdict(both, pixel, len(prompts)),
        "'no' and 'all of them' never occur in training: negate and universal ask for words the model does not know.",
    ]
    return Result(rows, said, parts=minutes(list(parts.values()), setting))


def table12(setting: Setting) -> Result:
    """GenEval's six tasks on scenes, with the bundled model."""
    prompts = geneval_prompts(setting.count(50, 50), setting.seed)
    found = by_kind(prompts, draws(setting, setting.model, [prompt.text for prompt in prompts]))
    rows = [Row(f"{setting.model}, by rule, %", found)]
    rows += [Row(row.name, {}, row.values) for row in paper_table("table12").rows]
    best = max((kind for kind in found if kind != "overall"), key=found.get)
    said = [
        f"Overall {found['overall']:.1f} %, best at '{best}' with {found[best]:.1f} %. GenEval's own score is a share."
    ]
    return Result(rows, said)


def figure5(setting: Setting) -> Result:
    """The same prompts drawn with both codes and with pixel codes alone."""
    parts = _two_models(setting)
    models = {name: str(part.model(setting)) for name, part in parts.items()}
    prompts = skill_prompts(SHOWN, setting.seed)[:SHOWN]  # those of the first skill
    made = _figure5(setting, models, [prompt.text for prompt in prompts])
    rows = [Row(name, by_kind(prompts, pictures)) for name, pictures in made.items()]
    shares = (f"{row.name} {row.measured['overall']:.0f} %" for row in rows)
    said = [f"Right by rule: {', '.join(shares)}."]
    return Result(rows, said, FIGURE5, minutes(list(parts.values()), setting))


def figure5_prompts(setting: Setting) -> list[str]:
    """The prompts of a file, one a line. Raises UserError where it has none."""
    try:
        lines = Path(setting.data).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--data {setting.data}: no file of prompts, one a line") from None
    prompts = [line.strip() for line in lines if line.strip()][: setting.count(SHOWN, SHOWN)]
    if not prompts:
        raise UserError(f"--data {setting.data}: no prompt in it")
    return prompts


def figure5_of_models(setting: Setting) -> Result:
    """Figure 5 at full scale: prompts of a file, drawn by two models that are at hand. No rule judges them."""
    prompts = figure5_prompts(setting)
    _figure5(setting, {"both codes": setting.weights, "pixel codes": setting.baseline}, prompts)
    rows = [Row(name, {"prompts": len(prompts)}) for name in ("both codes", "pixel codes")]
    return Result(rows, ["Look at the picture: nothing is judged here."], FIGURE5)


def _figure5(setting: Setting, models: dict[str, str], texts: list[str]) -> dict[str, list[np.ndarray]]:
    """Draw all texts with each model, into one picture."""
    made = {name: draws(setting, model, texts) for name, model in models.items()}
    titles = [fill(text.removeprefix("draw "), 20) for text in texts]
    draw_rows(setting.out / "fig5.png", [_stack(pictures) for pictures in made.values()], list(made), titles)
    return made


def table2(setting: Setting) -> Result:
    """An encoder trained for meaning, the same shape trained to draw, and a convolutional one, under one LLM.

    All three are read through codes, with a tokenizer of equal steps, and the LLM sees one vocabulary of each.
    """
    deep = taps(setting).deep
    tokenizers = {
        "CLIP-based": ("contrastive encoder", "pixel", same_run(setting, "meaning", steps=LONG)),
        "CLIP-based (reconstruction)": ("the same shape, trained to reconstruct from scratch", "pixel", Variant(
            deep, deep, joined=True, means=0.0, scratch=True, steps=LONG, seed=setting.seed)),
        "VQVAE-based": ("convolutional encoder, reconstruction", "pixel", two_encoders(setting)),
    }  # fmt: skip
    paper = paper_table("table2")
    parts = [look_part(setting, input, variant.part(setting)) for _, input, variant in tokenizers.values()]
    train_parts(parts, setting)
    rows = [Row(name, understands(setting, part), paper.row(theirs).values)
            for (theirs, (name, *_)), part in zip(tokenizers.items(), parts, strict=True)]  # fmt: skip
    said, number = [], setting.count(300, 300)
    for other in rows[1:]:
        both = rows[0].measured, other.measured
        for what, key, total in (
            ("Questions", "questions", 5 * number),
            ("Captions, color and shape", "caption: color and shape of the main object", number),
        ):
            found = verdict(*(side[key] for side in both), total, claimed=key == "questions")
            said.append(f"{what}, {rows[0].name} and {other.name}: {found}")
    return Result(rows, said, parts=minutes(parts, setting))


def two_encoders(setting: Setting) -> Variant:
    """The baseline of appendix F.4: a convolutional pixel encoder beside the frozen semantic one."""
    at = taps(setting)
    return Variant(at.shallow, at.deep, own_encoder=True, steps=LONG, seed=setting.seed)


def table6(setting: Setting) -> Result:
    """Drawings with codes of one tokenizer, and with those of two separate encoders, from equal trainings."""
    number = setting.count(300, 300)
    truths, texts = draw_prompts(1, number, "test", setting.seed)
    judge_of, rows = Judge(setting, "mini"), []
    cases = {
        "one tokenizer (DualToken)": (same_run(setting, "d", steps=LONG), "DualToken-3B"),
        "two encoders": (two_encoders(setting), "Dual encoder"),
    }
    tokenizers = [variant.part(setting) for variant, _ in cases.values()]
    parts = [from_nothing(setting, tokenizer) for tokenizer in tokenizers]
    train_parts(parts, setting)
    for (name, (_, theirs)), tokenizer, part in zip(cases.items(), tokenizers, parts, strict=True):
        pictures = draws(setting, str(part.model(setting)), texts)
        right = judge_drawings("right, %", truths, texts, pictures)["right, %"]
        numbers = {"right, %": 100 * right.value, "distance to true pictures": distance(truths, pictures)}
        numbers |= {f"tokenizer {key}": judge_of.measure(tokenizer)[key] for key in ("psnr", "zero_shot")}
        rows.append(Row(name, numbers, paper_table("table6").row(theirs).values))
    shown = {row.name for row in paper_table("table6").rows} - {"DualToken-3B", "Dual encoder"}
    rows += [Row(row.name, {}, row.values) for row in paper_table("table6").rows if row.name in shown]
    one, two = (row.measured["distance to true pictures"] for row in rows[:2])
    order = "as in the paper" if one < two else "against the paper"
    said = [
        f"Frechet distance of drawings to true pictures in the bundled encoder's features (no FID): one tokenizer "
        f"{one:.1f}, two encoders {two:.1f}: in order {order}, but from one seed each, whose spread is not known."
    ]
    return Result(rows, said, parts=minutes(parts, setting))


def from_nothing(setting: Setting, tokenizer: Part) -> Part:
    """A small LLM at random that learns to draw with a tokenizer's codes."""
    steps = setting.steps(DRAW_STEPS)
    small = yaml.safe_load((RECIPES / "mini-look.yaml").read_text())["small"]
    changes = {
        "seed": setting.seed, "start": None, "small": small, "recipe": {"draw": {"steps": steps}}, "loop": LOOP,
        "data": {"scenes": pool(steps), "held_out": 1},
    }  # fmt: skip
    return Part("train-mllm", "mini-draw", changes, {"vision_tokenizer": tokenizer})


@torch.no_grad()
def distance(truths: list[Scene], pictures: list[np.ndarray]) -> float:
    """Frechet distance of drawn pictures to the scenes that they were asked for, in the bundled encoder's features."""
    backbone = open_image_text("mini").encoder.backbone
    true = _stack([truth.render(pictures[0].shape[0]) for truth in truths])
    sides = [torch.cat([backbone(to_float(part)) for part in side.split(BATCH)]) for side in (true, _stack(pictures))]
    return frechet(*(side.double().numpy() for side in sides))


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of two sets of vectors [M, C], each taken as a Gaussian."""
    means, covariances = zip(*((side.mean(0), np.cov(side, rowvar=False)) for side in (first, second)), strict=True)
    # tr sqrt(A B): square roots of the eigenvalues, which are real and not negative but for rounding
    roots = np.sqrt(np.clip(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0, None)).sum()
    apart = float(((means[0] - means[1]) ** 2).sum())
    return apart + float(np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots)
