"""A model from its parts: a vision tokenizer, and an LLM from disk, from the hub, or small and at random."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dualtoken.core.errors import UserError
from dualtoken.generation.sampling import DrawConfig
from dualtoken.generation.text import MAX_NEW_TOKENS
from dualtoken.mllm.config import SPECIAL, DualTokenConfig
from dualtoken.mllm.model import DualTokenForConditionalGeneration, text_logits
from dualtoken.mllm.processor import DualTokenProcessor
from dualtoken.mllm.projector import ProjectorConfig
from dualtoken.mllm.visual_head import VisualHeadConfig
from dualtoken.tokenizer.image_processor import DualTokenImageProcessor
from dualtoken.tokenizer.presets import open_tokenizer
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class SmallLLMConfig:
    """A Qwen2 of any size at random, with a byte-level text tokenizer of its own."""

    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 768
    context: int = 1024
    vocab_size: int = 640
    initializer_range: float = 0.02


@dataclass
class ModelConfig:
    """What is built around the LLM.

    Args:
        head: sizes of both heads; their codebooks come from the vision tokenizer.
        input, output: ablations of Tables 4 and 5b.
        text_weight, pixel_weight, semantic_weight: of the parts of the loss.
        depth_weights: of the D terms of eq. 7; default: all 1.
        codebook_start: code embeddings and classifiers begin as projections of the codebooks' rows, so that what is
            learnt of a code holds for those like it from the first step (LOG.md); the paper's begin at random.
        words_first: what is asked about a picture stands before it; with chats that have it so.
        draw: how the model draws unless told otherwise.
    """

    head: VisualHeadConfig = field(default_factory=VisualHeadConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    input: str = "both"
    output: str = "both"
    text_weight: float = 1.0
    pixel_weight: float = 1.0
    semantic_weight: float = 1.0
    depth_weights: list[float] | None = None
    codebook_start: bool = False
    words_first: bool = False
    draw: DrawConfig = field(default_factory=DrawConfig)

    def switches(self) -> dict[str, Any]:
        """Fields of the model's config that no weight depends on: they may change from stage to stage."""
        names = ("input", "output", "text_weight", "pixel_weight", "semantic_weight", "depth_weights", "words_first")
        return {name: getattr(self, name) for name in names} | {"draw": asdict(self.draw)}


def from_parts(
    vision_tokenizer: str,
    llm: str | PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase | None = None,
    model: ModelConfig = ModelConfig(),
    dtype: torch.dtype | str = torch.float32,
    **llm_options: Any,
) -> tuple[DualTokenForConditionalGeneration, DualTokenProcessor]:
    """The whole model and its processor; missing special tokens are added and the embeddings resized.

    Args:
        vision_tokenizer: directory or preset.
        llm: directory of any causal LM of transformers, a hub id, or a model (then with `text_tokenizer`).
        dtype: of the new parts and the LLM, or its name.
        llm_options: of AutoModelForCausalLM.from_pretrained (quantization_config, attn_implementation, ...).
    Raises UserError where a part cannot be found, and for an LLM whose logits are not understood.
    """
    vision = open_tokenizer(vision_tokenizer, "vision_tokenizer")
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype):
        raise UserError("dtype: give one of torch's, as float32, bfloat16 or float16")
    if isinstance(llm, str):
        text_tokenizer, llm = _open_llm(llm, dtype, llm_options)
    if text_tokenizer is None:
        raise UserError("from_parts: give the text tokenizer of the LLM")
    if text_tokenizer.chat_template is None:
        text_tokenizer.chat_template = CHATML
    special = text_tokenizer.all_special_tokens  # a token of that name that is not special could be typed by a user
    text_tokenizer.add_special_tokens(
        {"extra_special_tokens": [t for t in SPECIAL.values() if t not in special]}, replace_extra_special_tokens=False
    )
    if len(text_tokenizer) > llm.get_input_embeddings().num_embeddings:
        _grow(llm, len(text_tokenizer))  # Qwen's tables have spare rows, so this is rare
    _check_logits(llm)
    ids = {name: text_tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    config = model_config(vision, llm.config, model, ids)
    built = DualTokenForConditionalGeneration(config, llm, vision.to(llm.device))
    if model.codebook_start:
        for name, head in (("pixel", built.pixel_head), ("semantic", built.semantic_head)):
            head.start_from(shared_rows(vision, name))
    for part in (built.projector, built.pixel_head, built.semantic_head):
        part.to(device=llm.device, dtype=dtype)
    images = DualTokenImageProcessor(size=vision.image_size)
    processor = DualTokenProcessor(images, text_tokenizer, positions=vision.positions)
    built.generation_config = llm.generation_config
    if built.generation_config.max_new_tokens is None:  # or pipelines ask for 256, whether or not there is room
        built.generation_config.max_new_tokens = MAX_NEW_TOKENS
    _end_with(built, processor.turn_end)
    return built, processor


def shared_rows(vision: DualTokenVisionTokenizer, name: str) -> Tensor:
    """The codebook [K, C] of a vocabulary. Raises UserError where its depths share none."""
    quantizer = getattr(vision, name).quantizer
    if not quantizer.shared:
        raise UserError(f"model.codebook_start: the depths of the {name} quantiser share no codebook; leave it out")
    return quantizer.lookup(torch.arange(quantizer.config.codebook_size, device=vision.device)[None, :, None])[0]


def small_llm(
    texts: Iterable[str],
    config: SmallLLMConfig = SmallLLMConfig(),
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """A Qwen2 at random, and a byte-level BPE tokenizer learnt from texts; both follow the global random state."""
    text_tokenizer = train_chat_tokenizer(texts, config.vocab_size, config.context)
    end = text_tokenizer.convert_tokens_to_ids("<|im_end|>")
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(text_tokenizer), hidden_size=config.width, intermediate_size=config.mlp,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context, initializer_range=config.initializer_range, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=end, pad_token_id=text_tokenizer.pad_token_id,
    )), text_tokenizer  # fmt: skip


