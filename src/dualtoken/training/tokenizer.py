"""`dualtoken train-tokenizer`: both vocabularies and the decoder on top of a pretrained backbone (section 3.2, 4.1).

The backbone starts from an encoder, and a frozen copy of that start is the teacher of eq. 4. Two optimisers: one for
the tokenizer, one for the discriminator (when the adversarial weight is above 0).
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import make_grid

from dualtoken.core.distributed import mean_parts
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_bytes, to_float, to_picture
from dualtoken.data.images import DataConfig, StepBatches, open_source, step_batches
from dualtoken.eval.reconstruction import evaluate_reconstruction
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig
from dualtoken.tokenizer.branch import BranchConfig
from dualtoken.tokenizer.decoder import DecoderConfig
from dualtoken.tokenizer.initial import load_backbone
from dualtoken.tokenizer.pixel_encoder import PixelEncoderConfig
from dualtoken.tokenizer.tokenizer import (
    DualTokenImageProcessor,
    DualTokenVisionConfig,
    DualTokenVisionTokenizer,
    reconstruct,
)
from dualtoken.training.discriminator import Discriminator, DiscriminatorConfig
from dualtoken.training.loop import Loop, LoopConfig, seed_step
from dualtoken.training.losses import LossConfig, discriminator_loss, generator_losses
from dualtoken.training.optim import OptimConfig
from dualtoken.training.perceptual import build_perceptual

PARTS = ("backbone", "pixel", "semantic", "decoder", "pixel_encoder")


@dataclass
class Phase:
    """A stretch of training: how many steps, and which parts of the tokenizer learn in it."""

    steps: int
    trains: tuple[str, ...] = PARTS


@dataclass
class EvalConfig:
    """Pictures of the periodic evaluation: `source` as in DataConfig ("scenes" = its test split), `images` of them."""

    source: str = "scenes"
    images: int = 128


def train_tokenizer(
    output: str = "runs/tokenizer",
    encoder: str | None = None,
    resume: Literal["auto", "never"] = "auto",
    seed: int = 0,
    data: DataConfig = DataConfig(),
    evaluation: EvalConfig = EvalConfig(),
    backbone: BackboneConfig = BackboneConfig(""),
    pixel: BranchConfig = BranchConfig(),
    semantic: BranchConfig = BranchConfig(),
    decoder: DecoderConfig = DecoderConfig(),
    pixel_encoder: PixelEncoderConfig | None = None,
    losses: LossConfig = LossConfig(),
    discriminator: DiscriminatorConfig = DiscriminatorConfig(),
    phases: list[Phase] = [Phase(2000, ("pixel", "semantic", "decoder")), Phase(98000)],  # noqa: B006 (read only)
    optim: OptimConfig = OptimConfig(),
    ema: float = 0.0,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    loop: LoopConfig = LoopConfig(),
) -> dict[str, Any]:
    """Train the vision tokenizer on scenes or on your own pictures.

    Args:
        output: folder of the run; the tokenizer is written to OUTPUT/model.
        encoder: the pretrained image tower, which brings its own shape: a preset, a directory (train-encoder's, a
            Hugging Face SigLIP or CLIP model, or open_clip's), NAME=FILE (an open_clip architecture and its weights),
            or hf-hub:ORG/NAME, which alone is fetched; without one the backbone starts at random and meaning cannot
            be kept.
        resume: auto = go on where the folder's run stopped; never = refuse a folder that holds a run.
        seed: of weights, order of data and everything random.
        pixel_encoder: sizes of a convolutional encoder for the pixel vocabulary, in place of a layer of the backbone:
            the dual-encoder baseline of appendix F.4, there with a frozen backbone (recipe dual-encoder).
        phases: what learns for how long, one after the other.
        ema: decay of a moving average of the weights, which is then evaluated and written; 0 = none.
        dtype: of the weights in OUTPUT/model.
    """
    settings = dict(locals())
    settings |= {"data": replace(data, workers=0)}  # a run may go on with more or fewer
    start = load_backbone(encoder, backbone)  # what is wrong with it is said before any work
    steps = sum(phase.steps for phase in phases)
    run = Loop(output, steps, seed, resume, loop, settings, data.batch_size * loop.accumulate)
    seed_step(seed, 2**32, 0)
    tokenizer = build_tokenizer(start, pixel, semantic, decoder, pixel_encoder).to(run.device)
    check_phases(tokenizer, phases)
    teacher = copy.deepcopy(tokenizer.backbone).eval().requires_grad_(False)
    judge = Discriminator(discriminator).to(run.device) if losses.adversarial > 0 else None
    average = AveragedModel(tokenizer, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema > 0 else None
    perceptual = None
    if losses.perceptual > 0:
        perceptual = build_perceptual(teacher, losses.lpips_net, losses.lpips_weights, "--losses.lpips").to(run.device)
    source = open_source(data, tokenizer.image_size)
    run.skip(source.damaged if run.main else ())  # every process opens the same
    share = run.share(data.batch_size)
    batches = StepBatches(source, share, seed, run.accelerator.process_index, run.accelerator.num_processes)
    unseen = DataConfig(evaluation.source, seed=data.seed)
    held_out = open_source(unseen, tokenizer.image_size, "test", "--evaluation.source")

    optimizer = run.accelerator.prepare(optim.build(list(tokenizer.parameters())))
    judge_optimizer = run.accelerator.prepare(optim.build(list(judge.parameters()))) if judge else None
    holders = {"tokenizer": tokenizer, "optimizer": optimizer, "average": average}
    holders |= {"judge": judge, "judge_optimizer": judge_optimizer, "scaler": run.accelerator.scaler}
    state = run.restore()
    for name, holder in holders.items():
        if (
            state is not None and holder is not None and state[name] is not None
        ):  # no scaler where it began without fp16
            holder.load_state_dict(state[name])

    wrapped_judge = run.accelerator.prepare(judge) if judge else None
    phase_ends = [sum(p.steps for p in phases[: i + 1]) for i in range(len(phases))]
    stream = step_batches(batches, run.start * loop.accumulate, steps * loop.accumulate, data.workers)
    model: nn.Module | None = None
    for step in run.run():
        if model is None or step in phase_ends:  # what learns is settled before the model is wrapped
            phase = phases[next(i for i, end in enumerate(phase_ends) if step < end)]
            set_trained(tokenizer, phase.trains)
            learns = any(p.requires_grad for p in tokenizer.parameters())  # codebooks may move by their averages alone
            model = run.accelerator.prepare(tokenizer) if learns else tokenizer
        optim.step(optimizer, step, steps)
        adversarial = judge if judge is not None and step >= discriminator.start else None
        if not tokenizer.decoder.last_layer.requires_grad:
            adversarial = None  # its weight is a ratio of gradients there
        sound = True
        for _ in range(loop.accumulate):
            batch = run.take(stream)
            images = to_float(batch.images.to(run.device))
            with torch.no_grad(), run.accelerator.autocast():
                (features,) = teacher.taps(images, (teacher.semantic_layer,))
                pooled = teacher.pool(features, teacher.semantic_layer)
            if adversarial is not None:
                adversarial.requires_grad_(False)
            with run.accelerator.autocast():
                out = model(images)
                found = generator_losses(
                    out, images, features, pooled, losses, perceptual, adversarial, tokenizer.decoder.last_layer
                )
            parts = mean_parts({"loss": found.total, **found.parts})  # of the joined batch
            sound &= run.check(step, parts)
            if learns:
                run.accelerator.backward(found.total / loop.accumulate)
            if adversarial is not None:
                adversarial.requires_grad_(True)
                with run.accelerator.autocast():
                    judged = discriminator_loss(wrapped_judge, images, out.images)
                parts |= mean_parts({"discriminator": judged})
                sound &= run.check(step, parts)
                run.accelerator.backward(judged / loop.accumulate)
        norm = 0.0
        if learns:
            norm = run.accelerator.clip_grad_norm_(tokenizer.parameters(), optim.clip or 1e9)
            sound &= run.check(step, {"gradient": norm})
            both = [optimizer]
            if adversarial is not None:
                optim.step(judge_optimizer, step, steps)
                both.append(judge_optimizer)
            run.learn(sound, *both)
        values = {**parts, "norm": norm, "lr": optim.rate(step, steps)}
        if average is not None:
            average.update_parameters(tokenizer)
        run.check_codebooks(step, {name: getattr(out, name).perplexity for name in ("pixel", "semantic")})
        run.log(step, values | code_statistics(out))
        if run.saves(step):
            run.save(step + 1, {k: None if v is None else v.state_dict() for k, v in holders.items()})
        if run.due(step, loop.eval_every) and run.main:
            evaluate(run, step, average.module if average is not None else tokenizer, teacher, held_out, evaluation)
            set_trained(tokenizer, phase.trains)
    final = average.module if average is not None else tokenizer
    place = run.write(lambda draft: write_model(final, draft, getattr(torch, dtype)))
    return {"model": str(place), "steps": steps}


def build_tokenizer(
    start: tuple[BackboneConfig, dict[str, Tensor] | None],
    pixel: BranchConfig,
    semantic: BranchConfig,
    decoder: DecoderConfig,
    pixel_encoder: PixelEncoderConfig | None = None,
) -> DualTokenVisionTokenizer:
    """A tokenizer whose backbone has the given shape and, unless None, the given weights.

    Raises UserError where the decoder's image is not of the backbone's size.
    """
    own = None if pixel_encoder is None else asdict(pixel_encoder)
    config = DualTokenVisionConfig(asdict(start[0]), asdict(pixel), asdict(semantic), asdict(decoder), own)
    tokenizer = DualTokenVisionTokenizer(config)
    if tokenizer.decoder.image_size != tokenizer.image_size:
        raise UserError(
            f"decoder gives {tokenizer.decoder.image_size} px, the backbone takes {tokenizer.image_size} px: "
            "change the number of --decoder.multipliers or --decoder.latent_size"
        )
    if start[1] is not None:
        tokenizer.backbone.load_state_dict(start[1])
    return tokenizer


def check_phases(tokenizer: DualTokenVisionTokenizer, phases: list[Phase]) -> None:
    """Raise UserError where a phase names nothing, or a part of a part that the tokenizer does not have."""
    names = [f"{name}." for name, _ in [*tokenizer.named_parameters(), *tokenizer.named_buffers()]]
    for phase in phases:
        begins = zip(phase.trains, trained_names(tokenizer, phase.trains), strict=True)
        unknown = [
            part for part, begin in begins if part not in PARTS and not any(name.startswith(begin) for name in names)
        ]
        if unknown or not phase.trains:
            raise UserError(
                f"--phases: trains {unknown or '[]'}; the parts are {', '.join(PARTS)}, or parts of these such as "
                "pixel.quantizer"
            )


def trained_names(tokenizer: DualTokenVisionTokenizer, trains: tuple[str, ...]) -> tuple[str, ...]:
    """How the names of what learns begin; a vocabulary for both objectives is there as the pixel one alone."""
    begins = tuple(f"{part}." for part in trains)
    return tuple(re.sub(r"^semantic\.", "pixel.", begin) for begin in begins) if tokenizer.joined else begins


def set_trained(tokenizer: DualTokenVisionTokenizer, trains: tuple[str, ...]) -> None:
    """Let the parameters whose names begin with one of `trains` learn; other EMA codebooks stand still."""
    tokenizer.train()
    begins = trained_names(tokenizer, trains)
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(f"{name}.".startswith(begins))
    for name in ("pixel",) if tokenizer.joined else ("pixel", "semantic"):
        if not f"{name}.quantizer.codebook.".startswith(begins):
            getattr(tokenizer, name).eval()


def code_statistics(out: Any) -> dict[str, Tensor]:
    """Share of the codes that a batch used and their perplexity, by vocabulary and depth."""
    return {
        f"{name}_{what}_{depth}": value
        for name in ("pixel", "semantic")
        for what in ("usage", "perplexity")
        for depth, value in enumerate(getattr(getattr(out, name), what), 1)
    }


def fixed_batches(source: Any, images: int, batch_size: int = 64) -> Iterator[Tensor]:
    """The first `images` pictures of a source as uint8 batches [B, 3, S, S]."""
    total = images if source.endless else min(images, len(source))
    picker = StepBatches(source, 1, 0)
    for first in range(0, total, batch_size):
        yield torch.cat([picker[i].images for i in range(first, min(total, first + batch_size))])


@torch.no_grad()
def evaluate(
    run: Loop, step: int, model: DualTokenVisionTokenizer, teacher: Backbone, source: Any, config: EvalConfig
) -> None:
    """Metrics of held-out pictures into the log, and a picture of eight of them above their reconstructions."""
    model.eval()
    result = evaluate_reconstruction(model, fixed_batches(source, config.images), teacher)
    first = next(fixed_batches(source, 8)).to(run.device)
    grid = make_grid(torch.cat([first, to_bytes(reconstruct(model, to_float(first)))]), nrow=len(first), padding=2)
    folder = run.output / "samples"
    with run.sparing("the sample picture"):
        folder.mkdir(exist_ok=True)
        to_picture(grid).save(folder / f"step-{step + 1:08d}.png")
    values = {f"eval_{k}": v for k, v in asdict(result).items() if v is not None}
    run.record({"step": step + 1, **{k: round(v, 5) for k, v in values.items()}})
    with run.sparing("lines of the tracker"):
        run.accelerator.log(values, step=step + 1)
    run.say(f"step {step + 1}: PSNR {result.psnr:.2f} dB, SSIM {result.ssim:.3f}")


def write_model(tokenizer: DualTokenVisionTokenizer, directory: Path, dtype: torch.dtype) -> None:
    """Write tokenizer and image processor as one directory."""
    copy.deepcopy(tokenizer).to(dtype).save_pretrained(directory)
    DualTokenImageProcessor(tokenizer.image_size).save_pretrained(directory)
