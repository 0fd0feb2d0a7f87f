"""The tabs Look and Story: talking about pictures, and words and pictures in turn."""

from contextlib import closing
from typing import Any

import gradio as gr

from dualtoken.app import studio
from dualtoken.app.token_view import enlarged
from dualtoken.app.web_parts import (
    MODEL,
    QUIET,
    errors_in_page,
    picture_input,
    sampling_controls,
    sampling_of,
    shown_picture,
    stop_button,
    stop_of,
)
from dualtoken.core.errors import UserError
from dualtoken.core.images import read_image
from dualtoken.mllm.assistant import Assistant, user

QUESTIONS = ("describe the picture in detail", "what color is the star ?", "how many objects are there ?")
STORIES = ("tell a story in two pictures about a red star", "tell a story in three pictures about a blue circle")
CHATBOT = {"height": 440, "buttons": ["copy"], "render_markdown": False, "feedback_options": None}


def look_tab(assistant: Assistant) -> None:
    """A conversation about pictures; each message may bring another one."""
    with gr.Row():
        picture = picture_input("picture of the next message")
        with gr.Column(scale=2):
            talk = gr.Chatbot(label="conversation", **CHATBOT)
            question = gr.Textbox(QUESTIONS[0], label="message", max_length=4000)
            gr.Examples([[text] for text in QUESTIONS], question, label="questions")
            with gr.Row():
                button = gr.Button("Ask", variant="primary")
                place = gr.Row()
                again = gr.Button("New conversation", min_width=80)
    said = gr.State([])  # the messages as the model takes them, with paths of pictures
    words_first = assistant.model.config.words_first
    last = gr.State()  # the picture of the message before: it is not shown twice

    def ask(text: str, picture: str | None, said: list, last: str | None, request: gr.Request) -> Any:
        with errors_in_page():
            chat = [*said, message(text, picture if picture != last else None, words_first)]
            growing = ""
            with closing(studio.answer(assistant, chat, stop=stop_of(request, "look"))) as answers:
                for growing in answers:
                    yield for_chatbot([*chat, {"role": "assistant", "content": growing}]), said, last, text
            chat.append({"role": "assistant", "content": growing})
            yield for_chatbot(chat), chat, picture, ""

    event = gr.on([button.click, question.submit], ask, [question, picture, said, last], [talk, said, last, question],
                  **MODEL, **QUIET)  # fmt: skip
    with place:
        stop_button("look", event)
    again.click(lambda: ([], [], None), None, [talk, said, last], queue=False, **QUIET)


def story_tab(assistant: Assistant) -> None:
    """A prompt, and a picture to begin from if wanted, to words and pictures in turn."""
    with gr.Row():
        picture = picture_input("picture to begin from, if wanted")
        with gr.Column(scale=2):
            prompt = gr.Textbox(STORIES[0], label="prompt", max_length=2000)
            gr.Examples([[text] for text in STORIES], prompt, label="prompts")
            most = gr.Slider(1, 8, 4, step=1, label="at most so many pictures")
            sampling = sampling_controls(assistant)
            with gr.Row():
                button = gr.Button("Tell", variant="primary")
                place = gr.Row()
            drawing = shown_picture("being drawn", "the picture that is being drawn", height=200)
            told = gr.Chatbot(label="story", **CHATBOT)

    def tell(
        prompt: str, picture: str | None, most: int, guidance: float, pixel: float, semantic: float,
        seed: float | None, request: gr.Request, progress: gr.Progress = gr.Progress(),
    ) -> Any:  # fmt: skip
        with errors_in_page():
            chosen, state = sampling_of(guidance, pixel, semantic, seed), studio.Told()
            pictures, stop = [] if picture is None else [read_image(picture)], stop_of(request, "story")
            with closing(studio.tell(assistant, prompt, pictures, int(most), chosen, stop=stop)) as states:
                for state in states:
                    progress((state.number, int(most)), desc=f"picture {state.number}", unit="pictures")
                    yield None if state.drawing is None else enlarged(state.drawing), gr.skip()
            reply = [gr.Image(enlarged(part), show_label=False, interactive=False, format="png", alt_text=prompt,
                              buttons=["download"]) if not isinstance(part, str) else part
                     for part in state.parts]  # fmt: skip
            yield None, [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply or "(no reply)"}]

    event = gr.on([button.click, prompt.submit], tell, [prompt, picture, most, *sampling], [drawing, told],
                  show_progress_on=[told], **MODEL, **QUIET)  # fmt: skip
    with place:
        stop_button("story", event)


def message(text: str, picture: str | None, words_first: bool = False) -> dict[str, Any]:
    """The person's next message, a picture by its path, in the order of `Assistant.about`.

    Raises UserError where nothing is said or the picture is damaged.
    """
    if not text or not text.strip():
        raise UserError("write a message first")
    if picture is None:
        return user(text)
    read_image(picture)
    said, shown = user(text), {"type": "image", "path": picture}
    return said | {"content": [*said["content"], shown] if words_first else [shown, *said["content"]]}


def for_chatbot(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the model takes them -> as Gradio shows them."""
    shown = []
    for entry in chat:
        content = entry["content"]
        if not isinstance(content, str):
            content = [part["text"] if part["type"] == "text" else {"path": part["path"]} for part in content]
        shown.append({"role": entry["role"], "content": content or "(no reply)"})
    return shown
