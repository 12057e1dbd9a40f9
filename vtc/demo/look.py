"""How the demo looks: theme, style, and small pieces of HTML. Fonts and everything else come from this machine."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

import vtc
from vtc.bench.timing import Tick
from vtc.errors import VTCError
from vtc.models.images import ImageError, load_image
from vtc.viz import curve
from vtc.viz.figures import FAINT, INK

SIDE = 1024  # pixels; larger pictures are made smaller
PROGRESS = gr.Progress()  # as an argument's default, it makes Gradio pass its own

HEADER = """
<header class="vtc-head"><h1>vtc</h1>
<p>Fewer visual tokens for the encoders and multimodal LLMs you already run, with no retraining. What is merged, what is
dropped, what it saves, and whether the answer stays right.</p></header>
"""

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.html-container:has(.vtc-head, .vtc-card) { padding: 0 !important; }
.vtc-head { display: flex; align-items: baseline; gap: 4px 18px; flex-wrap: wrap; padding: 8px 0 4px; }
.vtc-head h1 { font-size: 30px; font-weight: 700; letter-spacing: -0.02em; margin: 0; color: var(--body-text-color); }
.vtc-head p { flex: 1 1 300px; margin: 0; color: var(--body-text-color-subdued); line-height: 1.45; }
.vtc-tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: var(--layout-gap); }
.vtc-tiles.two { grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); }
.vtc-card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: var(--block-radius); padding: 14px 16px; color: var(--body-text-color); min-width: 0; }
.vtc-card h3, .vtc-card dt, .vtc-card small { color: var(--body-text-color-subdued); font-size: 13px; font-weight: 400;
  line-height: 1.4; margin: 0; }
.vtc-card strong { display: block; font-size: 20px; font-weight: 650; letter-spacing: -0.02em; margin: 3px 0;
  font-variant-numeric: tabular-nums; color: var(--body-text-color); }
.vtc-card .answer { font-size: 20px; font-weight: 650; line-height: 1.35; margin: 4px 0 12px; overflow-wrap: anywhere;
  max-height: 190px; overflow-y: auto; color: var(--body-text-color); }
.vtc-card dl { display: grid; grid-template-columns: 1fr auto; gap: 5px 14px; margin: 0; align-items: baseline; }
.vtc-card dd { margin: 0; font-variant-numeric: tabular-nums; text-align: right; }
.vtc-card.right { box-shadow: inset 0 3px #2b9d6b; } .vtc-card.wrong { box-shadow: inset 0 3px #e0662f; }
.vtc-card table { width: 100%; margin: 0; border: 0 !important; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
.vtc-card tr { border: 0 !important; background: none !important; }
.vtc-card th, .vtc-card td { border: 0 !important; padding: 7px 14px 7px 0; font-weight: 400; text-align: left;
  vertical-align: baseline; color: inherit; }
.vtc-card th { color: var(--body-text-color-subdued); font-size: 13px; }
.vtc-card td { border-top: 1px solid var(--border-color-primary) !important; }
.vtc-card td:not(:nth-child(2)) { white-space: nowrap; } .vtc-card td:nth-child(2) { width: 60%; }
.vtc-card td p, .vtc-card th p { color: inherit; font-size: inherit; margin: 0; }
.vtc-card td p { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden;
  overflow-wrap: anywhere; }
.vtc-card svg { display: block; width: 100%; height: auto; max-width: 460px; margin: 4px auto 0; }
@media (max-width: 640px) { .vtc-card { padding: 12px; } .vtc-card strong { font-size: 16px; } }
.vtc-hint { color: var(--body-text-color-subdued); }
.vtc-hint.vtc-card { padding: 48px 24px; text-align: center; }
.vtc-chips label { padding: 5px 11px !important; }
.vtc-chips label input { position: absolute; opacity: 0; width: 0; margin: 0; }
.vtc-chips label span { margin: 0 !important; }
.vtc-chips label.selected { box-shadow: inset 0 0 0 2px var(--color-accent); }
.vtc-chips label:focus-within { outline: 2px solid var(--color-accent); }
"""


def theme() -> Any:
    """Quiet, with the fonts of the reader's own system."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    colours = gr.themes.colors
    base = gr.themes.Base(
        primary_hue=colours.blue,
        neutral_hue=colours.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=fonts,
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    return base.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")  # readable on white


@contextmanager
def plainly() -> Iterator[None]:
    """Wraps actions that the user starts: vtc's own errors are shown on the page; others are bugs, and go to the
    log."""
    try:
        yield
    except VTCError as error:
        raise gr.Error(escape(str(error), quote=False), duration=None, print_exception=False) from error


def ticks(progress: gr.Progress, total: int) -> Tick:
    """A function that advances the bar by one of `total` runs."""
    count = itertools.count(1)
    return lambda: progress((next(count), total), "dense and compressed in turns", unit="runs")


def picture(path: str) -> Image.Image:
    """An uploaded picture, at most SIDE pixels wide and high.

    Raises:
        ImageError: as `vtc.models.images.load_image`; the message has the user's file name.
    """
    try:
        image = load_image(path)
    except ImageError as error:
        raise ImageError(str(error).replace(repr(path), repr(Path(path).name))) from error
    image.thumbnail((SIDE, SIDE))
    return image


# -- pieces ---------------------------------------------------------------------------------------------------------


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Figures in a row, each (name, value, note)."""
    each = (f"<h3>{escape(n)}</h3><strong>{escape(v)}</strong><small>{escape(s)}</small>" for n, v, s in values)
    return '<div class="vtc-tiles">' + "".join(f'<div class="vtc-card">{one}</div>' for one in each) + "</div>"


def chart(title: str, rows: Sequence[Mapping[str, Any]], x: str, y: str, by: str, labels: Mapping[str, str]) -> str:
    """`vtc.viz.curve` as part of the page, in the page's text colour, light or dark."""
    figure = curve(rows, x, y, by, labels=labels)
    figure.set_size_inches(4.6, 2.9)
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = file.getvalue().partition("<svg")[2]
    for colour, ours in ((INK, "currentColor"), (FAINT, "currentColor"), ("#e6e8ec", "var(--border-color-primary)")):
        drawn = drawn.replace(colour, ours)
    return f'<div class="vtc-card"><h3>{escape(title)}</h3><svg role="img" aria-label="{escape(title)}"{drawn}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in a card; the second column is wide, and shows three lines of a long text."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}><p>{escape(cell)}</p></{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="vtc-card"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def summaries() -> dict[str, str]:
    """What every method does, as a sentence."""
    return {name: f"{text[0].upper()}{text[1:]}." for name, text in vtc.list_methods().items()}


def hint(text: str) -> str:
    return f'<div class="vtc-card vtc-hint">{escape(text)}</div>'


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"
