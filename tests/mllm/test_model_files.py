"""A model as one directory, and in pipelines of transformers."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline

from dualtoken.core.errors import UserError
from dualtoken.mllm.config import DualTokenConfig
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.mllm.processor import DualTokenProcessor
from dualtoken.mllm.projector import ProjectorConfig
from dualtoken.tokenizer.decoder import DecoderConfig
from tests import tiny
from tests.mllm.test_model import CHAT, END, RED, START, batch, logits_of, narrow, sample


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model with its processor in one directory, and both."""
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny.mllm(projector=ProjectorConfig("project_first", places=True), input="semantic")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def test_one_directory_brings_the_model_back_exactly(written):
    folder, model, processor = written
    inputs = batch(processor, [sample()])
    wanted, loss = logits_of(model, inputs), model(**inputs).loss
    for kind in (DualTokenForConditionalGeneration, AutoModel, AutoModelForMultimodalLM):
        opened = kind.from_pretrained(folder)
        assert type(opened) is DualTokenForConditionalGeneration and not opened.training
        assert torch.equal(logits_of(opened, inputs), wanted) and torch.equal(opened(**inputs).loss, loss)
        assert opened.generation_config.eos_token_id == opened.llm.generation_config.eos_token_id == 2
        assert not any(p.requires_grad for p in opened.vision_tokenizer.parameters())
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, DualTokenConfig) and config.input == "semantic" and config.text_config.hidden_size == 32
    assert config.draw == model.config.draw and opened.draw_config == model.draw_config
    again = AutoProcessor.from_pretrained(folder)
    assert type(again) is DualTokenProcessor and again.positions == 4 and again.image_processor.size == 16
    ours, theirs = (p.apply_chat_template(CHAT, add_generation_prompt=True) for p in (processor, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_vision_tokenizer_may_stay_elsewhere(tmp_path):
    model, processor = tiny.mllm()
    inputs = batch(processor, [sample()])
    wanted = logits_of(model, inputs)
    for name, place in (("absolute", str(tiny.tokenizer_directory().resolve())), ("relative", "../tokenizer")):
        model.save_pretrained(tmp_path / name, tokenizer_path=place)
        assert not [k for k in load_file(tmp_path / name / "model.safetensors") if "vision" in k]
    with pytest.raises(UserError, match="tokenizer: no such directory"):
        DualTokenForConditionalGeneration.from_pretrained(tmp_path / "relative")
    model.vision_tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name in ("absolute", "relative"):
        opened = AutoModel.from_pretrained(tmp_path / name)
        assert torch.equal(logits_of(opened, inputs), wanted)
    opened.save_pretrained(tmp_path / "whole")  # and it can come back
    assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / "whole"), inputs), wanted)
    tiny.tokenizer(branch=narrow(depth=3)).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="depth 3 there, 16 x depth 2 in the model"):
        DualTokenForConditionalGeneration.from_pretrained(tmp_path / "relative")


def test_a_tokenizer_that_was_trained_anew_is_refused_and_another_decoder_is_not(tmp_path):
    model, processor = tiny.mllm()
    model.vision_tokenizer.save_pretrained(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "model", tokenizer_path="../tokenizer")
    sharper = tiny.tokenizer(decoder=DecoderConfig(channels=16, multipliers=(1, 1, 2, 2), blocks=1, z_channels=16))
    same = {k: v for k, v in model.vision_tokenizer.state_dict().items() if not k.startswith("decoder.")}
    sharper.load_state_dict(same, strict=False)
    sharper.save_pretrained(tmp_path / "tokenizer")
    opened = DualTokenForConditionalGeneration.from_pretrained(tmp_path / "model")
    opened.save_pretrained(tmp_path / "whole")  # with the decoder that it has now
    again = DualTokenForConditionalGeneration.from_pretrained(tmp_path / "whole")
    inputs = batch(processor, [sample()])
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))
    tiny.tokenizer(seed=1).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="is not the one that the model was written beside"):
        DualTokenForConditionalGeneration.from_pretrained(tmp_path / "model")


def test_importing_the_processor_is_enough_for_the_auto_classes(written):
    program = (
        "import dualtoken.mllm.processor; from transformers import AutoConfig, AutoModelForMultimodalLM as A; "
        f"print(type(AutoConfig.from_pretrained({str(written[0])!r})) in A._model_mapping)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip().endswith("True"), done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("pixel_head.classifiers.1.weight"), "missing keys.*pixel_head.classifiers.1.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected keys.*extra"),
        (lambda s: s.update({"pixel_head.norm.weight": torch.ones(9)}), "pixel_head.norm.weight|do not fit"),
    ],
)
def test_loading_is_strict(written, tmp_path, change, words):
    for file in written[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=words):
        DualTokenForConditionalGeneration.from_pretrained(tmp_path)


def test_directories_without_weights_are_one_line(written, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        DualTokenForConditionalGeneration.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text((written[0] / "config.json").read_text())
    with pytest.raises(UserError, match=r"no model\.safetensors in it"):
        DualTokenForConditionalGeneration.from_pretrained(tmp_path)


def test_config_on_disk_holds_no_absolute_path_and_all_ids(written):
    stored = json.loads((written[0] / "config.json").read_text())
    assert stored["tokenizer_path"] is None and str(tiny.tokenizer_directory()) not in json.dumps(stored)
    tokenizer = written[2].tokenizer
    assert stored["image_id"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert stored["draw_start_id"] == tokenizer.convert_tokens_to_ids("<image_gen_start>")


# -- transformers' pipeline --


def test_any_to_any_pipeline_answers_about_a_picture_and_draws(written):
    folder, model, processor = written
    pipe = pipeline("any-to-any", model=str(folder))
    assert type(pipe.model) is DualTokenForConditionalGeneration and type(pipe.processor) is DualTokenProcessor
    inputs = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    new = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    wanted = processor.batch_decode(new, skip_special_tokens=True)[0]
    found = pipe(text=CHAT, max_new_tokens=4, return_full_text=False)
    assert [f["generated_text"] for f in found] == [wanted]
    free = pipe(text=CHAT, return_full_text=False)[0]["generated_text"]  # as long as the context of 128 has room
    assert free.startswith(wanted[:-1])
    whole = pipe(text=CHAT, max_new_tokens=4)[0]["generated_text"]
    assert whole == [*CHAT, {"role": "assistant", "content": wanted}]

    drawn = pipe(text=CHAT, generation_mode="image")[0]["generated_image"]
    codes = model.generate(**inputs, generation_mode="image")
    same = processor.image_processor.postprocess(model.decode_image_tokens(codes))[0]
    assert isinstance(drawn, Image.Image) and drawn.size == (16, 16) and drawn.tobytes() == same.tobytes()

    prompt = f"{START}<|image_pad|>{END}a red"  # and without a chat
    assert isinstance(pipe(text=prompt, images=RED, max_new_tokens=2)[0]["generated_text"], str)
    with pytest.raises(UserError, match="the text has places for 1 pictures, 0 were given"):
        pipe(text=prompt, max_new_tokens=2)
