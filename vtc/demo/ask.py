"""The tab *Ask*: one question to a multimodal LLM, unmodified and with fewer visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape
from statistics import median
from typing import Any

import gradio as gr
import torch
from PIL import Image

from vtc.bench import answer
from vtc.bench.timing import Tick
from vtc.checkpoints.tiny import TINY
from vtc.demo import look
from vtc.errors import OptionError
from vtc.eval import scenes
from vtc.eval.answers import plain
from vtc.methods import METHODS, Method, budgeted, make
from vtc.models import llms

LEVELS = (0.05, 0.1, 0.25, 0.5, 1.0)
NEW_TOKENS, REPEATS = 48, 3
LONGEST = 2000  # maximum characters of a question


@lru_cache(maxsize=1)  # only the last one: it may be large
def model(name: str) -> tuple[Any, Any]:
    """The processor and the model of this name, as `vtc.models.llms.load` finds them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor, weights = llms.load(name, make("random", keep=1.0), device=device)
    return processor, weights()


def budget(name: str, keep: float, positions: str = "original", sized: bool = False) -> Method:
    """A method from the values of the controls. For methods that merge: `positions`, and whether tokens are weighted by
    size. A method without a budget has no use for `keep`.

    Raises:
        OptionError: an unknown method, or a value out of range.
    """
    merges = name in METHODS and METHODS[name].merges
    keep = keep if budgeted(name) else 1.0
    return make(name, keep=float(keep), **({"positions": positions, "proportional": sized} if merges else {}))


def run(
    name: str, image: Image.Image, prompt: str, method: Method, repeats: int = REPEATS, *, tick: Tick | None = None
) -> answer.AnswerComparison:
    """Both answers and what they cost.

    Raises:
        OptionError: no model, no question, or one longer than LONGEST.
        ChatError, CheckpointError, ModelError: there is no such model, or it cannot answer questions.
        UnsupportedModelError: the method does not fit it.
    """
    name, prompt = name.strip(), prompt.strip()
    if not name or not prompt:
        raise OptionError(f"there is no {'question' if name else 'model'}: write one")
    if len(prompt) > LONGEST:
        raise OptionError(f"the question has {len(prompt)} characters; at most {LONGEST} are taken here")
    processor, ready = model(name)
    inputs = llms.build_inputs(processor, [image], prompt)
    return answer.compare(ready, processor, inputs, method, NEW_TOKENS, repeats, tick=tick)


def answers(found: answer.AnswerComparison, truth: str | None = None) -> str:
    """Both answers side by side, as HTML; `truth` marks them right or wrong."""
    cards = []
    for head, side in (("As it is", found.dense), (type(found.method).__name__, found.less)):
        first = look.milliseconds(side.first_seconds)
        facts = {
            "Image tokens": f"{side.visual:,}",
            **_by_frame(found, side),
            "Prompt, in tokens": f"{side.prompt:,}",
            "Time to first token": first if side is found.dense else f"{first} ({found.faster:.2f} × as fast)",
            "KV cache": _bytes(side.kv_bytes),
        }
        mark, note = "", ""
        if truth is not None:
            mark = "right" if plain(side.answer) == plain(truth) else "wrong"
            note = f" · {mark}" + (f": the scene says {truth}" if mark == "wrong" else "")
        listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
        text = escape(side.answer) or '<span class="vtc-hint">(nothing)</span>'
        cards.append(
            f'<div class="vtc-card {mark}"><h3>{escape(head + note)}</h3><div class="answer">{text}</div>'
            f"<dl>{listed}</dl></div>"
        )
    return f'<div class="vtc-tiles two">{"".join(cards)}</div>'


def sweep(
    name: str,
    image: Image.Image,
    prompt: str,
    method: str,
    positions: str = "original",
    sized: bool = False,
    levels: Sequence[float] = LEVELS,
    *,
    tick: Tick | None = None,
) -> list[tuple[float, answer.AnswerComparison]]:
    """The same question at several budgets. Raises as `run`."""
    return [(q, run(name, image, prompt, budget(method, q, positions, sized), tick=tick)) for q in levels]


def sweep_html(rows: Sequence[tuple[float, answer.AnswerComparison]]) -> tuple[str, str]:
    """A chart of time against keep, and a table of the answers, as HTML."""
    dense = rows[0][1].dense
    usual = median(found.dense.first_seconds for _, found in rows)
    points = [{"keep": q, "ms": 1e3 * usual, "by": "as it is"} for q, _ in rows]
    points += [
        {"keep": q, "ms": 1e3 * found.less.first_seconds, "by": type(found.method).__name__} for q, found in rows
    ]
    labels = {"keep": "part of the image tokens that stays", "ms": "ms to the first token"}
    lines = [(f"{q:g}", found.less) for q, found in rows]
    table = look.table(
        ("Keep", "Answer", "Image tokens", "KV cache"),
        [(q, s.answer or "(nothing)", f"{s.visual:,}", _bytes(s.kv_bytes)) for q, s in (*lines, ("as it is", dense))],
    )
    return look.chart("Time to first token over keep", points, "keep", "ms", "by", labels), table


def _by_frame(found: answer.AnswerComparison, side: answer.Side) -> dict[str, str]:
    """Of a clip, the tokens of each frame."""
    if not found.report.frames:
        return {}
    (frames,) = found.report.frames
    kept = frames if side is found.less else (side.visual // len(frames),) * len(frames)
    return {"Of each frame": ", ".join(f"{count:,}" for count in kept)}


def _bytes(count: int) -> str:
    unit, size = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s or u == "kB")
    return f"{count / size:.3g} {unit}"


# -- the tab --------------------------------------------------------------------------------------------------------


