"""What requests may hold: OpenAI's fields that this server honors, and its own beside them.

A field that is not here is refused by name: what is ignored in silence misleads. Those in `Ignored` change nothing
here and are taken for the sake of clients that always send them.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dualtoken.generation.sampling import DrawConfig

SEEDS = 2**53  # what JSON numbers hold exactly everywhere
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Nothing = Annotated[float, Field(ge=0, le=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(max_length=2**24)]  # with a limit pydantic also refuses half characters, as "\\ud83d"


class Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class Ignored(Strict):
    """Fields that change nothing here."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    service_tier: Any = None

    @model_validator(mode="before")
    @classmethod
    def _unset(cls, given: Any) -> Any:
        """A field that is null is as if it were not there, as OpenAI takes it: some clients send all fields."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class HeadOptions(Strict):
    """Sampling of one head; what is not given is as the model has it."""

    temperature: Temperature | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Share | None = None


class DrawOptions(Strict):
    """How pictures are drawn; fields of this server, not of OpenAI."""

    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    pixel: HeadOptions = HeadOptions()
    semantic: HeadOptions = HeadOptions()
    semantic_codes: bool = True

    def of(self, config: DrawConfig) -> DrawConfig:
        """The model's way of drawing with what was given in its place."""
        heads = (head.model_dump(exclude_none=True) for head in (self.pixel, self.semantic))
        return config.changed(self.guidance, *heads, self.semantic_codes)


def _as_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    if value is None:
        return []
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ImageURL(Strict):
    """A data URL, or an address where the server allows it."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # the model has one size


class FileData(Strict):
    """A file as a data URL; ids of stored files are not known here."""

    file_data: str
    filename: str = ""  # never used


class Part(Strict):
    """A part of a message: text or a picture."""

    type: Literal["text", "image_url", "file"]
    text: Text | None = None
    image_url: Annotated[ImageURL | None, BeforeValidator(_as_url)] = None
    file: FileData | None = None

    @model_validator(mode="after")
    def _holds_its_type(self) -> "Part":
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type!r} needs its field {self.type!r}")
        return self


class DrawnImage(Strict):
    """A picture of an earlier reply of this server, as it came: `offset` is its place in the text, in characters."""

    type: Literal["image_url"] = "image_url"
    image_url: ImageURL
    offset: Annotated[int, Field(ge=0)] = 0
    index: Any = None
    seed: Any = None


class Piece(NamedTuple):
    """A text, or the URL of a picture, and the field of the message that holds it."""

    text: str | None
    url: str | None
    field: str


class ChatMessage(Strict):
    """A turn; the fields below `images` are those of OpenAI's replies that are always empty here."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(max_length=256), BeforeValidator(_as_parts)] = []
    images: list[DrawnImage] | None = None
    name: Any = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    annotations: None = None

    def pieces(self) -> list[Piece]:
        """Texts and pictures in order; pictures of `images` divide the text at their places."""
        found = []
        for number, part in enumerate(self.content):
            if part.type == "text":
                found.append(Piece(part.text, None, f"content[{number}].text"))
            elif part.type == "file":
                found.append(Piece(None, part.file.file_data, f"content[{number}].file.file_data"))
            else:
                found.append(Piece(None, part.image_url.url, f"content[{number}].image_url.url"))
        if not self.images:
            return found
        text, start = "".join(piece.text or "" for piece in found), 0
        found = [piece for piece in found if piece.text is None]
        for number, image in enumerate(self.images):
            found.append(Piece(text[start : image.offset].strip(), None, "content"))
            found.append(Piece(None, image.image_url.url, f"images[{number}].image_url.url"))
            start = max(start, image.offset)
        found.append(Piece(text[start:].strip(), None, "content"))
        return [piece for piece in found if piece.url is not None or piece.text]


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=4), BeforeValidator(_as_list)
]


class StreamOptions(Strict):
    """What a stream tells besides the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Strict):
    """Replies are free text."""

    type: Literal["text"]


class ChatRequest(Ignored, DrawOptions):
    """`/v1/chat/completions`."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    stop: Stops = []
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1)] = ["text"]
    max_images: Annotated[int, Field(ge=1, le=16)] = 4
    frequency_penalty: Nothing | None = None
    presence_penalty: Nothing | None = None
    response_format: TextFormat | None = None

    @property
    def limit(self) -> tuple[int | None, str]:
        """Most tokens of the reply, None where it is not said, and the field that says it."""
        name = "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"
        return getattr(self, name), name


class ImageRequest(Ignored, DrawOptions):
    """`/v1/images/generations`, and the fields of `/v1/images/edits` that are no files."""

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    size: str | None = None
    seed: Seed | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    background: Literal["auto", "opaque"] | None = None
    quality: Any = None  # no effect
    style: Any = None  # no effect
    moderation: Any = None  # no effect
    input_fidelity: Any = None  # no effect
    stream: bool | None = None  # refused where true


class TokenizeRequest(Strict):
    """`/v1/tokenize`: pictures to codes."""

    images: Annotated[list[str], Field(min_length=1, max_length=16)]
    model: str | None = None


class Codes(Strict):
    """Codes of one picture, [N, D] in both vocabularies; semantic ones are not needed to see it."""

    pixel: list[list[int]]
    semantic: list[list[int]] | None = None


class DetokenizeRequest(Strict):
    """`/v1/detokenize`: codes to pictures."""

    codes: Annotated[list[Codes], Field(min_length=1, max_length=16)]
    model: str | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
