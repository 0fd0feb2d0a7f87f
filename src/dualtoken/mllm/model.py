"""The multimodal LLM: reads both codes joined on the embedding dimension, writes both with two heads (Fig. 4c).

    codes - tokenizer.features - projector --+
    text ---------------- LLM's embedding ---+- LLM - hidden -+- text logits          (eq. 6)
                                                              +- pixel head, D codes    (eq. 7)
                                                              +- semantic head, D codes (eq. 7)

A picture to look at is `<|vision_start|>`, N placeholders, `<|vision_end|>`; a drawn one `<image_gen_start>`, N
placeholders, `<image_gen_end>`. The hidden state of `<image_gen_start>` predicts position 1.

Shapes: B batch, T sequence, M images in order of appearance, N positions, D depth, H width of the LLM.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.linear_loss import classification_loss
from dualtoken.core.pretrained import StrictModel
from dualtoken.generation.context import check_placeholders
from dualtoken.generation.generate import generate as generate_any
from dualtoken.generation.sampling import DrawConfig
from dualtoken.mllm.config import DualTokenConfig
from dualtoken.mllm.projector import Projector, ProjectorConfig
from dualtoken.mllm.visual_head import VisualHead, VisualHeadConfig
from dualtoken.tokenizer.backbone import Backbone, BackboneConfig
from dualtoken.tokenizer.fingerprint import fingerprint
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer, branch_config


@dataclass
class DualTokenOutput(ModelOutput):
    """What a pass gives; losses are None without labels."""

    loss: Tensor | None = None  # weighted sum of the parts
    text: Tensor | None = None  # mean over text labels (eq. 6)
    pixel: Tensor | None = None  # [D] by depth, mean over drawn positions; eq. 7 is their sum
    semantic: Tensor | None = None  # [D], likewise
    logits: Tensor | None = None  # [B, T, vocabulary], without labels only
    past_key_values: Any = None

    def parts(self) -> dict[str, Tensor]:
        """Parts of the loss as numbers: nats a text token, and a code (mean over depths, and at the first)."""
        codes = {name: getattr(self, name) for name in ("pixel", "semantic")}
        return (
            {"text": self.text} | {n: c.mean() for n, c in codes.items()} | {f"{n}_1": c[0] for n, c in codes.items()}
        )


@dataclass
class Counts:
    """What a sum of losses is divided by: labels and drawn positions of a whole step, over all its parts."""

    text: float
    drawn: float
    semantic: float


class DualTokenForConditionalGeneration(StrictModel, GenerationMixin):
    """Frozen vision tokenizer, projector, any causal LLM, two visual heads."""

    config_class = DualTokenConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    _no_split_modules = ("DepthBlock",)
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        config: DualTokenConfig,
        llm: PreTrainedModel | None = None,
        vision_tokenizer: DualTokenVisionTokenizer | None = None,
    ):
        super().__init__(config)
        self.vision_tokenizer, self.feature_width = None, _feature_width(config)
        config.vision_config._attn_implementation = None  # asked for the LLM: timm has its own
        if config.tokenizer_path is None:
            self.attach(vision_tokenizer or DualTokenVisionTokenizer(config.vision_config))
        hidden = config.text_config.hidden_size
        self.projector = build_projector(config, self.feature_width)
        self.llm = llm or AutoModelForCausalLM.from_config(config.text_config)
        self.pixel_head = VisualHead(hidden, VisualHeadConfig(**config.pixel_head))
        self.semantic_head = VisualHead(hidden, VisualHeadConfig(**config.semantic_head))
        self.post_init()

    def attach(self, tokenizer: DualTokenVisionTokenizer) -> None:
        """Use a vision tokenizer; it stays as it is. Raises UserError where its codes do not fit the heads."""
        pairs = [("positions", tokenizer.positions, self.config.positions)]
        pairs.append(("features of width", tokenizer.backbone.width, self.feature_width))
        for name in ("pixel", "semantic"):
            ours, theirs = getattr(self.config, f"{name}_head"), getattr(tokenizer, name).quantizer.config
            sizes = (theirs.codebook_size, theirs.depth), (ours["codebook_size"], ours["depth"])
            pairs.append((f"{name} codebook", *(f"{size} x depth {depth}" for size, depth in sizes)))
            if self.config.projector.get("sums"):
                known = branch_config(getattr(self.config.vision_config, name)).quantizer
                pairs.append((f"{name} codes of width", theirs.code_dim, known.code_dim))
        for what, there, here in pairs:
            if there != here:
                raise UserError(f"the tokenizer does not match the model: {what} {there} there, {here} in the model")
        self.vision_tokenizer = tokenizer.requires_grad_(False).eval()
        self.config.vision_config = tokenizer.config  # another decoder fits too

    def train(self, mode: bool = True) -> "DualTokenForConditionalGeneration":
        """Training mode, but for the vision tokenizer: its codebooks would move."""
        super().train(mode)
        if self.vision_tokenizer is not None:
            self.vision_tokenizer.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    @property
    def draw_config(self) -> DrawConfig:
        """How the model draws unless told otherwise."""
        return DrawConfig.from_dict(self.config.draw)

    @property
    def context(self) -> int:
        """Longest sequence that the LLM takes; without bound where its config names none."""
        return getattr(self.config.text_config, "max_position_embeddings", None) or sys.maxsize

    @torch.no_grad()
    def look(self, pixel_values: Tensor) -> DualCodes:
        """Images [M, 3, H, W] in [-1, 1] -> codes that the LLM reads, [M, N, D] each."""
        codes = self.vision_tokenizer.encode(pixel_values)
        return DualCodes(codes.pixel, codes.semantic[:, -self.config.positions :])

    def embed(
        self,
        input_ids: Tensor,
        codes: DualCodes | None = None,
        draw_semantic: Tensor | None = None,
    ) -> Tensor:
        """Ids [B, T] with placeholders and codes of M images -> embeds [B, T, H].

        Args: draw_semantic: bool [M], False for drawn images whose semantic codes are unknown (default: all known).
        Raises UserError where the placeholders do not fit the images.
        """
        embeds = self.llm.get_input_embeddings()(input_ids)
        places = self.places(input_ids, codes)
        if codes is None or not len(codes):
            return embeds
        positions = self.config.positions
        lookup = DualCodes(codes.pixel, codes.semantic[:, -positions:]).to(input_ids.device)
        with torch.no_grad():
            pixel, semantic = self.features(lookup)
        drawn = self.drawn(input_ids, places)
        see_pixel = drawn | (self.config.input != "semantic")
        known = drawn & (self.config.output == "both")
        if draw_semantic is not None:
            known = known & draw_semantic
        see_semantic = torch.where(drawn, known, torch.full_like(drawn, self.config.input != "pixel"))
        pixel, semantic = pixel * see_pixel[:, None, None], semantic * see_semantic[:, None, None]
        seen = self.projector(pixel.to(embeds.dtype), semantic.to(embeds.dtype))
        flat = embeds.flatten(0, 1).index_copy(0, places.flatten(), seen.flatten(0, 1).to(embeds.dtype))
        return flat.view_as(embeds)

    def features(self, codes: DualCodes) -> tuple[Tensor, Tensor]:
        """What the projector gets of codes [M, N, D]: features [M, N, C], and sums of rows where it wants them."""
        found = self.vision_tokenizer.features(codes)
        if not self.config.projector["sums"]:
            return found
        sums = (getattr(self.vision_tokenizer, n).quantizer.lookup(getattr(codes, n)) for n in ("pixel", "semantic"))
        return tuple(torch.cat(pair, -1) for pair in zip(found, sums, strict=True))

    def places(self, input_ids: Tensor, codes: DualCodes | None) -> Tensor:
        """Where the positions of each image are in the flattened batch, int64 [M, N]."""
        held, positions = input_ids == self.config.image_id, self.config.positions
        images = 0 if codes is None else len(codes)
        check_placeholders(held.sum(-1).tolist(), images, positions)
        return held.flatten().nonzero().view(images, positions)

    def drawn(self, input_ids: Tensor, places: Tensor) -> Tensor:
        """Which images stand behind `<image_gen_start>`, bool [M]."""
        return input_ids.flatten()[places[:, 0] - 1] == self.config.draw_start_id

    def hidden(self, embeds: Tensor, **kwargs) -> Any:
        """The LLM without its last layer: embeds [B, T, H] -> its output, last_hidden_state [B, T, H]."""
        return self.llm.base_model(inputs_embeds=embeds, **kwargs)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """States [..., H] -> logits [..., vocabulary], scaled or capped as the LLM has it."""
        return text_logits(self.llm, hidden)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        codes: DualCodes | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        draw_semantic: Tensor | None = None,
        counts: Counts | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        unconditional_ids: Tensor | None = None,
        unconditional_mask: Tensor | None = None,
    ) -> DualTokenOutput:
        """One pass over ids [B, T] with M images, given as pictures or as codes.

        Args:
            labels: [B, T], the text tokens to be learnt, -100 elsewhere; drawn images are always learnt.
            counts: divisors of the loss where this pass is one of several of a step.
            unconditional_ids, unconditional_mask: not used here; the processor's output may be passed whole.
        """
        if pixel_values is not None:
            codes = self.look(pixel_values.to(self.vision_tokenizer.dtype))
        embeds = self.embed(input_ids, codes, draw_semantic)
        if labels is not None and position_ids is not None and "flash" in str(self.llm.config._attn_implementation):
            # In several rows transformers' flash attention would not keep packed samples apart, in one row it does.
            embeds, position_ids = embeds.flatten(0, 1)[None], position_ids.flatten()[None]
        out = self.hidden(
            embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
        )
        hidden = out.last_hidden_state
        if labels is None:
            logits = self.text_logits(hidden)
            return DualTokenOutput(logits=logits, past_key_values=out.past_key_values)
        return self._losses(hidden, input_ids, labels, codes, draw_semantic, counts)

    def _losses(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        codes: DualCodes | None,
        draw_semantic: Tensor | None,
        counts: Counts | None,
    ) -> DualTokenOutput:
        """Eq. 6 and 7 with text logits only where there are labels."""
        config, flat = self.config, hidden.flatten(0, 1)
        ahead = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        spoken = (ahead >= 0).nonzero()[:, 0]
        text = classification_loss(self.text_logits, flat[spoken], ahead[spoken], config.text_config.vocab_size)
        pixel, semantic = (hidden.new_zeros(head["depth"]) for head in (config.pixel_head, config.semantic_head))
        places = self.places(input_ids, codes)
        positions = known = 0
        if len(places):
            codes = codes.to(input_ids.device)
            which = self.drawn(input_ids, places).nonzero()[:, 0]
            positions = known = len(which) * config.positions
            states = flat[places[which] - 1].flatten(0, 1)  # the state before a position predicts it
            if positions:
                pixel = self.pixel_head.loss(states, codes.pixel[which].flatten(0, 1))
            if positions and config.output == "both":
                target = codes.semantic[which, -config.positions :].flatten(0, 1)
                if draw_semantic is not None:
                    keep = draw_semantic[which].repeat_interleave(config.positions)
                    states, target = states[keep], target[keep]
                known = len(target)
                if known:
                    semantic = self.semantic_head.loss(states, target)
        counts = counts or Counts(len(spoken), positions, known)
        text, pixel = text / max(counts.text, 1), pixel / max(counts.drawn, 1)
        semantic = semantic / max(counts.semantic, 1)
        loss = config.text_weight * text
        for weight, by_depth in ((config.pixel_weight, pixel), (config.semantic_weight, semantic)):
            depths = by_depth.new_tensor(config.depth_weights or [1.0] * len(by_depth))[: len(by_depth)]
            loss = loss + weight * (depths * by_depth).sum()
        return DualTokenOutput(loss=loss, text=text.detach(), pixel=pixel.detach(), semantic=semantic.detach())

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        generation_mode: Literal["text", "image", "interleaved"] = "text",
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        codes: DualCodes | None = None,
        unconditional_ids: Tensor | None = None,
        unconditional_mask: Tensor | None = None,
        draw: DrawConfig | None = None,
        seed: int | list[int] = 0,
        num_images_per_prompt: int = 1,
        max_images: int = 4,
        callback: Callable[[int, int], None] | None = None,
        watch: Callable[[DualCodes], None] | None = None,
        **text_options,
    ):
        """Answer, draw, or both, for prompts [B, T] padded on the left. See `generation.generate` for the options.

        Returns: "text": ids [B, T'] of prompt and reply; "image": DualCodes of B * num_images_per_prompt images;
        "interleaved": a list of `generation.interleaved.Reply`.
        """
        return generate_any(
            self,
            input_ids,
            generation_mode,
            attention_mask=attention_mask,
            codes=self.look(pixel_values.to(self.vision_tokenizer.dtype)) if pixel_values is not None else codes,
            unconditional=(unconditional_ids, unconditional_mask),
            draw_config=draw or self.draw_config,
            seed=seed,
            num_images_per_prompt=num_images_per_prompt,
            max_images=max_images,
            callback=callback,
            watch=watch,
            **text_options,
        )

    @torch.no_grad()
    def decode_image_tokens(self, codes: DualCodes) -> Tensor:
        """Drawn codes -> images [M, 3, H, W] in [-1, 1]."""
        return self.vision_tokenizer.decode(codes.to(self.vision_tokenizer.device))

    def save_pretrained(self, directory: str | Path, tokenizer_path: str | None = None, **kwargs) -> None:
        """Write the whole model; with `tokenizer_path` (seen from the directory) the vision tokenizer stays there."""
        self.config.tokenizer_path, self.config.tokenizer_fingerprint = tokenizer_path, None
        if tokenizer_path is not None and (place := (Path(directory) / tokenizer_path).resolve()).is_dir():
            self.config.tokenizer_fingerprint = fingerprint(DualTokenVisionTokenizer.from_pretrained(place))
        for part in (self.config.vision_config, self.config.text_config):
            part.name_or_path = ""  # where it once was on this machine
        if tokenizer_path is not None:
            state = kwargs.get("state_dict") or self.state_dict()
            kwargs["state_dict"] = {k: v for k, v in state.items() if not k.startswith("vision_tokenizer.")}
        super().save_pretrained(directory, **{"max_shard_size": "100TB"} | kwargs)  # one file, as it is read again

    @classmethod
    def from_pretrained(cls, directory: str | Path, *args, **options):
        """Load strictly from a directory, with its vision tokenizer (see StrictModel)."""
        loaded = super().from_pretrained(directory, *args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.vision_tokenizer is None:
            place = Path(directory) / model.config.tokenizer_path
            tokenizer = DualTokenVisionTokenizer.from_pretrained(place)
            known = model.config.tokenizer_fingerprint
            same = known is None or known == fingerprint(tokenizer)
            model.attach(tokenizer.to(device=model.device, dtype=model.dtype))
            if not same:
                raise UserError(
                    f"{directory}: the vision tokenizer in {place} is not the one that the model was written beside: "
                    "its codes mean something else; put that one back, or train the model anew"
                )
        else:
            model.attach(model.vision_tokenizer)  # loading makes new parameters, which would learn
        model.llm.generation_config = model.generation_config  # what ends a reply may be known there alone
        return loaded


def text_logits(llm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What an LLM makes of its last states: its last layer, then what Granite, Cohere and Gemma 2 do behind it."""
    logits, config = llm.get_output_embeddings()(hidden), llm.config
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


def build_projector(config: DualTokenConfig, feature_width: int) -> Projector:
    """The projector of a config, for features of width C."""
    vision = config.vision_config
    dims = tuple(branch_config(one).quantizer.code_dim for one in (vision.pixel, vision.semantic))
    made = ProjectorConfig(**config.projector)
    return Projector(feature_width, config.text_config.hidden_size, config.positions, made, dims)


def _feature_width(config: DualTokenConfig) -> int:
    """C of the tokenizer, from its shapes alone."""
    with torch.device("meta"):
        return Backbone(BackboneConfig(**config.vision_config.backbone)).width


AutoConfig.register(DualTokenConfig.model_type, DualTokenConfig, exist_ok=True)
AutoModel.register(DualTokenConfig, DualTokenForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(DualTokenConfig, DualTokenForConditionalGeneration, exist_ok=True)
