"""`dualtoken train-mllm`: the MLLM in all stages (paper section 4.2, Table 13), one visible loop for all of them."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from dualtoken.core.distributed import all_reduce_sum
from dualtoken.core.errors import UserError
from dualtoken.core.pretrained import check_directory
from dualtoken.data.chat import StoredCodes, by_name
from dualtoken.data.collate import IGNORE, PackedBatch, pack
from dualtoken.data.images import step_batches
from dualtoken.data.mixture import Dropout, MixtureBatches
from dualtoken.data.scene_chat import TASKS, SceneChatConfig, SceneChats
from dualtoken.data.sources import CODES, SourceConfig
from dualtoken.mllm.config import DualTokenConfig
from dualtoken.mllm.model import Counts, DualTokenForConditionalGeneration
from dualtoken.mllm.parts import ModelConfig, SmallLLMConfig, from_parts, small_llm
from dualtoken.mllm.presets import open_mllm
from dualtoken.mllm.processor import DualTokenProcessor
from dualtoken.tokenizer.fingerprint import fingerprint
from dualtoken.tokenizer.presets import open_tokenizer, tokenizer_directory
from dualtoken.training.adapters import add_adapters, in_full
from dualtoken.training.loop import Loop, LoopConfig, seed_step
from dualtoken.training.sharded import gather, load_shards
from dualtoken.training.stages import STAGES, LoraConfig, Stage, StageOptim, part_of, recompute_activations, set_trained
from dualtoken.training.stored_codes import encode_pictures, store_codes
from dualtoken.training.streamed import open_stream, with_codes

QUANTIZED = "quantization_config"  # of --llm_options


@dataclass
class ChatDataConfig:
    """Training chats.

    Args:
        scenes: the pool of scenes.
        sources: datasets in place of the scenes, mixed by the stage's mixture where it names them (by name or path),
            else by their weights. Pictures without codes are encoded as they come.
        window: chats of a source that are shuffled together.
        length: the most tokens of a row; samples are packed into rows.
        round_to: widths of rows are multiples of it, so that compiled kernels meet few shapes.
        dropout: what is hidden at random.
        codes: folder where the pictures' codes are kept; default: OUTPUT/codes. They are made once.
        workers: processes that make batches ahead; 0 = none.
        held_out: chats of each task that are evaluated.
    """

    scenes: SceneChatConfig = field(default_factory=SceneChatConfig)
    sources: list[SourceConfig] = field(default_factory=list)
    window: int = 64
    length: int = 512
    round_to: int = 1
    dropout: Dropout = field(default_factory=Dropout)
    codes: str | None = None
    workers: int = 0
    held_out: int = 16


def train_mllm(
    output: str = "runs/mllm",
    stage: str | None = None,
    stages: str = "all",
    start: str | None = None,
    vision_tokenizer: str = "mini",
    llm: str | None = None,
    llm_options: dict[str, Any] | None = None,
    small: SmallLLMConfig = SmallLLMConfig(),
    resume: Literal["auto", "never"] = "auto",
    seed: int = 0,
    data: ChatDataConfig = ChatDataConfig(),
    model: ModelConfig = ModelConfig(),
    recipe: dict[str, Stage] = STAGES,
    optim: StageOptim = StageOptim(),
    lora: LoraConfig = LoraConfig(),
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    write_tokenizer: bool = True,
    loop: LoopConfig = LoopConfig(),
) -> None:
    """Train the multimodal LLM, stage by stage.

    Args:
        output: folder of the run; every stage has a folder in it, with its model in OUTPUT/stage-N/model.
        stage: one stage alone (1, 2, 3, 4-1, 4-2, or what the recipe names); it starts from the stage before.
        stages: "all", or some, as "1,2"; those that are done are passed over.
        start: directory of a model to start from, in place of the stage before or of new parts.
        vision_tokenizer: directory or preset.
        llm: directory or hub id of a causal LLM; without it a small one of `small` sizes at random.
        llm_options: of its from_pretrained, as {"attn_implementation": "flash_attention_2"} or
            {"quantization_config": {"load_in_4bit": true, "quant_method": "bitsandbytes"}} (with --lora.rank).
        seed: of weights, order of data and everything random.
        recipe: the stages; default: Table 13.
        dtype: of the written model.
        write_tokenizer: put the vision tokenizer into each written model.
    """
    settings = dict(locals())
    settings.pop("stages")  # which stages are asked for changes none of them
    known = list(recipe)
    wanted = [stage] if stage is not None else known if stages == "all" else [s.strip() for s in stages.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        option = "--stages" if stage is None else "--stage"
        raise UserError(f"{option} {', '.join(unknown)}: unknown; the stages are {', '.join(known)}")
    tokenizer_directory(vision_tokenizer, "--vision_tokenizer")  # a missing one is said before any work
    options = llm_options or {}
    if QUANTIZED in options and not lora.rank and any("llm" in recipe[name].trains for name in wanted):
        raise UserError("--llm_options with a quantization_config: weights of few bits do not learn; give --lora.rank")
    for name in wanted:
        folder = Path(output) / f"stage-{name}"
        if (folder / "model/config.json").is_file() and stage is None:
            print(f"stage {name} is done: {folder / 'model'}")
            continue
        before = start if name == wanted[0] and start else _before(output, known, name)
        torch.manual_seed(seed)
        with TemporaryDirectory() as whole:
            built, processor = _open(before, vision_tokenizer, (llm, options), small, data.scenes, model, whole)
            chosen = settings | {"stage": name, "output": str(folder)}
            _train_stage(built, processor, recipe[name], known.index(name), chosen, whole)


def _before(output: str, known: list[str], name: str) -> Path | None:
    """The model of the stage before; None for the first. Raises UserError where it is not there."""
    if name == known[0]:
        return None
    before = Path(output) / f"stage-{known[known.index(name) - 1]}" / "model"
    if not before.is_dir():
        raise UserError(f"--stage {name}: no {before}; train the stage before, or give --start DIR")
    return before


def _open(
    start: str | Path | None,
    vision_tokenizer: str,
    llm: tuple[str | None, dict[str, Any]],
    small: SmallLLMConfig,
    scenes: SceneChatConfig,
    model: ModelConfig,
    whole: str,
) -> tuple[DualTokenForConditionalGeneration, DualTokenProcessor]:
    """The model a stage begins with. whole: an empty folder, for the weights of an LLM that is to be quantised."""
    if start is not None:
        check_directory(start, "--start", DualTokenConfig.model_type)
        built, processor = open_mllm(str(start), "--start")
        for name, value in model.switches().items():
            setattr(built.config, name, value)
        built.config.check()
        _attach(built, vision_tokenizer, start)
    elif llm[0] is not None:
        given = {} if QUANTIZED in llm[1] else llm[1]
        built, processor = from_parts(vision_tokenizer, llm[0], model=model, **given)
    else:
        built, processor = from_parts(vision_tokenizer, *small_llm(scene_texts(scenes), small), model)
    if "attn_implementation" in llm[1]:
        built.llm.set_attn_implementation(llm[1]["attn_implementation"])
    if QUANTIZED in llm[1]:
        ends = built.generation_config
        built.llm.save_pretrained(whole)
        built.llm = AutoModelForCausalLM.from_pretrained(whole, **{"dtype": built.llm.dtype} | llm[1])
        built.generation_config = built.llm.generation_config = ends
    return built, processor


def _attach(model: DualTokenForConditionalGeneration, vision_tokenizer: str, start: str | Path) -> None:
    """Put the tokenizer asked for in place of the model's own. Raises UserError where its codes are not the same."""
    own, asked = model.vision_tokenizer, open_tokenizer(vision_tokenizer, "--vision_tokenizer")
    model.attach(asked)
    for name in ("pixel", "semantic"):
        head = getattr(model.config, f"{name}_head")
        probe = torch.arange(min(head["codebook_size"], 256))[:, None, None].expand(-1, 1, head["depth"])
        # What codes mean, whatever the kind of quantiser: features of positions that stand alone.
        with torch.no_grad():
            ours, theirs = (getattr(t, name).lookup(probe.to(t.device)).cpu().float() for t in (own, asked))
        # Models may be written in 16 bits, so they need not be equal to the last digit.
        if (ours - theirs).abs().mean() > 0.05 * theirs.abs().mean():
            raise UserError(
                f"--vision_tokenizer {vision_tokenizer}: its {name} codebook is not the one that the model in {start} "
                "has learnt; give the tokenizer of that model"
            )


