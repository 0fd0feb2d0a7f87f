"""The multimodal model's config, and the tokens around pictures."""

from dataclasses import asdict
from typing import Literal

from transformers import AutoConfig, PreTrainedConfig

from dualtoken.core.errors import UserError
from dualtoken.generation.sampling import DrawConfig
from dualtoken.mllm.projector import ProjectorConfig
from dualtoken.mllm.visual_head import VisualHeadConfig
from dualtoken.tokenizer.tokenizer import DualTokenVisionConfig

SPECIAL = {  # config field -> token; Qwen's own for looking, the paper's (appendix F.4) for drawing
    "vision_start_id": "<|vision_start|>",
    "image_id": "<|image_pad|>",
    "vision_end_id": "<|vision_end|>",
    "draw_start_id": "<image_gen_start>",
    "draw_end_id": "<image_gen_end>",
}


class DualTokenConfig(PreTrainedConfig):
    """Everything needed to build the model.

    Args:
        vision_config, text_config: of the vision tokenizer and of the LLM.
        positions: N, placeholders of an image.
        input: which features of a picture the LLM sees (Table 4).
        output: which codes it draws; "pixel" has no semantic head's loss and sees none in what it draws (Table 5b).
        text_weight, pixel_weight, semantic_weight: of the parts of the loss.
        depth_weights: of the D terms of eq. 7, for both heads; None = all 1, as in the paper.
        words_first: what is asked about a picture stands before it, so that looking may depend on the question.
        draw: how it draws unless told otherwise, a DrawConfig as a dict.
        tokenizer_path: where the vision tokenizer is, seen from the model's directory; None = inside.
        tokenizer_fingerprint: of the one there when the model was written; None = not known.
    """

    model_type = "dualtoken"
    sub_configs = {"vision_config": DualTokenVisionConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: dict | PreTrainedConfig | None = None,
        text_config: dict | PreTrainedConfig | None = None,
        projector: dict | None = None,
        pixel_head: dict | None = None,
        semantic_head: dict | None = None,
        positions: int = 256,
        input: Literal["both", "pixel", "semantic"] = "both",
        output: Literal["both", "pixel"] = "both",
        text_weight: float = 1.0,
        pixel_weight: float = 1.0,
        semantic_weight: float = 1.0,
        depth_weights: list[float] | None = None,
        words_first: bool = False,
        draw: dict | None = None,
        vision_start_id: int | None = None,
        image_id: int | None = None,
        vision_end_id: int | None = None,
        draw_start_id: int | None = None,
        draw_end_id: int | None = None,
        tokenizer_path: str | None = None,
        tokenizer_fingerprint: str | None = None,
        **kwargs,
    ):
        if isinstance(vision_config, dict):
            vision_config = DualTokenVisionConfig(**vision_config)
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.vision_config = vision_config or DualTokenVisionConfig()
        self.text_config = text_config or AutoConfig.for_model("qwen2")
        self.projector = asdict(ProjectorConfig()) | (projector or {})
        self.pixel_head = pixel_head or asdict(VisualHeadConfig())
        self.semantic_head = semantic_head or asdict(VisualHeadConfig())
        self.positions = positions
        self.input, self.output = input, output
        self.text_weight, self.pixel_weight, self.semantic_weight = text_weight, pixel_weight, semantic_weight
        self.depth_weights, self.words_first = depth_weights, words_first
        self.check()
        self.draw = draw or asdict(DrawConfig())
        self.vision_start_id, self.image_id, self.vision_end_id = vision_start_id, image_id, vision_end_id
        self.draw_start_id, self.draw_end_id = draw_start_id, draw_end_id
        self.tokenizer_path, self.tokenizer_fingerprint = tokenizer_path, tokenizer_fingerprint
        # transformers would set the parts' back ends to None, and an LLM without one masks nothing; {} = as they are.
        super().__init__(**{"attn_implementation": {}, "experts_implementation": {}} | kwargs)

    def check(self) -> None:
        """Raise UserError for switches that do not exist, and depth weights that do not fit the heads."""
        for name, allowed in (("input", ("both", "pixel", "semantic")), ("output", ("both", "pixel"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        depth = max(self.pixel_head["depth"], self.semantic_head["depth"])
        if self.depth_weights is not None and len(self.depth_weights) != depth:
            raise UserError(f"depth_weights {self.depth_weights}: give one for each of the {depth} depths")
