import numpy as np
import pytest
import torch
from PIL import Image

from dualtoken.core.errors import UserError
from dualtoken.generation.sampling import DrawConfig
from dualtoken.mllm.assistant import Assistant, user
from tests import tiny

RED, BLUE = (Image.new("RGB", (20, 16), color) for color in ("red", "blue"))


@pytest.fixture(scope="module")
def assistant():
    return Assistant(*tiny.mllm())


def same(one, other):
    return np.array_equal(np.array(one), np.array(other))


def alike(one, other):
    """Equal codes: decoding in another batch may round a value differently."""
    return np.abs(np.array(one, np.int16) - np.array(other, np.int16)).max() <= 1


def test_turns_of_the_users_hold_words_and_pictures():
    assert user(RED, "what is it ?") == {"role": "user", "content": [
        {"type": "image", "image": RED}, {"type": "text", "text": "what is it ?"},
    ]}  # fmt: skip


def test_ask_answers_every_chat_as_if_alone(assistant):
    chats = [[user(RED, "what is the colour of the star ?")], [user("hi")]]
    answers = assistant.ask(chats, max_new_tokens=6)
    assert len(answers) == 2 and all(isinstance(a, str) for a in answers)
    assert answers == [assistant.ask([chat], max_new_tokens=6)[0] for chat in chats]
    longer = [*chats[0], {"role": "assistant", "content": answers[0]}, user("and the circle ?")]
    assert isinstance(assistant.ask([longer], max_new_tokens=6)[0], str)


def test_ask_leaves_out_the_prompt_and_special_tokens(assistant):
    tokenizer = assistant.processor.tokenizer
    say = script(assistant.model, [*tokenizer.encode(" a red star "), tokenizer.eos_token_id])
    assert assistant.ask([[user("what is it ?")]], max_new_tokens=20) == ["a red star"]
    say.remove()


def test_draw_gives_count_pictures_of_each_prompt(assistant):
    prompts = ["a red circle", "draw a picture of a blue star"]
    drawn = assistant.draw(prompts, count=2, seed=5)
    assert [len(group) for group in drawn] == [2, 2]
    assert all(isinstance(p, Image.Image) and p.size == (16, 16) for group in drawn for p in group)
    assert not same(drawn[0][0], drawn[0][1]) and not same(drawn[0][0], drawn[1][0])
    again = assistant.draw([prompts[1]], count=1, seed=6)  # picture j comes from seed + j, alone or in a batch
    assert alike(again[0][0], drawn[1][1]) and not alike(again[0][0], drawn[1][0])
    assert alike(assistant.draw(prompts, seed=[9, 6])[1][0], again[0][0])
    steps = []
    assistant.draw(prompts, config=DrawConfig(guidance=1.0), progress=lambda done, all_: steps.append((done, all_)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_edit_depends_on_picture_and_instruction(assistant, tmp_path):
    BLUE.save(tmp_path / "blue.png")
    edited = assistant.edit([RED, str(tmp_path / "blue.png")], ["a star", "a star"], count=2)
    assert [len(group) for group in edited] == [2, 2] and edited[0][0].size == (16, 16)
    assert not same(edited[0][0], edited[1][0])
    assert alike(assistant.edit([np.array(RED)], ["a star"])[0][0], edited[0][0])
    with pytest.raises(UserError, match="2 pictures and 1 instructions"):
        assistant.edit([RED, BLUE], ["a star"])


def script(model, ids):
    """Let the LLM say these ids, whatever it thinks."""
    left = list(ids)

    def say(module, inputs, logits):
        return torch.full_like(logits, -99.0).index_fill(-1, torch.tensor([left.pop(0)]), 99.0)

    return model.llm.get_output_embeddings().register_forward_hook(say)


def test_tell_mixes_words_and_pictures(assistant):
    tokenizer, config = assistant.processor.tokenizer, assistant.model.config
    said = [*tokenizer.encode("a star"), config.draw_start_id, *tokenizer.encode("red"), tokenizer.eos_token_id]
    say = script(assistant.model, said)
    replies = assistant.tell([[user("tell a story")]], seed=1, max_new_tokens=20)
    say.remove()
    assert [type(part) for part in replies[0]] == [str, Image.Image, str]
    assert replies[0][0] == "a star" and replies[0][2] == "red" and replies[0][1].size == (16, 16)

    say = script(assistant.model, [config.draw_start_id] * 9)
    replies = assistant.tell([[user(RED, "tell a story")]], max_images=2, max_new_tokens=20)
    say.remove()
    assert [type(part) for part in replies[0]] == [Image.Image] * 2


def test_nothing_to_do_is_one_line(assistant):
    for call in (lambda: assistant.ask([]), lambda: assistant.draw([]), lambda: assistant.tell([])):
        with pytest.raises(UserError, match="give at least one prompt"):
            call()


def test_open_reads_a_directory(tmp_path):
    model, processor = tiny.mllm()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    opened = Assistant.open(str(tmp_path), device="cpu")
    assert same(opened.draw(["a star"])[0][0], Assistant(model.train(), processor).draw(["a star"])[0][0])
    with pytest.raises(UserError, match=r"--brain .*no such directory"):
        Assistant.open(str(tmp_path / "nowhere"), "--brain")


@pytest.mark.parametrize("words_first", [False, True])
def test_words_about_a_picture_stand_where_the_model_has_learnt_them(words_first):
    assistant = Assistant(*tiny.mllm(words_first=words_first))
    told = assistant.about([1, 2], "what is it ?")["content"]
    kinds = [part["type"] for part in told]
    assert kinds == (["text", "image", "image"] if words_first else ["image", "image", "text"])
