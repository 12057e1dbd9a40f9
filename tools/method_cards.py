#!/usr/bin/env python3
"""Write the facts in docs/methods.md and docs/methods/*.md: what the code says of every method, never stale.

`.venv/bin/python tools/method_cards.py` writes what stands between the marks, `--check` fails if it is out of date (a
test runs that). All else on these pages is written by hand; the card of a new method is begun from its docstring.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

BEGIN, END = "<!-- facts: tools/method_cards.py -->", "<!-- /facts -->"
# What the fields of Tokens are called here.
FIELDS = {
    "layer_keys": "attention keys; where a decoder takes its tokens in, the tokens alone",
    "keys": "attention keys",
    "attention": "attention received in the tower",
    "middle": "attention received in the tower's middle",
    "inputs": "the projector's inputs",
    "projector": "the projector",
    "text": "the prompt's words",
    "grid": "rows and columns",
    "prompt_attention": "the decoder's attention",
    "decoder_keys": "the decoder's keys",
    "decoder_text": "the prompt's words",
}


def arguments(cls: type) -> dict[str, str]:
    """Option -> what the docstring's `Args:` say of it, in one line."""
    text = (inspect.getdoc(cls) or "").partition("\nArgs:\n")[2]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        opens = re.match(r"    ([\w, ]+): (.*)", line)
        if opens and not line.startswith("     "):
            names = opens[1].split(", ")
            found |= {name: opens[2] for name in names}
        elif line.startswith("     "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        elif line:
            break
    return found


def options(cls: type, base: type | None = None) -> list[str]:
    known = {field.name for field in fields(base)} if base else set()  # type: ignore[arg-type]
    said = {name: text for each in reversed(cls.__mro__) for name, text in arguments(each).items()}
    rows = []
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in known:
            meaning = said.get(field.name, "of the random draws" if field.name == "seed" else "")
            rows.append(f"| `{field.name}` | `{field.default!r}` | {meaning} |".replace("|s|", "\\|s\\|"))
    return ["| option | default | what it is |", "|---|---|---|", *rows] if rows else []


def reads(cls: Any) -> str:
    """What the method, with the options it has by itself, reads beside the tokens."""
    method = cls(keep=0.5 if cls.budgeted else 1.0)
    if method.entrance is method:
        return "the image's pixels, and no tokens"
    named = [FIELDS[field] for field in FIELDS if field in method.needs]
    if_there = " (if there)" if method.optional & method.needs and not cls.encoder else ""
    return (", ".join(named) or "nothing") + if_there


def facts(name: str) -> list[str]:
    import mllm_zoo
    import zoo

    import vtc
    from vtc.methods import METHODS, Method
    from vtc.methods.ranked import Ranked

    cls = METHODS[name]
    budget: Any = {"keep": 0.5 if cls.budgeted else 1.0}

    def goes(net: Any, **more: Any) -> bool:
        try:
            return vtc.explain(net, name, **(budget | more)).ok
        except vtc.OptionError:
            return False

    vit, llm, clips = zoo.model("timm-vit"), mllm_zoo.build("llava"), mllm_zoo.build("qwen2_5_vl")
    before = cls(**budget).entrance is not None  # works before a tower, which is not vtc's to do in every family
    llm = clips if before else llm
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    paper = re.search(r"https://arxiv\.org/abs/(\d+\.\d+)", module)
    places = ["behind a layer of the decoder" if cls.in_decoder else "where the decoder takes its image tokens in"]
    places = ["before the tower of Qwen2-VL, Qwen2.5-VL and Qwen3-VL"] if before else places
    places += ['the layers of the tower (`where="tower"`)'] if goes(llm, keep=0.9, where="tower") else []
    layer = "once, at the first layer" if cls.one_shot else "between attention and MLP of every layer"
    layer = "once, in front of the first layer" if before else layer
    merging: dict[str, dict[str, Any]] = {
        '`positions="ppe"`': {"positions": "ppe"},
        "`cascade=`": {"cascade": {1: 0.5}},
        "`proportional=`": {"proportional": True},
    }
    able = [label for label, more in merging.items() if goes(llm, **more)]
    able += ["`events=`"] if goes(clips, events=0.5) else []
    asks = {"text", "prompt_attention", "decoder_text"}  # what tells of the prompt
    text = "yes" if asks & cls(**budget).needs else "no"
    if text == "no" and issubclass(cls, Ranked):
        text = 'no (`importance="relevance"`: yes)'
    # one budget for several images makes one row of them, which fills no grid
    pooled = "; or `pooled=`" if "grid" not in cls(**budget).needs and goes(llm, pooled=True) else ""
    whole = "frames" in cls(**budget).needs
    shares = ", or by `shares=`" if goes(clips, shares="uniform") else ""
    video = "whole, over its frames" if whole else f"frame by frame (Qwen: pairs of frames){shares}"
    video = "left whole" if before else video
    encoder = layer if goes(vit) else "no"
    once = "at most half of the tokens; below, several rounds" if cls.halves else "any number"
    once = once if cls.budgeted else "as many as the pixels say; there is no budget"
    if cls.rectangle:
        once = "at most half of the rows and half of the columns"
        encoder = "before one layer, of encoders that need a rectangle of tokens (SAM, ViTDet): no others"
    rows = {
        "class": f"`vtc.{cls.__name__}`, `{name!r}`".replace("'", '"'),
        "paper": f"[arXiv {paper[1]}]({paper[0]})" if paper else "none: a baseline",
        "tokens are": "merged" if cls.merges else "dropped",
        "in a vision encoder": encoder,
        "in a multimodal LLM": "; ".join(places) if goes(llm) else "no",
        "reads, beside the tokens": reads(cls),
        "reads the prompt's words": text,
        "training": "none (the paper's importance is trained: `scorer=`)" if name == "idpruner" else "none",
        "in one round": once,
        "batches": "every image alone" + (", with a budget of its own" if cls.budgeted else "") + pooled,
        "video": video if goes(clips) else "no",
        "options for merged tokens": ", ".join(able) or "none" if cls.merges else "none: nothing merges",
    }
    lines = [
        f"**{name}** {cls.summary}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {row} |" for key, row in rows.items()),
    ]
    own = options(cls, Method)
    shared = "[Options of every method](../methods.md#options-of-every-method)"
    return [*lines, "", *([*own, "", f"{shared}."] if own else [f"No options of its own. {shared}."])]