def scene_texts(config: SceneChatConfig, per_task: int = 2000) -> Iterator[str]:
    """What is said in the scenes' chats, for a text tokenizer; "ask" has no words of its own."""
    chats = SceneChats(config)
    for task in (task for task in TASKS if task != "ask"):
        for index in range(per_task):
            for message in chats.sample(task, index).messages:
                yield "\n".join([message.role, *(part for part in message.content if isinstance(part, str)), ""])


def _train_stage(
    model: DualTokenForConditionalGeneration,
    processor: DualTokenProcessor,
    stage: Stage,
    number: int,
    settings: dict[str, Any],
    whole: str,
) -> None:
    """One stage in its own folder, from its newest state if there is one. whole: see `_open`."""
    data, optim, lora, config = (settings[k] for k in ("data", "optim", "lora", "loop"))
    seed, folder = settings["seed"], Path(settings["output"])
    told = settings | {"recipe": stage, "data": replace(data, workers=0)}  # a run may go on with more or fewer
    named = {"samples": stage.batch_size, "title": folder.name, "shards": True, "rate": "rate of --recipe"}
    run = Loop(str(folder), stage.steps, seed, settings["resume"], config, told, **named)
    if run.sharded and optim.kind == "muon":
        raise UserError("--optim.kind muon takes whole matrices: it does not go with FSDP; use adamw")
    split = stage.batch_size / (config.accumulate * run.accelerator.num_processes)
    if split != int(split) or split < 1:
        raise UserError(
            f"stage {settings['stage']}: batch_size {stage.batch_size} cannot be split over {config.accumulate} "
            f"accumulated batches on {run.accelerator.num_processes} processes (--loop.accumulate)"
        )
    model.vision_tokenizer.to(run.device)
    made_of = {
        "encode": processor.encode,
        "batch_size": int(split),
        "length": data.length,
        "fill": processor.fill,
        "seed": seed + number,
        "dropout": data.dropout,
        "rank": run.accelerator.process_index,
        "world_size": run.accelerator.num_processes,
        "round_to": data.round_to,
        "longest": model.context,
    }
    if data.sources:
        reading = {"workers": data.workers, "window": data.window}
        size, formats = model.vision_tokenizer.image_size, {source.format for source in data.sources}
        mark = fingerprint(open_tokenizer(settings["vision_tokenizer"])) if CODES in formats else None
        streamed, held_out = open_stream(data.sources, stage.mixture, size, mark, **made_of, **reading), {}
        looks = formats != {CODES}
    else:
        stored, held_out = _codes(model, processor, data, folder)
        streamed, batches = None, MixtureBatches(SceneChats(data.scenes), stage.mixture, stored=stored, **made_of)
        looks = False
    if not looks:
        model.vision_tokenizer.drop_tower()  # from here on pictures are codes
    seed_step(seed, 2**32 + number, 0)
    adapters = add_adapters(model.llm, lora) if lora.rank and "llm" in stage.trains else None
    model.to(run.device)
    if config.gradient_checkpointing:
        recompute_activations(model, stage)
    trained = set_trained(model, stage, bool(lora.rank))
    groups = [{"params": p, "lr": stage.trains[part], "rate": stage.trains[part]} for part, p in trained.items()]
    optimizer = optim.build(groups, {p: name for name, p in model.named_parameters()})
    _take_part(model)
    wrapped, optimizer = run.prepare(model, optimizer)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = (
        run.restore(lambda place: load_shards(place, _values(learning), optimizer)) if run.sharded else run.restore()
    )
    if state is not None:
        for name, value in _values(learning).items():
            value.copy_(state["model"][name])
        optimizer.load_state_dict(state["optimizer"])
        if run.accelerator.scaler is not None and "scaler" in state:  # it may have begun without fp16
            run.accelerator.scaler.load_state_dict(state["scaler"])
        if streamed and (change := streamed.load_state_dict(state["data"])):
            run.say(change)
    parameters = list(learning.values())
    first, last = run.start * config.accumulate, stage.steps * config.accumulate
    stream = streamed or step_batches(batches, first, last, data.workers)
    for step in run.run():
        wrapped.train()
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * optim.factor(step, stage.steps)
        parts = [with_codes(model.vision_tokenizer, run.take(stream)).to(run.device) for _ in range(config.accumulate)]
        totals = _counts(model, parts)
        sums: dict[str, Tensor] = {}
        for batch in parts:
            # Gradients meet once a step; where they are split they meet each time, or they would be held whole.
            alone = batch is not parts[-1] and not run.sharded
            with run.accelerator.no_sync(wrapped) if alone else contextlib.nullcontext():
                with run.accelerator.autocast():
                    out = wrapped(**batch.inputs, counts=totals)
                run.accelerator.backward(out.loss * run.accelerator.num_processes)  # the mean of sums is taken
            for name, value in (out.parts() | {"loss": out.loss.detach()}).items():
                sums[name] = sums.get(name, 0) + value
        sums = {name: all_reduce_sum(value) for name, value in sums.items()}
        norm = run.accelerator.clip_grad_norm_(parameters, optim.clip or 1e9)
        if isinstance(norm, DTensor):  # where parameters are split over the processes
            norm = norm.full_tensor()
        run.learn(run.check(step, sums | {"gradient": norm}), optimizer)
        useful = sum(b.useful for b in parts) / len(parts)
        read = streamed.counts(run.device) if streamed and run.due(step, config.log_every) else {}
        run.skip(streamed.take_skipped() if streamed else ())
        measures = {"norm": norm, "useful": useful, "lr": optim.factor(step, stage.steps)}
        run.log(step, sums | measures | read)
        if held_out and run.due(step, config.eval_every):
            with run.accelerator.autocast():
                found = evaluate(model, held_out, run.device)
            run.record({"step": step + 1, **{f"eval_{k}": round(v, 4) for k, v in found.items()}})
            run.say(f"step {step + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
        if run.saves(step):
            reached = {"data": streamed.state_dict()} if streamed else {}
            if run.accelerator.scaler is not None:
                reached["scaler"] = run.accelerator.scaler.state_dict()
            run.save(step + 1, {"model": _values(learning), "optimizer": optimizer.state_dict(), **reached})
    if run.sharded:
        gather(model, keep=run.main)
    if QUANTIZED in (settings["llm_options"] or {}):
        model.llm = in_full(model.llm, whole)
    elif adapters is not None and run.main:
        adapters.merge_and_unload()
    place = run.write(lambda draft: _write(model, processor, settings, draft))
    run.say(f"written: {place}")


def _take_part(model: DualTokenForConditionalGeneration) -> None:
    """Let every parameter that learns have a gradient after every pass, 0 where the batch has nothing for it.

    A batch may show no picture, or draw none, and processes wait for each other's gradients. (On one process too, so
    that one process and many learn the same.) The LLM is part of every pass.
    """

    def add(module: nn.Module, _: Any, out: Any) -> None:
        idle = [p for n, p in module.named_parameters() if p.requires_grad and part_of(n) != "llm"]
        if out.loss is not None and idle and torch.is_grad_enabled():
            out.loss = out.loss + 0.0 * sum(p.flatten()[0] for p in idle)

    model.register_forward_hook(add)


def _values(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _codes(
    model: DualTokenForConditionalGeneration, processor: DualTokenProcessor, data: ChatDataConfig, folder: Path
) -> tuple[StoredCodes, dict[str, list[PackedBatch]]]:
    """Codes of the training pictures, and batches of unseen chats by task."""
    train, test = SceneChats(data.scenes), SceneChats(data.scenes, "test")
    place = Path(data.codes) if data.codes else folder.parent / "codes"
    stored = store_codes(model.vision_tokenizer, train.pictures(), place)
    if not data.held_out:
        return stored, {}
    samples = {task: [test.sample(task, i) for i in range(data.held_out)] for task in TASKS}
    pictures = by_name(s for group in samples.values() for s in group)
    unseen = StoredCodes(encode_pictures(model.vision_tokenizer, list(pictures.values())), list(pictures))
    return stored, {
        task: [pack([processor.encode(unseen.fill(s)) for s in group], data.length, processor.fill)]
        for task, group in samples.items()
    }


def _counts(model: DualTokenForConditionalGeneration, parts: list[PackedBatch]) -> Counts:
    """What the losses of a step are divided by, summed over its batches and all processes."""
    text = drawn = semantic = 0
    for batch in parts:
        text += int((batch.labels != IGNORE).sum())
        if batch.codes is not None:
            is_drawn = model.drawn(batch.input_ids, model.places(batch.input_ids, batch.codes))
            drawn += int(is_drawn.sum()) * model.config.positions
            semantic += int((is_drawn & batch.draw_semantic).sum()) * model.config.positions
    summed = all_reduce_sum(torch.tensor([text, drawn, semantic], dtype=torch.float64, device=model.device))
    return Counts(*summed.tolist())


@torch.no_grad()
def evaluate(model: nn.Module, held_out: dict[str, list[PackedBatch]], device: torch.device) -> dict[str, float]:
    """Parts of the loss on unseen chats: nats a text token for tasks that answer, nats a code for those that draw."""
    model.eval()
    found: dict[str, float] = {}
    for task, batches in held_out.items():
        outs = [model(**batch.to(device).inputs) for batch in batches]
        drawing = task in ("text_to_image", "edit", "story")
        for name in outs[0].parts() if drawing else ("text",):
            found[f"{task}_{name}"] = sum(float(o.parts()[name]) for o in outs) / len(outs)
    return {k: v for k, v in found.items() if not math.isnan(v)}


def _write(
    model: DualTokenForConditionalGeneration, processor: DualTokenProcessor, settings: dict[str, Any], directory: Path
) -> None:
    """The model of the stage as a directory."""
    model.attach(open_tokenizer(settings["vision_tokenizer"], "--vision_tokenizer"))
    place = None
    if not settings["write_tokenizer"]:
        place = str(tokenizer_directory(settings["vision_tokenizer"]).resolve())
    model.to("cpu", dtype=getattr(torch, settings["dtype"])).save_pretrained(directory, tokenizer_path=place)
    processor.save_pretrained(directory)
