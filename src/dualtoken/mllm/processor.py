"""Chats and pictures to what the model takes, and what it says back to text and pictures.

What a person types is tokenised as plain text, whatever it looks like: only the chat template and the pictures give
special tokens.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.images import fit_image, image_bytes, to_float
from dualtoken.data.chat import ChatSample, Message, Picture
from dualtoken.data.collate import IGNORE, ChatTokens
from dualtoken.generation.interleaved import Reply
from dualtoken.mllm import model as _registers_it  # noqa: F401
from dualtoken.mllm.config import SPECIAL, DualTokenConfig
from dualtoken.tokenizer.image_processor import DualTokenImageProcessor

MARK = re.compile("\ue000([0-9]+)\ue001")  # stands for a part of a message while the template is filled in
ROLES = ("system", "user", "assistant")
OPEN_END = "the chat ends with the assistant: end it with the user, so that there is a reply to make"


class DualTokenProcessor(ProcessorMixin):
    """Tokenizer, chat template and pictures of one model.

    Args: positions: N, placeholders for a picture.
    """

    def __init__(
        self,
        image_processor: DualTokenImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        positions: int = 256,
        chat_template: str | None = None,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.positions = positions
        ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
        missing = [SPECIAL[name] for name, i in ids.items() if i is None or i == tokenizer.unk_token_id]
        if missing:
            raise UserError(f"the text tokenizer lacks {', '.join(missing)}: build the model with from_parts")
        for name, number in ids.items():
            setattr(self, name, number)
        self._template_pieces: dict[str, list[int]] = {}
        self._special = set(tokenizer.all_special_ids)

    def __call__(self, text: str | list[str], images: Any = None, return_tensors: str = "pt", **kwargs) -> BatchFeature:
        """Texts in which `<|image_pad|>` stands once for each picture; for chats see apply_chat_template.

        Special tokens written in `text` are special: it is a prompt, not what a person typed.
        Raises UserError where the number of pictures is not that of the placeholders.
        """
        texts, listed = [text] if isinstance(text, str) else list(text), _flat(images)
        for image in listed:
            _refuse_address(image)
        places = [t.count(SPECIAL["image_id"]) for t in texts]
        if sum(places) != len(listed):
            raise UserError(f"the text has places for {sum(places)} pictures, {len(listed)} were given")
        if isinstance(images, (list, tuple)) and all(isinstance(one, (list, tuple)) for one in images):
            given = [len(_flat(one)) for one in images]  # a list for each text
            if given != places:
                raise UserError(f"the texts have places for {places} pictures, {given} were given for them")
        rows = [self._ids(t.replace(SPECIAL["image_id"], SPECIAL["image_id"] * self.positions)) for t in texts]
        ids, mask = self._pad(rows)
        out = {"input_ids": ids, "attention_mask": mask}
        if listed:
            out |= self.image_processor(listed)
        return BatchFeature(out)

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        **kwargs,
    ) -> BatchFeature | Tensor | str | list[str]:
        """Chats to a batch padded on the left; with a generation prompt also without text, for guidance.

        Args: conversation: messages with "role" and "content", a text or a list of {"type": "text", "text": ...} and
            {"type": "image", "image": picture, path, bytes or array}; one chat or a list of them; tokenize: False gives
            the prompts as text; return_dict: False gives the ids alone, [B, T].
        Raises UserError for content of another kind, and for a chat that leaves the model nothing to reply to.
        """
        if not conversation:
            raise UserError("the chat is empty: give at least one message")
        if kwargs.get("continue_final_message"):
            raise UserError(OPEN_END)
        single = isinstance(conversation[0], dict)
        chats = [self._chat(c, add_generation_prompt) for c in ([conversation] if single else conversation)]
        if not tokenize:
            texts = [self._written(chat, add_generation_prompt) for chat in chats]
            return texts[0] if single else texts
        rows = [self.encode(chat, generate=add_generation_prompt, pictures=False) for chat in chats]
        ids, mask = self._pad([row.ids.tolist() for row in rows])
        out = {"input_ids": ids, "attention_mask": mask}
        shown = [picture.image for chat in chats for picture in chat.pictures]
        if shown:
            out["pixel_values"] = to_float(torch.stack(shown))
        if add_generation_prompt:
            plain = [self.encode(chat, hide_text=True, generate=True, pictures=False).ids.tolist() for chat in chats]
            out["unconditional_ids"], out["unconditional_mask"] = self._pad(plain)
        return BatchFeature(out) if return_dict else ids

    def encode(
        self, sample: ChatSample, hide_text: bool = False, generate: bool = False, pictures: bool = True
    ) -> ChatTokens:
        """A chat as ids, labels and codes.

        Args:
            hide_text: leave out what is said, keep pictures and turns (classifier-free guidance).
            generate: end where the assistant is to speak.
            pictures: False leaves out the codes, which the pictures then need not have.
        Raises UserError where a picture has no codes.
        """
        parts = [(message.role, part) for message in sample.messages for part in message.content]
        ids: list[int] = []
        labels: list[int] = []
        speaking = False
        for place, piece in enumerate(MARK.split(self._rendered(sample, generate))):
            if place % 2 == 0:  # of the template
                new = self._template(piece)
                end = self._turn_end(new) if speaking else -1
                learnt = [i <= end for i in range(len(new))]
                speaking = speaking and not new
            else:
                role, part = parts[int(piece)]
                speaking = role == "assistant"
                new = self._part(role, part, hide_text)
                learnt = [speaking and t not in (self.image_id, self.draw_end_id) for t in new]
            ids += new
            labels += [t if yes else IGNORE for t, yes in zip(new, learnt, strict=True)]
        codes = [picture.codes for picture in sample.pictures] if pictures else []
        if any(c is None for c in codes):
            raise UserError(f"sample {sample.name}: a picture has no codes; encode it first")
        known = torch.ones(len(codes), dtype=torch.bool)
        return ChatTokens(torch.tensor(ids), torch.tensor(labels), DualCodes.cat(codes) if codes else None, known)

    @property
    def turn_end(self) -> int | None:
        """The token that closes the assistant's turn; None where the chat template has no special one."""
        turns = Message("user", ("a",)), Message("assistant", ("a",))
        last = self.encode(ChatSample(turns, "chat", "chat")).labels
        last = int(last[last != IGNORE][-1])
        return last if last in self._special else None

    def batch_decode(self, sequences: Tensor | Iterable[Tensor], **kwargs) -> list[str]:
        """Ids to texts."""
        return self.tokenizer.batch_decode(sequences, **kwargs)

    def decode(self, ids: Tensor, **kwargs) -> str:
        """Ids to a text."""
        return self.tokenizer.decode(ids, **kwargs)

    def post_process_multimodal_output(
        self, outputs: Any, generation_mode: str | None = None, skip_special_tokens: bool = True, **kwargs
    ) -> list[str] | list[Image.Image]:
        """Ids to texts, or, for mode "image", images [M, 3, H, W] in [-1, 1] to pictures."""
        if generation_mode == "image":
            return self.image_processor.postprocess(outputs)
        return self.tokenizer.batch_decode(outputs, skip_special_tokens=skip_special_tokens)

    def read(self, reply: Reply, decode_images: Any) -> list[str | Image.Image]:
        """An interleaved reply as texts and pictures; `decode_images` is the model's decode_image_tokens."""
        told: list[str | Image.Image] = []
        for part in reply.parts:
            if isinstance(part, DualCodes):
                told += self.image_processor.postprocess(decode_images(part))
            elif text := self.tokenizer.decode(part, skip_special_tokens=True).strip():
                told.append(text)
        return told

    def _chat(self, conversation: list[dict[str, Any]], open_end: bool) -> ChatSample:
        """Messages as transformers writes them -> our own. Raises UserError for what they must not hold."""
        messages = []
        for entry in conversation:
            role, content = entry.get("role"), entry.get("content") or ""
            if role not in ROLES:
                raise UserError(f"message of role {role!r}: the roles are {', '.join(ROLES)}")
            given = [{"type": "text", "text": content}] if isinstance(content, str) else content
            messages.append(Message(role, tuple(self._given(part) for part in given)))
        if not messages:
            raise UserError("the chat is empty: give at least one message")
        if open_end and messages[-1].role == "assistant":
            raise UserError(OPEN_END)
        return ChatSample(tuple(messages), "chat", "chat")

    def _given(self, part: dict[str, Any]) -> str | Picture:
        if not isinstance(part, dict):
            raise UserError(f"content {part!r}: give a dict of type 'text' or 'image' for every part of a message")
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return part["text"]
        source = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        if part.get("type") == "image" and source is None:
            raise UserError("content of type 'image' without a picture: give one, or a path, as its \"image\"")
        if part.get("type") != "image":
            raise UserError(f"content of type {part.get('type')!r}: give text, or an image with its picture or path")
        _refuse_address(source)
        picture = self.image_processor._open(source)
        return Picture("given", image=image_bytes(fit_image(picture, self.image_processor.size)))

    def _rendered(self, sample: ChatSample, generate: bool) -> str:
        """The chat template filled with a mark for every part."""
        number, messages = 0, []
        for message in sample.messages:
            marks = "".join(f"\ue000{number + i}\ue001" for i in range(len(message.content)))
            number += len(message.content)
            messages.append({"role": message.role, "content": marks})
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=generate
            )
        except TemplateError as error:  # its own, or what a template raises, as for turns that do not alternate
            raise UserError(f"the chat template does not take this chat: {error}") from None

    def _written(self, sample: ChatSample, generate: bool) -> str:
        """The prompt as text, one placeholder for a picture."""
        parts = [(message.role, part) for message in sample.messages for part in message.content]

        def show(mark: re.Match) -> str:
            role, part = parts[int(mark[1])]
            if isinstance(part, str):
                return part
            around = ("draw_start_id", "draw_end_id") if role == "assistant" else ("vision_start_id", "vision_end_id")
            return SPECIAL[around[0]] + SPECIAL["image_id"] + SPECIAL[around[1]]

        return MARK.sub(show, self._rendered(sample, generate))

    def _part(self, role: str, part: str | Picture, hide_text: bool) -> list[int]:
        if isinstance(part, str):
            return [] if hide_text else self.tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
        start, end = (self.draw_start_id, self.draw_end_id) if role == "assistant" else (
            self.vision_start_id, self.vision_end_id)  # fmt: skip
        return [start, *[self.image_id] * self.positions, end]

    def _template(self, piece: str) -> list[int]:
        if piece not in self._template_pieces:
            self._template_pieces[piece] = self._ids(piece)
        return self._template_pieces[piece]

    def _turn_end(self, ids: list[int]) -> int:
        """Place of the first special token, -1 where there is none: what the template closes a turn with.

        It need not be the text tokenizer's own end of text: base models of Qwen have another.
        """
        return next((place for place, token in enumerate(ids) if token in self._special), -1)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    @property
    def fill(self) -> int:
        """What stands where there is no text: the text tokenizer's padding, or its end of text where it has none."""
        found = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if found is None else found

    def _pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the left."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[self.fill] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids, mask


def _refuse_address(image: Any) -> None:
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        raise UserError(f"image {image}: addresses are not fetched; give a picture or a path")


def _flat(images: Any) -> list[Any]:
    """One picture, a list, or a list of lists -> a list."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [one for entry in images for one in _flat(entry)]
    return [images]


# Who has the processor has the model's auto classes too, so that one import is enough for pipelines.
AutoProcessor.register(DualTokenConfig, DualTokenProcessor, exist_ok=True)
