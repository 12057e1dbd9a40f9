"""The demo in a browser: `vtc demo`, or `create_demo().launch(**LAUNCH)`. Needs Gradio, and no network."""

from vtc.demo.app import LAUNCH, create_demo

__all__ = ["LAUNCH", "create_demo"]