def train_chat_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in Qwen's form: any text can be written, words of `texts` are few tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*CHAT_TOKENS, *SPECIAL.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[t for t in special if t not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHATML,
        model_max_length=context,
    )


def _open_llm(llm: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """LLM and text tokenizer of a directory, or of a hub id that the user named."""
    if not Path(llm).is_dir() and (llm.count("/") != 1 or llm.startswith((".", "/"))):
        raise UserError(
            f"llm {llm}: no such directory; give a directory of a causal LM of transformers "
            "(published for example as Qwen/Qwen2.5-3B-Instruct on huggingface.co), or such a name to fetch it"
        )
    try:
        text_tokenizer = AutoTokenizer.from_pretrained(llm)
        return text_tokenizer, AutoModelForCausalLM.from_pretrained(llm, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"llm {llm}: cannot be read ({line})") from error


@torch.no_grad()
def _grow(llm: PreTrainedModel, rows: int) -> None:
    """Tables with rows for new tokens: normal, of the old rows' mean and deviation, so that no two begin alike.

    (With adapters these rows stay as they are.)
    """
    known = llm.get_input_embeddings().num_embeddings
    llm.resize_token_embeddings(rows, mean_resizing=False)
    tables = {id(layer.weight): layer.weight for layer in (llm.get_input_embeddings(), llm.get_output_embeddings())}
    for table in tables.values():
        old = table[:known].float()
        table[known:] = (old.mean(0) + old.std(0) * torch.randn(len(table) - known, table.shape[1])).to(table.dtype)


@torch.no_grad()
def _check_logits(llm: PreTrainedModel) -> None:
    """Raise UserError where an LLM's logits are not what `text_logits` makes of its last states."""
    if llm.device.type == "meta":
        return
    learning, attention = llm.training, llm.config._attn_implementation
    llm.eval()  # dropout would make the two differ
    if "flash" in str(attention) and llm.device.type == "cpu":  # its kernels are for GPUs, where the model goes later
        llm.set_attn_implementation("sdpa")
    embeds = llm.get_input_embeddings()(torch.arange(4, device=llm.device)[None])
    own = llm(inputs_embeds=embeds).logits
    ours = text_logits(llm, llm.base_model(inputs_embeds=embeds).last_hidden_state)
    llm.train(learning)
    if llm.config._attn_implementation != attention:
        llm.set_attn_implementation(attention)
    if not torch.allclose(own, ours, rtol=0.05, atol=0.05 * float(own.abs().max())):
        raise UserError(
            f"llm: {llm.config.model_type} does more to its logits than scaling or capping them as Granite, Cohere and "
            "Gemma 2 do; take another"
        )


def _end_with(model: DualTokenForConditionalGeneration, token: int | None) -> None:
    """Let replies end with the token that closes a turn, also where the LLM is a base model and has another end."""
    found = model.generation_config.eos_token_id
    found = model.config.text_config.eos_token_id if found is None else found
    ends = [] if found is None else list(found) if isinstance(found, (list, tuple)) else [found]
    if token is not None and token not in ends:
        model.generation_config.eos_token_id = [*ends, token]


def model_config(
    vision: DualTokenVisionTokenizer, text_config: PreTrainedConfig, model: ModelConfig, ids: dict[str, int]
) -> DualTokenConfig:
    """The model's config; codebook sizes and depths of the heads are those of the vision tokenizer.

    Args: ids: of the special tokens, by the names of `SPECIAL`.
    """
    heads = {}
    for name in ("pixel", "semantic"):
        quantizer = getattr(vision, name).quantizer
        sizes = {"codebook_size": quantizer.config.codebook_size, "depth": quantizer.config.depth}
        heads[f"{name}_head"] = asdict(model.head) | sizes | {"shared_embedding": quantizer.shared}
    return DualTokenConfig(
        vision_config=vision.config,
        text_config=text_config,
        projector=asdict(model.projector),
        **heads,
        positions=vision.positions,
        **model.switches(),
        **ids,
    )
