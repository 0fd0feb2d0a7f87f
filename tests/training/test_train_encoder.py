import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F

from dualtoken.cli import main
from dualtoken.core.images import to_float
from dualtoken.data.images import StepBatches
from dualtoken.data.scenes import Scenes
from dualtoken.tokenizer.encoder import tokenize, train_text_tokenizer
from dualtoken.training import encoder as training
from dualtoken.training.encoder import EncoderTrainer, sigmoid_loss
from tests import tiny

RECIPE = {
    "data": {"batch_size": 4},
    "backbone": {"name": tiny.BACKBONE.name, "overrides": tiny.OVERRIDES, "stem": [8, 16, 16, 32], "pixel_layer": 1},
    "text": {"width": 32, "layers": 1, "heads": 2, "length": 16, "vocab_size": 128},
    "loop": {"save_every": 2, "log_every": 1, "tracker": "none"},
}


def run(folder, *options):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return main(["train-encoder", "--config", str(folder / "recipe.yaml"), "--output", str(folder / "run"), *options])


def test_sigmoid_loss_restated_pair_by_pair():
    logits = torch.randn(3, 5)
    wanted = sum(
        -F.logsigmoid(logits[i, j] if j == i + 2 else -logits[i, j]) for i in range(3) for j in range(5)
    )  # the processes before this one hold captions 0 and 1
    assert torch.allclose(sigmoid_loss(logits, 2), wanted / 3)


def test_contrastive_and_caption_losses_fall_on_a_batch():
    batch = StepBatches(Scenes(16), 8, 0)[0]
    texts = train_text_tokenizer(batch.captions * 4, tiny.TEXT)
    torch.manual_seed(0)
    trainer = EncoderTrainer(tiny.encoder(), tiny.TEXT, True).train()
    optimizer = torch.optim.AdamW(trainer.parameters(), 3e-3)
    history = []
    for _ in range(60):
        parts = trainer(to_float(batch.images), tokenize(texts, batch.captions))
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        history.append({k: float(v.detach()) for k, v in parts.items()})
    assert history[-1]["sigmoid"] < 0.5 * history[0]["sigmoid"] and history[-1]["caption"] < 0.5 * history[0]["caption"]


def test_stopped_and_resumed_equals_a_run_in_one_go(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(one, "--steps", "6") == 0

    class Stop(Exception):
        pass

    def stop_at_four(loss, parts, step=[0]):  # noqa: B006 (counts calls)
        step[0] += 1
        if step[0] > 5:
            raise Stop
        return sigmoid_loss(loss, parts)

    monkeypatch.setattr(training, "sigmoid_loss", stop_at_four)
    with pytest.raises(Stop):
        run(two, "--steps", "6")
    monkeypatch.undo()
    assert not (two / "run/model/model.safetensors").exists()
    assert run(two, "--steps", "6") == 0
    a, b = (load_file(f / "run/model/model.safetensors") for f in (one, two))
    assert all(torch.equal(a[k], b[k]) for k in a) and len(a) > 20
    losses = [json.loads(line)["loss"] for line in (one / "run/log.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and len(set(losses)) == 6


def test_a_growing_stem_stands_still_at_first(tmp_path):
    for steps, grows in ((3, False), (5, True)):
        folder = tmp_path / str(steps)
        assert run(folder, "--steps", str(steps), "--grow_stem", "3") == 0
        state = load_file(folder / "run/model/model.safetensors")
        residual = next(v for k, v in state.items() if k.endswith("convolutions.2.weight"))
        assert bool(residual.any()) == grows


def test_learns_from_a_folder_with_captions(tmp_path, capsys):
    from dualtoken.core.images import to_picture

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(6):
        sample = Scenes(32)[i]
        to_picture(sample.image).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(sample.caption)
    (pictures / "bad.png").write_text("no picture")
    assert run(tmp_path / "a", "--steps", "4", "--data.source", str(pictures)) == 0
    assert "bad.png" in capsys.readouterr().out
