import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from dualtoken.core.errors import UserError
from dualtoken.data.chat import ChatSample, Message
from dualtoken.data.collate import IGNORE
from dualtoken.mllm import parts
from dualtoken.mllm.config import SPECIAL
from dualtoken.mllm.model import DualTokenForConditionalGeneration
from dualtoken.mllm.parts import CHAT_TOKENS, ModelConfig, SmallLLMConfig, from_parts, small_llm
from dualtoken.mllm.presets import SHAPES, mllm_directory, open_mllm
from dualtoken.mllm.projector import two_layers
from dualtoken.tokenizer.branch import BranchConfig
from dualtoken.tokenizer.quantizer import QuantizerConfig
from tests import tiny

TEMPLATE = (  # as Qwen2.5's: a system turn of its own where none is given
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_llm(folder, rows=None, added=(), tied=False, template=TEMPLATE):
    """A random Qwen2 as it is published: an end of text of its own (a base model), spare rows in its tables.

    Args: rows: of the tables, default what the tokenizer needs; added: tokens that it knows as ordinary ones.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(tiny.WORDS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(CHAT_TOKENS), initial_alphabet=alphabet, show_progress=False,
    ))  # fmt: skip
    text = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        extra_special_tokens=list(CHAT_TOKENS[1:]), chat_template=template,
    )  # fmt: skip
    text.add_tokens(list(added))
    torch.manual_seed(0)
    llm = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=rows or len(text), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0,
    ))  # fmt: skip
    llm.generation_config.eos_token_id = 0
    llm.save_pretrained(folder)
    text.save_pretrained(folder)
    return llm, text


def build(folder, **options):
    return from_parts(str(tiny.tokenizer_directory()), str(folder), model=ModelConfig(tiny.HEAD), **options)


def inputs_of(processor, words="draw a star"):
    chat = [{"role": "user", "content": [
        {"type": "image", "image": tiny.images(1)[0].byte().numpy()}, {"type": "text", "text": words},
    ]}]  # fmt: skip
    return processor.apply_chat_template(chat, add_generation_prompt=True)


def test_an_llm_for_flash_attention_is_looked_at_on_a_cpu_with_another(tmp_path, monkeypatch):
    llm, _ = write_llm(tmp_path / "llm")
    asked = []

    def change(self, name):
        asked.append(name)
        self.config._attn_implementation_internal = name

    llm.config._attn_implementation_internal = "flash_attention_2"
    monkeypatch.setattr(type(llm), "set_attn_implementation", change)
    parts._check_logits(llm)
    assert asked == ["sdpa", "flash_attention_2"]


def test_qwens_own_tokenizer_and_weights_in_several_files(tmp_path):
    """As Qwen2.5 is published: Qwen2Tokenizer, whose vision tokens are special already, a table with spare rows, and
    weights in several files with an index. Only the two tokens around drawn pictures are new."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        tiny.WORDS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    learnt = json.loads(bpe.to_str())["model"]
    text = Qwen2Tokenizer(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]])
    own = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    text.add_special_tokens({"extra_special_tokens": own})
    text.save_pretrained(tmp_path)
    torch.manual_seed(0)
    llm = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(text) + 40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    ))  # fmt: skip
    llm.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and (tmp_path / "model.safetensors.index.json").is_file()
    model, processor = build(tmp_path)
    assert type(processor.tokenizer) is Qwen2Tokenizer
    assert [processor.tokenizer.convert_tokens_to_ids(token) for token in own] == text.convert_tokens_to_ids(own)
    new = [getattr(model.config, name) for name in ("draw_start_id", "draw_end_id")]
    assert new == [len(text), len(text) + 1]
    assert model.llm.get_input_embeddings().num_embeddings == len(text) + 40  # there was room
    assert torch.equal(model.llm.get_input_embeddings().weight, llm.get_input_embeddings().weight)
    assert model(**inputs_of(processor)).logits.isfinite().all()


def test_a_dtype_may_be_given_by_name(tmp_path):
    write_llm(tmp_path / "llm")
    model, _ = build(tmp_path / "llm", dtype="bfloat16")
    assert {model.llm.dtype, model.projector.norm_pixel.weight.dtype} == {torch.bfloat16}
    with pytest.raises(UserError, match="dtype: give one of torch's"):
        build(tmp_path / "llm", dtype="float31")


