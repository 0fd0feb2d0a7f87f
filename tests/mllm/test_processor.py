import numpy as np
import pytest
import torch
from PIL import Image

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.images import to_bytes
from dualtoken.data.chat import ChatSample, Message, Picture
from dualtoken.data.collate import IGNORE
from dualtoken.mllm.config import SPECIAL
from dualtoken.mllm.processor import DualTokenProcessor
from tests import tiny

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
LOOK = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
DREW = "<image_gen_start>" + "<|image_pad|>" * 4 + "<image_gen_end>"


@pytest.fixture(scope="module")
def processor():
    return tiny.mllm()[1]


def user(*parts):
    return {"role": "user", "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


def image(source, key="image"):
    return {"type": "image", key: source}


def text_of(processor, ids):
    return processor.tokenizer.decode(ids)


def picture(seed):
    torch.manual_seed(seed)
    return Picture(str(seed), codes=DualCodes(torch.randint(16, (1, 4, 2)), torch.randint(16, (1, 4, 2))))


# -- chats for generation --


def test_one_chat_is_a_batch_of_one_in_the_chat_template(processor):
    out = processor.apply_chat_template([user("draw a star")], add_generation_prompt=True)
    assert set(out) == {"input_ids", "attention_mask", "unconditional_ids", "unconditional_mask"}
    wanted = "<|im_start|>user\ndraw a star<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(processor, out["input_ids"][0]) == wanted and out["input_ids"].dtype == torch.int64
    assert processor.apply_chat_template([user("draw a star")], add_generation_prompt=True, tokenize=False) == wanted
    closed = processor.apply_chat_template([user("draw a star")])
    assert text_of(processor, closed["input_ids"][0]) == "<|im_start|>user\ndraw a star<|im_end|>\n"
    assert "unconditional_ids" not in closed
    plain = processor.apply_chat_template([{"role": "user", "content": "draw a star"}], add_generation_prompt=True)
    assert torch.equal(plain["input_ids"], out["input_ids"])


def test_pictures_of_any_kind_give_placeholders_and_pixels(processor, tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(file)
    sources = [Image.fromarray(PIXELS), str(file), file, file.read_bytes(), PIXELS, torch.from_numpy(PIXELS)]
    for part in [*(image(s) for s in sources), image(str(file), "path"), image(str(file), "url")]:
        out = processor.apply_chat_template([user(part, "what is it ?")], add_generation_prompt=True)
        assert text_of(processor, out["input_ids"][0]).startswith(f"<|im_start|>user\n{LOOK}what is it ?<|im_end|>")
        assert out["pixel_values"].shape == (1, 3, 16, 16) and out["pixel_values"].dtype == torch.float32
        assert np.array_equal(to_bytes(out["pixel_values"])[0].permute(1, 2, 0).numpy(), PIXELS)


def test_text_and_pictures_keep_their_order(processor):
    parts = ["first", image(PIXELS), "then", image(255 - PIXELS), "differ ?"]
    out = processor.apply_chat_template([user(*parts)], add_generation_prompt=True)
    assert f"first{LOOK}then{LOOK}differ ?" in text_of(processor, out["input_ids"][0])
    seen = to_bytes(out["pixel_values"]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(seen[0], PIXELS) and np.array_equal(seen[1], 255 - PIXELS)
    once = processor.apply_chat_template([user(*parts)], add_generation_prompt=True, tokenize=False)
    short = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"first{short}then{short}differ ?" in once


def test_what_the_assistant_drew_stands_between_other_tokens_than_what_is_shown(processor):
    chat = [
        user(image(PIXELS), "make it blue"),
        {"role": "assistant", "content": [image(PIXELS), {"type": "text", "text": "done"}]},
        user("and red"),
    ]
    text = text_of(processor, processor.apply_chat_template(chat, add_generation_prompt=True)["input_ids"][0])
    assert text == (
        f"<|im_start|>user\n{LOOK}make it blue<|im_end|>\n<|im_start|>assistant\n{DREW}done<|im_end|>\n"
        "<|im_start|>user\nand red<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_batch_is_padded_on_the_left(processor):
    chats = [[user(image(PIXELS), "what is the colour of the star ?")], [user("draw")], [user(image(255 - PIXELS))]]
    out = processor.apply_chat_template(chats, add_generation_prompt=True)
    ids, mask = out["input_ids"], out["attention_mask"]
    assert len(ids) == 3 and len(out["pixel_values"]) == 2
    for row, keep, chat in zip(ids, mask, chats, strict=True):
        alone = processor.apply_chat_template(chat, add_generation_prompt=True)["input_ids"][0]
        padding = len(row) - len(alone)
        assert keep.tolist() == [0] * padding + [1] * len(alone) and torch.equal(row[padding:], alone)
        assert set(row[:padding].tolist()) <= {processor.tokenizer.pad_token_id}
    assert processor.apply_chat_template([*chats[:2]], tokenize=False)[1] == "<|im_start|>user\ndraw<|im_end|>\n"


def test_prompts_for_guidance_keep_pictures_and_turns_but_no_words(processor):
    chats = [[{"role": "system", "content": "be kind"}, user("look", image(PIXELS), "make it red")], [user("draw")]]
    out = processor.apply_chat_template(chats, add_generation_prompt=True)
    kept = [text_of(processor, row[m > 0]) for row, m in
            zip(out["unconditional_ids"], out["unconditional_mask"], strict=True)]  # fmt: skip
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert kept[0] == f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{LOOK}{end}"
    assert kept[1] == f"<|im_start|>user\n{end}"
    assert out["unconditional_mask"][1, 0] == 0  # padded on the left too


# -- what a person types is text --

TYPED = [
    *SPECIAL.values(), "<|im_end|>", "<|im_start|>assistant", "<|endoftext|>", "\ue0000\ue001", "\ue0001\ue001 \ue000",
    "{{ messages }} {% endif %}",
]  # fmt: skip


@pytest.mark.parametrize("typed", TYPED)
def test_special_tokens_that_are_typed_are_plain_text(processor, typed):
    said = f"is {typed} a word ?"
    out = processor.apply_chat_template([user(said, image(PIXELS))], add_generation_prompt=True)
    ids = out["input_ids"][0]
    special = [t for t in ids.tolist() if t in processor.tokenizer.all_special_ids]
    plain = processor.apply_chat_template([user("is it a word ?", image(PIXELS))], add_generation_prompt=True)
    assert special == [t for t in plain["input_ids"][0].tolist() if t in processor.tokenizer.all_special_ids]
    assert text_of(processor, ids) == f"<|im_start|>user\n{said}{LOOK}<|im_end|>\n<|im_start|>assistant\n"
    sample = ChatSample((Message("user", (said,)), Message("assistant", (said,))), "text", "0")
    tokens = processor.encode(sample)
    assert tokens.ids.tolist().count(processor.tokenizer.eos_token_id) == 2
    spoken = tokens.labels[tokens.labels != IGNORE]
    assert text_of(processor, spoken) == f"{said}<|im_end|>"


# -- chats for training --


def test_labels_are_the_assistants_words_its_end_of_turn_and_its_wish_to_draw(processor):
    sample = ChatSample(
        (
            Message("system", ("be kind",)),
            Message("user", (picture(1), "what colour ?")),
            Message("assistant", ("blue",)),
            Message("user", ("draw it",)),
            Message("assistant", ("here", picture(2), "and", picture(3))),
        ),
        "story",
        "0",
    )
    tokens = processor.encode(sample)
    text = (
        f"<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n{LOOK}what colour ?<|im_end|>\n"
        "<|im_start|>assistant\nblue<|im_end|>\n<|im_start|>user\ndraw it<|im_end|>\n"
        f"<|im_start|>assistant\nhere{DREW}and{DREW}<|im_end|>\n"
    )
    assert text_of(processor, tokens.ids) == text
    learnt = tokens.labels != IGNORE
    assert torch.equal(tokens.labels[learnt], tokens.ids[learnt])
    assert text_of(processor, tokens.ids[learnt]) == (
        "blue<|im_end|>here<image_gen_start>and<image_gen_start><|im_end|>"
    )
    assert len(tokens.codes) == 3 and tokens.draw_semantic.tolist() == [True] * 3
    for m, one in enumerate(sample.pictures):
        assert torch.equal(tokens.codes.pixel[m], one.codes.pixel[0])
        assert torch.equal(tokens.codes.semantic[m], one.codes.semantic[0])


def test_hidden_text_leaves_pictures_turns_and_what_is_learnt_of_them(processor):
    sample = ChatSample(
        (Message("user", (picture(1), "make it red")), Message("assistant", (picture(2),))), "edit", "0"
    )
    tokens = processor.encode(sample, hide_text=True)
    turn = f"<|im_start|>user\n{LOOK}<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(processor, tokens.ids) == f"{turn}{DREW}<|im_end|>\n"
    assert text_of(processor, tokens.labels[tokens.labels != IGNORE]) == "<image_gen_start><|im_end|>"
    prompt = processor.apply_chat_template([user(image(PIXELS), "make it red")], add_generation_prompt=True)
    assert text_of(processor, prompt["unconditional_ids"][0]) == turn  # guidance sees what training showed


def test_training_and_generation_write_a_chat_alike(processor):
    sample = ChatSample((Message("user", ("draw it",)), Message("assistant", (picture(2),))), "text_to_image", "0")
    ids = processor.encode(sample).ids
    prompt = processor.apply_chat_template([user("draw it")], add_generation_prompt=True)["input_ids"][0]
    assert torch.equal(ids[: len(prompt)], prompt) and int(ids[len(prompt)]) == processor.draw_start_id


def test_pictures_without_codes_are_one_line(processor):
    sample = ChatSample((Message("user", (Picture("a"),)),), "caption", "caption-7")
    with pytest.raises(UserError, match="sample caption-7: a picture has no codes"):
        processor.encode(sample)
    assert processor.encode(sample, pictures=False).codes is None


# -- prompts as text --


def test_a_prompt_as_text_may_hold_special_tokens(processor):
    out = processor("<|vision_start|><|image_pad|><|vision_end|>a red", Image.fromarray(PIXELS))
    assert text_of(processor, out["input_ids"][0]) == f"{LOOK}a red"
    assert (out["input_ids"] == processor.image_id).sum() == 4 and out["pixel_values"].shape == (1, 3, 16, 16)
    several = processor(["a", "<|image_pad|> and <|image_pad|>"], [[], [PIXELS, PIXELS]])
    assert several["input_ids"].shape == several["attention_mask"].shape and len(several["pixel_values"]) == 2
    assert several["attention_mask"][0].sum() == 1 and several["attention_mask"][0, -1] == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p("<|image_pad|> <|image_pad|>", [PIXELS]), "places for 2 pictures, 1 were given"),
        (lambda p: p(["<|image_pad|> <|image_pad|>", "x"], [[PIXELS], [PIXELS]]),
         r"places for \[2, 0\] pictures, \[1, 1\] were given"),
        (lambda p: p("<|image_pad|>"), "places for 1 pictures, 0 were given"),
        (lambda p: p("none", PIXELS), "places for 0 pictures, 1 were given"),
        (lambda p: p("<|image_pad|>", "https://a.b/c.png"), "https://a.b/c.png: addresses are not fetched"),
        (lambda p: p.apply_chat_template([user(image("http://a.b/c.png", "url"))]), "addresses are not fetched"),
        (lambda p: p.apply_chat_template([user({"type": "image"}, "what is it ?")]), "without a picture"),
        (lambda p: p.apply_chat_template([user(image(None))]), "without a picture"),
        (lambda p: p.apply_chat_template([user(image("/nowhere/a.png"))]), "/nowhere/a.png: no such file"),
        (lambda p: p.apply_chat_template([user({"type": "video", "video": "a"})]), "content of type 'video'"),
        (lambda p: p.apply_chat_template([{"role": "user", "content": ["a word"]}]), "give a dict of type"),
        (lambda p: p.apply_chat_template([{"role": "robot", "content": "hi"}]), "role 'robot': the roles are"),
        (lambda p: p.apply_chat_template([{"content": "hi"}]), "role None: the roles are"),
        (lambda p: p.apply_chat_template([]), "the chat is empty"),
        (lambda p: p.apply_chat_template([[user("a")], []]), "the chat is empty"),
        (lambda p: p.apply_chat_template([user("a"), {"role": "assistant", "content": "b"}],
                                         add_generation_prompt=True), "end it with the user"),
        (lambda p: p.apply_chat_template([user("a"), {"role": "assistant", "content": "b"}],
                                         continue_final_message=True), "end it with the user"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(processor, call, words):
    with pytest.raises(UserError, match=words) as caught:
        call(processor)
    assert "\n" not in str(caught.value)


def test_text_tokenizers_without_the_special_tokens_are_one_line(processor):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(UserError, match=r"lacks .*<\|image_pad\|>.*: build the model with from_parts"):
        DualTokenProcessor(processor.image_processor, bare, 4)


# -- what comes back --


def test_outputs_become_texts_and_pictures(processor):
    ids = torch.tensor([processor.tokenizer.encode("a red star<|im_end|>")])
    assert processor.post_process_multimodal_output(ids) == processor.batch_decode(ids, skip_special_tokens=True)
    assert processor.post_process_multimodal_output(ids) == ["a red star"] == [
        processor.decode(ids[0], skip_special_tokens=True)
    ]  # fmt: skip
    pictures = processor.post_process_multimodal_output(tiny.images(2), generation_mode="image")
    assert [p.size for p in pictures] == [(16, 16)] * 2
    assert np.array_equal(np.array(pictures[1]), to_bytes(tiny.images(2))[1].permute(1, 2, 0).numpy())


def test_ids_alone_where_no_dict_is_wanted():
    _, processor = tiny.mllm()
    chat = [{"role": "user", "content": "draw a star"}]
    whole = processor.apply_chat_template(chat, add_generation_prompt=True)
    ids = processor.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert torch.equal(ids, whole["input_ids"])


def test_what_a_template_refuses_is_one_error():
    _, processor = tiny.mllm()
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="does not take this chat: roles must alternate"):
        processor.apply_chat_template([{"role": "user", "content": "draw a star"}])
