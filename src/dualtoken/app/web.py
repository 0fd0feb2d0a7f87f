"""`dualtoken app`: one model in the browser, with a tab for everything it does (Gradio, extra `app`).

`studio.py` and `token_view.py` do the work and know nothing of the page; `web_*.py` lay out the tabs. Nothing is
fetched from elsewhere: no analytics, no fonts, no shared link.
"""

import os
from types import ModuleType
from typing import Any

from dualtoken.core.errors import UserError
from dualtoken.mllm.assistant import Assistant

WAITING = 32  # requests in the queue; one is worked on at a time
LARGEST_FILE = "32mb"
KEPT = (3600, 24 * 3600)  # seconds: every hour pictures of the page that are older than a day are removed


def app(model: str = "mini", host: str = "127.0.0.1", port: int = 7860, browser: bool = False) -> None:
    """Show a model at work in the browser until Ctrl-C.

    Args:
        model: a preset, or the directory of a multimodal model.
        host: address to listen at; 0.0.0.0 = on all, for other machines too.
        port: to listen at; 0 = any that is free.
        browser: open the page at once.
    """
    blocks = build(Assistant.open(model), model)
    _, address, _ = launch(blocks, host, port, browser)
    print(f"look at {address} (Ctrl-C ends)")
    blocks.block_thread()


def build(assistant: Assistant, name: str) -> Any:
    """The page of a model, a gradio.Blocks. Raises UserError where Gradio is not installed."""
    gr = gradio()
    from dualtoken.app import web_parts, web_pictures, web_tokens, web_words

    side = assistant.model.vision_tokenizer.image_size
    with gr.Blocks(title=f"DualToken: {name}", analytics_enabled=False, delete_cache=KEPT) as blocks:
        gr.Markdown(
            f"# DualToken: {name}\nPictures of {side} px as pixel codes and semantic codes; one model that reads and "
            "writes both."
        )
        for title, tab in (
            ("Tokenize", web_tokens.tokenize_tab),
            ("Look", web_words.look_tab),
            ("Draw", web_pictures.draw_tab),
            ("Edit", web_pictures.edit_tab),
            ("Story", web_words.story_tab),
        ):
            with gr.Tab(title):
                tab(assistant)
        blocks.unload(web_parts.stop)  # nothing is made for who has left
    return blocks.queue(max_size=WAITING)


def launch(blocks: Any, host: str, port: int, browser: bool = False) -> tuple[Any, str, str]:
    """Serve a page without waiting; what gradio.Blocks.launch returns. Raises UserError for a port it cannot have."""
    gr = gradio()
    theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    try:
        return blocks.launch(
            server_name=host, server_port=port or None, inbrowser=browser, share=False, quiet=True, show_error=True,
            ssr_mode=False, footer_links=[], theme=theme, max_file_size=LARGEST_FILE, prevent_thread_lock=True,
        )  # fmt: skip
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error}); give another --port") from None


def gradio() -> ModuleType:
    """Gradio without its telemetry, quick to notice closed pages. Raises UserError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported, and again by some of its parts
    os.environ.setdefault("GRADIO_HEARTBEAT_INTERVAL", "2")
    try:
        import gradio
    except ImportError:
        raise UserError("the web app needs Gradio: pip install 'dualtoken[app]'") from None
    return gradio
