"""The tab *Watch*: one question about a clip, and how many tokens of each frame are left to answer it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import gradio as gr
from PIL import Image

from vtc.bench import answer
from vtc.bench.timing import Tick
from vtc.checkpoints.tiny import TINY
from vtc.demo import ask, look
from vtc.errors import OptionError
from vtc.eval import asking, scenes
from vtc.methods import Method
from vtc.viz import film

FRAMES, REPEATS = 8, 3
MODEL = TINY[0]  # of those that come along the one that watches clips
SHARES = {
    "uniform": "All frames keep as many.",
    "uniqueness": "Frames that are unlike the whole clip keep more.",
    "change": "Frames that differ from the one before keep more.",
}
METHODS = ("evs", "vidcom2", "flashvid", "divprune", *(f"divprune+shares={by}" for by in SHARES), "random")


@lru_cache(maxsize=16)
def clip(number: int) -> scenes.Clip:
    return scenes.clip("test", number, FRAMES)


def questions(shown: scenes.Clip) -> dict[str, scenes.Question]:
    """All about a clip: when things are there, and what those look like that come and go."""
    return {q.text: q for q in (*shown.questions, *shown.changes)}


def run(
    number: int, prompt: str | None, method: Method, repeats: int = REPEATS, *, tick: Tick | None = None
) -> answer.AnswerComparison:
    """Both answers about clip `number` and what they cost.

    Raises:
        OptionError: the question is none of the clip's.
        UnsupportedModelError: the method does not fit the model.
    """
    shown = clip(number)
    question = questions(shown).get(prompt or "")
    if question is None:
        raise OptionError("choose one of the questions about this clip")
    processor, ready = ask.model(MODEL)
    asked = asking.Asked(question.kind, question.text, question.answer, shown, asking.View(frames=FRAMES))
    inputs = dict(asking.prompts(processor, [asked]))
    return answer.compare(ready, processor, inputs, method, ask.NEW_TOKENS, repeats, tick=tick)


def strip(number: int, found: answer.AnswerComparison) -> Image.Image:
    """The clip's frames, one of those that the model joins, with what is left of each."""
    (kept,) = found.report.frames
    return film(clip(number).frames[:: FRAMES // len(kept)], found.groups)


def moving(number: int) -> str:
    """The clip, two frames a second, as HTML."""
    first, *others = clip(number).frames
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, duration=500, loop=0, quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    style = "display: block; width: 100%; max-width: 256px; margin: 8px auto 0; border-radius: 6px"
    picture = f'<img alt="A clip of {FRAMES} frames" style="{style}" src="data:image/webp;base64,{data}">'
    return (
        f'<div class="vtc-card"><h3>Clip {number}: {FRAMES} frames, which the model joins in pairs</h3>{picture}</div>'
    )


def about(name: str) -> str:
    """What a method of METHODS does."""
    method, _, shares = name.partition("+shares=")
    return f"{look.summaries()[method]} {SHARES.get(shares, '')}".strip()


# -- the tab --------------------------------------------------------------------------------------------------------


def build(gpu: Callable[..., Any]) -> None:
    """Put the tab on the page."""
    asked, number = list(questions(clip(0))), gr.State(0)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            shown = gr.HTML(moving(0), elem_id="watch-clip")
            following = gr.Button("Next clip", size="sm", min_width=100, elem_id="watch-next")
            prompt = gr.Radio(
                asked,
                value=asked[0],
                label="Questions about this clip",
                elem_id="watch-ready",
                elem_classes="vtc-chips",
            )
            method = gr.Dropdown(
                list(METHODS), value="vidcom2", label="Method", info=about("vidcom2"), elem_id="watch-method"
            )
            keep = gr.Slider(
                0.02,
                1.0,
                0.25,
                step=0.01,
                label="Tokens of the clip that stay",
                info="evs keeps the first frame whole, however few these are.",
                elem_id="watch-keep",
            )
            start = gr.Button("Ask", variant="primary", elem_id="watch-run")
        with gr.Column(scale=5, min_width=300):
            hint = look.hint(
                f"Choose a question and press Ask: {MODEL} answers as it is, and with fewer tokens of the clip."
            )
            both = gr.HTML(hint, elem_id="watch-answers")
            left = gr.Image(
                show_label=False,
                interactive=False,
                buttons=["fullscreen"],
                format="png",
                visible=False,
                elem_id="watch-film",
            )

    def draw(before: int) -> list[Any]:
        texts = list(questions(clip(before + 1)))
        return [before + 1, moving(before + 1), gr.update(choices=texts, value=texts[0])]

    def go(at: int, text: str | None, how: str, part: float, progress: gr.Progress = look.PROGRESS) -> list[Any]:
        progress(0, "loading the model")
        with look.plainly():
            tick = look.ticks(progress, 2 * (REPEATS + 2))
            found = run(at, text, ask.budget(how, part), tick=tick)
        truth = questions(clip(at))[text or ""].answer
        return [ask.answers(found, truth), gr.update(value=strip(at, found), visible=True)]

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    following.click(draw, number, [number, shown, prompt], **quiet)
    method.change(lambda how: gr.update(info=about(how)), method, method, **quiet)
    start.click(
        gpu(go),
        [number, prompt, method, keep],
        [both, left],
        show_progress_on=both,
        api_visibility="private",
        concurrency_id="model",
    )