def overview() -> list[str]:
    from vtc.methods import METHODS

    parts = {
        "In vision encoders and in multimodal LLMs:": [c for c in METHODS.values() if c.encoder and c.budgeted],
        "In multimodal LLMs, where the decoder takes its image tokens in:": [
            c for c in METHODS.values() if not c.encoder and not c.in_decoder and not c.rectangle and c.budgeted
        ],
        "Before the layers of vision encoders and of some multimodal LLMs' towers, there with one behind it, too:": [
            c for c in METHODS.values() if not c.budgeted
        ],
        "And from a layer of the decoder on:": [c for c in METHODS.values() if c.in_decoder],
        "In vision encoders that need a rectangle of tokens (SAM, ViTDet):": [
            c for c in METHODS.values() if c.rectangle
        ],
    }
    lines: list[str] = []
    for title, classes in parts.items():
        lines += [title, "", "| method | what it does | drops or merges | reads |", "|---|---|---|---|"]
        for cls in classes:
            how = "merges" if cls.merges else "drops"
            lines.append(f"| [`{cls.name}`](methods/{cls.name}.md) | {cls.summary} | {how} | {reads(cls)} |")
        lines.append("")
    return lines[:-1]


def shared() -> list[str]:
    from vtc.methods import Method

    return options(Method)


def pages() -> dict[Path, list[list[str]]]:
    """Every page with what stands between its marks, in order."""
    from vtc.methods import METHODS

    cards = {DOCS / "methods" / f"{name}.md": [facts(name)] for name in METHODS}
    return {DOCS / "methods.md": [overview(), shared()], **cards}


def begun(name: str) -> str:
    """The card of a method that has none yet."""
    from vtc.methods import METHODS

    decides = (inspect.getdoc(METHODS[name]) or "").partition("\nArgs:\n")[0].strip()
    answers = (
        "Share of correct answers about drawn scenes with the [small models](../answers.md); that page explains them\n"
        "and gives intervals:\n\n<!-- answers -->\nNot asked yet.\n<!-- /answers -->"
    )
    parts = [
        f"# {METHODS[name].__name__}",
        f"{BEGIN}\n{END}",
        "## How it decides",
        decides,
        "## What was measured",
        answers,
    ]
    return "\n\n".join([*parts, "## When not to use it", "Not known yet: it was compared with nothing."]) + "\n"


def filled(text: str, parts: list[list[str]], page: str) -> str:
    """The page with what is between its marks written anew."""
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != len(parts):
        raise SystemExit(f"{page} must hold {len(parts)} time(s): {BEGIN} ... {END}, each on a line of its own")
    fresh = iter(parts)
    return pattern.sub(lambda _: "\n".join([BEGIN, *next(fresh), END]), text)


def stale(write: bool = False) -> list[str]:
    """Which pages are out of date; with `write`, they are no longer."""
    wrong = []
    for page, parts in pages().items():
        text = page.read_text() if page.exists() else ""
        now = filled(text or begun(page.stem), parts, str(page.relative_to(ROOT)))
        if now != text:
            wrong.append(str(page.relative_to(ROOT)))
            if write:
                page.write_text(now)
    return wrong


def main() -> int:
    if "--check" in sys.argv:
        return 1 if stale() else 0
    stale(write=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