def build(gpu: Callable[..., Any]) -> None:
    """Put the tab on the page."""
    first, about = scenes.scene("test", 0), look.summaries()
    offered = [name for name in about if not METHODS[name].rectangle]
    image, truth = gr.State(first.image, time_to_live=3600), gr.State(_truth(first), time_to_live=3600)
    number = gr.State(0)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            name = gr.Dropdown(
                list(TINY),
                value=TINY[0],
                allow_custom_value=True,
                label="Model",
                info="Two come along, and know scenes like this one. Or a folder; or an id on the Hugging Face Hub, "
                "where there is a network.",
                elem_id="ask-model",
            )
            shown = gr.Image(first.image, label="Scene 0", interactive=False, buttons=[], height=250, format="png")
            with gr.Row():
                upload = gr.UploadButton("Upload", file_types=["image"], size="sm", min_width=100, elem_id="ask-upload")
                following = gr.Button("Next scene", size="sm", min_width=100, elem_id="ask-next")
            ready = gr.Radio(
                _questions(first), label="Questions about this scene", elem_id="ask-ready", elem_classes="vtc-chips"
            )
            prompt = gr.Textbox(_questions(first)[0], label="Question", max_length=LONGEST, elem_id="ask-question")
            method = gr.Dropdown(offered, value="tome", label="Method", info=about["tome"], elem_id="ask-method")
            keep = gr.Slider(0.02, 1.0, 0.25, step=0.01, label="Image tokens that stay", elem_id="ask-keep")
            positions = gr.Radio(
                [("their anchor's", "original"), ("their members' (PPE)", "ppe")],
                value="original",
                label="Positions that merged tokens carry",
                elem_id="ask-positions",
            )
            sized = gr.Checkbox(False, label="Merged tokens weigh by their size", elem_id="ask-sized")
            more = gr.Checkbox(True, label="Ask at other budgets too")
            start = gr.Button("Ask", variant="primary", elem_id="ask-run")
        with gr.Column(scale=5, min_width=300):
            hint = look.hint(
                "Choose a question and press Ask: the model answers as it is, and with fewer image tokens."
            )
            both = gr.HTML(hint, elem_id="ask-answers")
            with gr.Row(equal_height=False):
                left = gr.Image(
                    interactive=False,
                    buttons=["fullscreen"],
                    format="png",
                    visible=False,
                    min_width=260,
                    elem_id="ask-left",
                )
                with gr.Column(min_width=260):
                    over = gr.HTML()
            levels = gr.HTML(elem_id="ask-levels")

    def take(path: str, who: str | None) -> list[Any]:
        with look.plainly():
            taken = look.picture(path)
        none = gr.update(choices=[], value=None, visible=False)
        asked = "How many things are there?" if who in TINY else "Describe this image."
        return [taken, {}, gr.update(value=taken, label="Your picture"), none, asked]

    def draw(before: int) -> list[Any]:
        made = scenes.scene("test", before + 1)
        asked = _questions(made)
        picture = gr.update(value=made.image, label=f"Scene {made.number}")
        return [
            made.image,
            _truth(made),
            picture,
            gr.update(choices=asked, value=None, visible=True),
            asked[0],
            made.number,
        ]

    def go(
        taken: Image.Image,
        known: dict[str, str],
        who: str | None,
        text: str,
        how: str,
        part: float,
        where: str,
        weigh: bool,
        progress: gr.Progress = look.PROGRESS,
    ) -> list[Any]:
        progress(0, "loading the model")
        with look.plainly():
            tick = look.ticks(progress, 2 * (REPEATS + 2))
            found = run(who or "", taken, text, budget(how, part, where, weigh), tick=tick)
            drawn = answer.remains(taken, found, max(taken.height, 512))
        label = f"{found.dense.visual} → {found.less.visual} image tokens"
        if found.slots > 1:
            label += "; rings: positions carried"
        left = gr.update(value=drawn and drawn[-1], label=label, visible=drawn is not None)
        return [answers(found, known.get(text.strip())), left, "", ""]

    def further(
        taken: Image.Image,
        who: str,
        text: str,
        how: str,
        where: str,
        weigh: bool,
        wanted: bool,
        progress: gr.Progress = look.PROGRESS,
    ) -> tuple[str, str]:
        if not wanted:
            return "", ""
        with look.plainly():
            tick = look.ticks(progress, 2 * (REPEATS + 2) * len(LEVELS))
            return sweep_html(sweep(who, taken, text, how, where, weigh, tick=tick))

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    job: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "model"}
    scene = [image, truth, shown, ready, prompt]
    upload.upload(take, [upload, name], scene, **quiet)
    following.click(draw, number, [*scene, number], **quiet)
    ready.input(lambda text: text, ready, prompt, **quiet)
    method.change(
        lambda how: (gr.update(info=about[how]), *[gr.update(visible=METHODS[how].merges)] * 2),
        method,
        [method, positions, sized],
        **quiet,
    )
    asked = start.click(
        gpu(go),
        [image, truth, name, prompt, method, keep, positions, sized],
        [both, left, over, levels],
        show_progress_on=both,
        **job,
    )
    rest = [image, name, prompt, method, positions, sized, more]
    asked.success(gpu(further), rest, [over, levels], show_progress_on=levels, **job)


def _truth(scene: scenes.Scene) -> dict[str, str]:
    return {q.text: q.answer for q in scene.questions}


def _questions(scene: scenes.Scene) -> list[str]:
    """One question of every kind, then others: at most six."""
    by_kind = {q.kind: q.text for q in reversed(scene.questions)}
    return list(dict.fromkeys([*by_kind.values(), *_truth(scene)]))[:6]
