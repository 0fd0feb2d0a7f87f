"""`dualtoken train-encoder`: contrastive training of an image-text encoder from nothing.

Sigmoid loss over all pairs of the batch (Zhai et al., 2023), plus an optional captioning loss: a small decoder that
looks at the positions writes the caption, as in SigLIP 2. On scenes it is what teaches shape and texture: colour and
count alone tell most pairs of a batch apart. The decoder is thrown away at the end.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.nn
from torch import Tensor, nn
from torch.nn import functional as F

from dualtoken.core.distributed import is_distributed, mean_parts, rank
from dualtoken.core.images import to_float
from dualtoken.data.images import DataConfig, StepBatches, open_source, step_batches
from dualtoken.tokenizer.backbone import BackboneConfig, Stem
from dualtoken.tokenizer.encoder import (
    ImageTextConfig,
    ImageTextEncoder,
    TextConfig,
    load_text_tokenizer,
    tokenize,
    train_text_tokenizer,
)
from dualtoken.training.loop import Loop, LoopConfig, seed_step
from dualtoken.training.optim import OptimConfig


class Captioner(nn.Module):
    """Writes a caption while looking at positions [B, N, C]: a causal decoder of two layers, used in training only."""

    def __init__(self, width: int, text: TextConfig):
        super().__init__()
        self.tokens = nn.Embedding(text.vocab_size, width)
        self.places = nn.Parameter(torch.randn(text.length, width) * 0.02)
        layer = nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2, nn.LayerNorm(width))
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, positions: Tensor, ids: Tensor) -> Tensor:
        """Mean cross-entropy of ids [B, T], padding (0) left out; the first token is written from token 1."""
        before = torch.cat([torch.ones_like(ids[:, :1]), ids[:, :-1]], 1)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        x = self.decoder(
            self.tokens(before) + self.places[: ids.shape[1]], positions, tgt_mask=mask, tgt_is_causal=True
        )
        return F.cross_entropy((x @ self.tokens.weight.t()).flatten(0, 1), ids.flatten(), ignore_index=0)


class EncoderTrainer(nn.Module):
    """Encoder and captioner as one module, so that one forward gives all loss parts under any wrapper."""

    def __init__(self, encoder: ImageTextEncoder, text: TextConfig, captioning: bool):
        super().__init__()
        self.encoder = encoder
        self.captioner = Captioner(encoder.backbone.width, text) if captioning else None

    def forward(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W], ids [B, T] -> the parts of the loss."""
        backbone = self.encoder.backbone
        (last,) = backbone.taps(images, (backbone.layers,))
        image = F.normalize(backbone.pool(last, backbone.layers), dim=-1)
        text = self.encoder.embed_text(ids)
        if is_distributed():  # every process scores its images against all captions
            text = torch.cat(torch.distributed.nn.all_gather(text))
        parts = {"sigmoid": sigmoid_loss(self.encoder.logits(image, text), rank() * len(images))}
        if self.captioner is not None:
            positions = backbone.vit.norm(last)[:, backbone.prefix :]
            parts["caption"] = self.captioner(positions, ids[:, : int((ids != 0).sum(1).max())])
        return parts


def sigmoid_loss(logits: Tensor, offset: int = 0) -> Tensor:
    """-log sigmoid of every pair, matches on the diagonal (from column `offset` on), summed over texts."""
    signs = torch.full_like(logits, -1.0)
    signs.diagonal(offset).fill_(1.0)
    return -F.logsigmoid(signs * logits).sum(1).mean()


def train_encoder(
    output: str = "runs/encoder",
    steps: int = 16000,
    resume: Literal["auto", "never"] = "auto",
    seed: int = 0,
    data: DataConfig = DataConfig(),
    backbone: BackboneConfig = BackboneConfig(),
    text: TextConfig = TextConfig(),
    optim: OptimConfig = OptimConfig(lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup=200),
    caption_weight: float = 1.0,
    grow_stem: int = 0,
    loop: LoopConfig = LoopConfig(),
) -> dict[str, Any]:
    """Train an image-text encoder on scenes or on your own pictures with captions.

    Args:
        output: folder of the run; the encoder is written to OUTPUT/model.
        steps: optimiser steps.
        resume: auto = go on where the folder's run stopped; never = refuse a folder that holds a run.
        seed: of weights, order of data and everything random.
        caption_weight: of the captioning loss; 0 = contrastive only.
        grow_stem: steps for which the residual convolutions of a stem stand still: colors first, then shapes.
    """
    settings = dict(locals()) | {"data": replace(data, workers=0)}  # a run may go on with more or fewer
    run = Loop(output, steps, seed, resume, loop, settings, data.batch_size * loop.accumulate)
    seed_step(seed, 2**32, 0)
    config = ImageTextConfig(asdict(backbone), asdict(text))
    trainer = EncoderTrainer(ImageTextEncoder(config), text, caption_weight > 0)
    source = open_source(data, trainer.encoder.backbone.image_size)
    run.skip(source.damaged if run.main else ())  # every process opens the same
    share = run.share(data.batch_size)
    batches = StepBatches(source, share, seed, run.accelerator.process_index, run.accelerator.num_processes)
    state = run.restore()
    if state is None and run.main:
        sample = StepBatches(source, 4096 if source.endless else min(4096, len(source)), seed)[0]
        train_text_tokenizer(sample.captions, text).save_pretrained(run.output / "text")
    run.accelerator.wait_for_everyone()
    tokenizer = load_text_tokenizer(run.output / "text")

    model = run.accelerator.prepare(trainer)
    optimizer = run.accelerator.prepare(optim.build(list(trainer.parameters())))
    if state is not None:
        trainer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if run.accelerator.scaler is not None and state["scaler"] is not None:  # it may have begun without fp16
            run.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.train()
    residual = [p for m in trainer.modules() if isinstance(m, Stem) for p in m.residual_parameters()]
    stream = step_batches(batches, run.start * loop.accumulate, steps * loop.accumulate, data.workers)
    for step in run.run():
        optim.step(optimizer, step, steps)
        sound = True
        for _ in range(loop.accumulate):
            batch = run.take(stream)
            ids = tokenize(tokenizer, batch.captions).to(run.device)
            with run.accelerator.autocast():
                parts = model(to_float(batch.images.to(run.device)), ids)
            loss = parts["sigmoid"] + caption_weight * parts.get("caption", 0.0)
            sound &= run.check(step, mean_parts(parts))  # of all processes, which stop or go on together
            run.accelerator.backward(loss / loop.accumulate)
        for parameter in residual if step < grow_stem else ():
            parameter.grad = None
        norm = run.accelerator.clip_grad_norm_(trainer.parameters(), optim.clip or 1e9)
        sound &= run.check(step, {"gradient": norm})
        run.learn(sound, optimizer)
        run.log(step, {"loss": loss, **parts, "norm": norm, "lr": optim.rate(step, steps)})
        if run.saves(step):
            scaler = run.accelerator.scaler
            states = {"model": trainer.state_dict(), "optimizer": optimizer.state_dict()}
            run.save(step + 1, states | {"scaler": None if scaler is None else scaler.state_dict()})

    def save(draft: Path) -> None:
        trainer.encoder.save_pretrained(draft)
        load_text_tokenizer(run.output / "text").save_pretrained(draft)

    return {"model": str(run.write(save)), "steps": steps}