@pytest.mark.parametrize("tied", [False, True])
def test_a_published_llm_becomes_a_model(tmp_path, tied):
    llm, text = write_llm(tmp_path / "llm", tied=tied)
    model, processor = build(tmp_path / "llm")
    ids = [processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL.values()]
    assert ids == list(range(len(text), len(text) + 5))
    assert [getattr(model.config, name) for name in SPECIAL] == ids == [getattr(processor, name) for name in SPECIAL]
    assert model.llm.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == len(text) + 5
    with torch.no_grad():
        inputs = inputs_of(processor)
        logits = model(**inputs).logits
        assert logits.shape[-1] == len(text) + 5 and logits.isfinite().all()
        kept = model.llm(torch.arange(20)[None]).logits[..., : len(text)]
        assert torch.allclose(kept, llm.eval()(torch.arange(20)[None]).logits, atol=1e-5)
        assert processor.tokenizer.decode(inputs["input_ids"][0]).startswith("<|im_start|>system\nYou are helpful.")

        model.save_pretrained(tmp_path / "whole")
        processor.save_pretrained(tmp_path / "whole")
        opened, again = open_mllm(str(tmp_path / "whole"))
        assert torch.equal(opened(**inputs_of(again)).logits, model.eval()(**inputs).logits)
    assert (opened.llm.lm_head.weight is opened.llm.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("rows", [303, 304, 305, 320])
def test_tables_grow_only_where_they_must(tmp_path, rows):
    _, text = write_llm(tmp_path, rows=rows)
    needed = len(text) + 5
    model, _ = build(tmp_path)
    assert len(text) == 300 and model.llm.get_input_embeddings().num_embeddings == max(rows, needed)


@pytest.mark.parametrize("name", ["<|image_pad|>", "<image_gen_start>"])
def test_tokens_that_the_llm_knows_keep_their_ids_and_cannot_be_typed(tmp_path, name):
    write_llm(tmp_path, added=[name])
    model, processor = build(tmp_path)
    assert processor.tokenizer.convert_tokens_to_ids(name) == 300 and len(processor.tokenizer) == 305
    ids = inputs_of(processor, f"is {name} a word ?")["input_ids"]
    assert (ids == model.config.image_id).sum() == 4 and (ids == model.config.draw_start_id).sum() == 0


def test_a_base_models_reply_learns_and_ends_with_the_end_of_a_turn(tmp_path):
    _, text = write_llm(tmp_path / "llm")
    model, processor = build(tmp_path / "llm")
    end = text.convert_tokens_to_ids("<|im_end|>")
    assert processor.turn_end == end != text.eos_token_id
    tokens = processor.encode(ChatSample((Message("user", ("hi",)), Message("assistant", ("a star",))), "text", "0"))
    assert processor.tokenizer.decode(tokens.labels[tokens.labels != IGNORE]) == "a star<|im_end|>"
    model.save_pretrained(tmp_path / "whole")
    opened = DualTokenForConditionalGeneration.from_pretrained(tmp_path / "whole")
    inputs = inputs_of(processor)
    for one in (model.eval(), opened):
        assert one.generation_config.eos_token_id == one.llm.generation_config.eos_token_id == [0, end]
        hook = one.llm.lm_head.register_forward_hook(lambda m, i, out: out.index_fill(-1, torch.tensor([end]), 99.0))
        out = one.generate(**inputs, max_new_tokens=5)
        hook.remove()
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == [end]


def test_a_tokenizer_without_a_chat_template_gets_one(tmp_path):
    write_llm(tmp_path, template=None)
    _, processor = build(tmp_path)
    said = processor.tokenizer.decode(inputs_of(processor, "hi")["input_ids"][0])
    assert said.startswith("<|im_start|>user\n<|vision_start|>") and said.endswith(
        "hi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_options_of_the_llm_reach_it(tmp_path, monkeypatch):
    write_llm(tmp_path)
    model, processor = build(tmp_path, attn_implementation="eager")
    assert model.llm.config._attn_implementation == "eager"
    plain, _ = build(tmp_path)
    assert plain.llm.config._attn_implementation == "sdpa"
    given = {}
    original = AutoModelForCausalLM.from_pretrained

    def from_pretrained(directory, **options):
        given.update(options, directory=directory)
        return original(directory, dtype=options["dtype"])

    monkeypatch.setattr(parts.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    quantization = object()
    model, _ = build(tmp_path, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu")
    assert given == {
        "directory": str(tmp_path), "dtype": torch.bfloat16, "quantization_config": quantization, "device_map": "cpu",
    }  # fmt: skip
    dtypes = {name: next(getattr(model, name).parameters()).dtype for name in ("llm", "projector", "pixel_head")}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert next(model.vision_tokenizer.parameters()).dtype == torch.float32  # its codes must not move
    with torch.no_grad():
        inputs = inputs_of(processor)
        out = model(**inputs, labels=inputs["input_ids"])
        assert out.loss.isfinite()


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (GraniteConfig, {"logits_scaling": 8.0, "attention_dropout": 0.5}),
        (CohereConfig, {"logit_scale": 0.0625}),
        (Gemma2Config, {"final_logit_softcapping": 0.5, "head_dim": 16}),
        (LlamaConfig, {}),
    ],
)
def test_llms_of_other_kinds_have_their_own_logits(config, options, tmp_path):
    _, text = write_llm(tmp_path)
    sizes = {
        "vocab_size": len(text) + 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 1.0, "pad_token_id": 0,
    }  # fmt: skip
    llm = AutoModelForCausalLM.from_config(config(**sizes, **options)).train()
    model, processor = from_parts(str(tiny.tokenizer_directory()), llm, text, ModelConfig(tiny.HEAD))
    assert llm.training
    model.eval()
    ids = processor.tokenizer("a red star", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = llm(ids).logits
        assert torch.allclose(model(ids).logits, wanted, atol=1e-4)
        loss = torch.nn.functional.cross_entropy(wanted[0, :-1], ids[0, 1:])
        assert float(model(ids, labels=ids).text) == pytest.approx(float(loss), abs=1e-4)


def test_an_llm_with_unknown_logits_is_refused(tmp_path, monkeypatch):
    llm, text = write_llm(tmp_path)
    forward = type(llm).forward

    def squared(self, *args, **told):
        out = forward(self, *args, **told)
        out.logits = out.logits.square()
        return out

    monkeypatch.setattr(type(llm), "forward", squared)
    with pytest.raises(UserError, match="qwen2 does more to its logits"):
        from_parts(str(tiny.tokenizer_directory()), llm, text, ModelConfig(tiny.HEAD))


def test_a_text_tokenizer_without_padding_fills_with_its_end(tmp_path):
    _, text = write_llm(tmp_path)
    text.pad_token = None
    text.save_pretrained(tmp_path)
    _, processor = build(tmp_path)
    assert processor.tokenizer.pad_token_id is None and processor.fill == processor.tokenizer.eos_token_id


def test_rows_for_new_tokens_differ(tmp_path):
    write_llm(tmp_path, tied=False)
    model, _ = build(tmp_path)
    for table in (model.llm.get_input_embeddings().weight, model.llm.get_output_embeddings().weight):
        new = table[-4:].detach()
        assert torch.pdist(new).min() > 0.5 * torch.pdist(table[:200].detach()).mean()


def test_parts_that_are_not_there_are_one_line(tmp_path):
    for llm in (str(tmp_path / "nowhere"), "nowhere", "./no/where"):
        with pytest.raises(UserError, match=r"llm .*no such directory; .*Qwen/Qwen2\.5-3B-Instruct on huggingface\.co"):
            build(llm)
    with pytest.raises(UserError, match=r"llm .*cannot be read") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"vision_tokenizer .*no such directory, and no preset"):
        from_parts(str(tmp_path / "nowhere"), str(tmp_path))
    llm, _ = small_llm(tiny.WORDS, tiny.LLM)
    with pytest.raises(UserError, match="give the text tokenizer of the LLM"):
        from_parts(str(tiny.tokenizer_directory()), llm)


def test_directories_that_hold_no_model_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--model .*no such directory, and no preset"):
        mllm_directory(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"--start .*no config\.json"):
        mllm_directory(str(tmp_path), "--start")
    with pytest.raises(UserError, match="'dualtoken-tokenizer' model, 'dualtoken' is needed"):
        mllm_directory(str(tiny.tokenizer_directory()))


def test_config_of_the_model_follows_its_parts():
    model, processor = tiny.mllm(output="pixel", pixel_weight=2.0)
    config = model.config
    assert (config.pixel_head["codebook_size"], config.pixel_head["depth"], config.pixel_head["width"]) == (16, 2, 16)
    assert config.semantic_head == config.pixel_head and config.positions == processor.positions == 4
    assert config.output == "pixel" and config.pixel_weight == 2.0 and model.context == 128
    assert json.loads(config.to_json_string())["draw"]["pixel"]["top_k"] == 900


def test_heads_may_begin_with_what_the_codebooks_know():
    """Codes that are alike have embeddings and classifiers that are alike; their size stays what it was."""
    random, _ = tiny.mllm()
    begun, _ = tiny.mllm(codebook_start=True)
    for name in ("pixel", "semantic"):
        rows = getattr(begun.vision_tokenizer, name).quantizer.codebook.weight
        before, after = (getattr(model, f"{name}_head") for model in (random, begun))
        tables = [(h.embedding.weight, *(c.weight for c in h.classifiers)) for h in (before, after)]
        assert len(tables[0]) == 1 + before.config.depth
        for old, new in zip(*tables, strict=True):
            assert not torch.equal(old, new)
            assert new.std().item() == pytest.approx(old.std().item(), rel=1e-3)
            solution = torch.linalg.lstsq(rows, new).solution  # a linear image of the rows
            assert torch.allclose(rows @ solution, new, atol=1e-5)
        assert not torch.equal(tables[1][1], tables[1][2])  # each depth in a projection of its own


def test_a_codebook_start_needs_one_that_the_depths_share(tmp_path):
    branch = BranchConfig(QuantizerConfig(kind="mcq", codebook_size=16, code_dim=8, depth=2))
    tiny.tokenizer(branch=branch).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="depths of the pixel quantiser share no codebook"):
        from_parts(str(tmp_path), *small_llm(tiny.WORDS, tiny.LLM), ModelConfig(codebook_start=True))


def test_small_llms_text_tokenizer_writes_any_text():
    torch.manual_seed(0)
    llm, text = small_llm(tiny.WORDS, SmallLLMConfig(32, 1, 2, 1, 48, 64, 320))
    words = "a red star, ZWÖLF Boxkämpfer \n\t 你好 🦊"
    assert text.decode(text.encode(words)) == words
    assert len(text.encode("a red circle and a blue star")) < 10
    assert llm.config.vocab_size == len(text) <= 320 and text.model_max_length == 64
    torch.manual_seed(0)
    again, _ = small_llm(tiny.WORDS, SmallLLMConfig(32, 1, 2, 1, 48, 64, 320))
    assert all(torch.equal(a, b) for a, b in zip(llm.state_dict().values(), again.state_dict().values(), strict=True))


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("name", "llm", "hidden"), [("paper-3b", 3.09e9, 2048), ("paper-7b", 7.62e9, 3584)])
def test_models_of_the_papers_size_have_its_parameter_counts(name, llm, hidden):
    model = SHAPES[name].build()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert size(model.llm) == pytest.approx(llm, rel=2e-3)
    first = model.projector.joint[0]
    assert (first.in_features, first.out_features) == (2048, hidden)
    grown = size(model.projector) - size(two_layers(1024, hidden, hidden))  # against one vocabulary of width 1024
    assert grown == pytest.approx(2.1e6 * hidden / 2048, rel=2e-3)  # appendix D
    for head in (model.pixel_head, model.semantic_head):
        assert size(head.blocks) + size(head.classifiers) == pytest.approx(258e6, rel=0.01)
        assert size(head.embedding) == pytest.approx(16.8e6, rel=2e-3)
    assert model.config.positions == 256
