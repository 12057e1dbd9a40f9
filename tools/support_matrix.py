#!/usr/bin/env python3
"""Write docs/models.md: every encoder of the test matrix against every method, as `vtc.explain` answers.

`.venv/bin/python tools/support_matrix.py` writes it, `--check` fails if it is out of date (a test runs that).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

COLUMNS = {
    "pitome": ("pitome", {}),
    "tome": ("tome", {}),
    "random": ("random", {}),
    "downsample (pool)": ("downsample", {}),
    "downsample (resize)": ("downsample", {"mode": "resize"}),
}
HEAD = """# Models

Written by `tools/support_matrix.py` from the models that the tests build (`tests/zoo.py`, `tests/mllm_zoo.py`): every
"yes" is a model on which every promise of [the architecture](architecture.md#promises) is tested. Your own model:
`vtc.explain(model)`, or `vtc explain --model timm:vit_base_patch16_224`.

"""
REGISTRY_HEAD = """
## Whole registries

What `vtc.explain` says of every name of {versions}, as `make registry` asked it (`tools/registry.py`): built on the
meta device, names that differ in sizes alone as one. **Every supported kind also ran on weights: the same verdict,
keep=1.0 to the last bit, keep=0.7 with an output of the same shape. Every other is refused by `compress` with the same
words.**
Multimodal LLMs of transformers are in [the next table](#multimodal-llms) instead.

"""
MORE_HEAD = """
### Other classes

Through one generic family, on transformers 5.24 and newer, with methods that read the tokens alone (`random`, `norm`,
`divprune`, `dpc_knn`, `tome`, `pitome`, `downsample` where an image's tokens fill a grid, `cdpruner`, and `idpruner`,
`scope`, `vispruner` with `importance="norm"`), and where the tower is described with those that read it.
Tiny models of these {count} model types, with real towers and pixels, give what their plain decoder gives on the tokens
that stay (`tests/test_mllm_classes.py`: one image, two, ragged batches, videos where the class has them; {tolerance} in
float32):

{names}.

What methods may read of the towers of these (`tests/test_mllm_evidence.py`: against the maps of eager attention in the
plain model, gradients and finite differences; of all others nothing, and methods that read them are refused by name):

{towers}

`positions="ppe"` goes with all of them whose decoder reads positions in its rotary table alone (not Ministral 3,
Mistral 4, Mistral Large 4, GLM5-Next). `fastv`, `dart`, `cascade=` and `proportional=True` go with decoders of full
attention in every layer; windows, linear attention, convolutions, indexed attention and caches that layers share are
refused by name, and so are layers in front of DeepStack's planes. `events=` needs videos that are told frame by frame.
Each against the plain decoder, in which nothing is taken out (`tests/test_mllm_between.py`).

Refused, each class because it

"""
LLM_HEAD = """
## Multimodal LLMs

Where the decoder takes its image tokens in (`fastv`, `dart`: from a layer of the decoder on), on transformers 5.17 and
5.24, with sdpa and eager attention, in batches, with several images, with video where the family has it.
`where="tower"` is PiToMe and ToMe inside the vision tower. The last four rows go with the methods that merge
(`events=` with `dpc_knn`).

"""


def table() -> str:
    from zoo import ZOO, model

    import vtc

    lines = ["| encoder | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    notes: list[str] = []
    for name in ZOO:
        cells = []
        for method, options in COLUMNS.values():
            plan = vtc.explain(model(name), method, **options)
            if plan.ok:
                cells.append("yes")
                continue
            reason = plan.encoders[0].refusal.removesuffix('; mode="pool" works').removeprefix('mode="resize": ')
            if reason not in notes:
                notes.append(reason)
            cells.append(f"no ({notes.index(reason) + 1})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(notes, 1)]
    covers = [f"- **{name}**: {families}" for name, families in vtc.list_adapters().items()]
    page = HEAD + "\n".join(covers) + "\n\n" + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"
    return page + registry() + LLM_HEAD + "\n".join(multimodal()) + "\n" + others()


_TOLD = {
    "attention near its end": "attention",
    "attention in its middle": "middle",
    "keys": "keys",
    "the projector and its inputs": "projector",
}


def others() -> str:
    """What the generic family takes, and what not."""
    from vtc.adapters.multimodal.families.generic import PROVEN, UNFIT
    from vtc.adapters.multimodal.families.towers import TOWERS

    names = ", ".join(f"`{name}`" for name in sorted(PROVEN))
    by: dict[str, list[str]] = {}
    for name, tower in sorted(TOWERS.items()):
        told = [words for words, field in _TOLD.items() if field in tower.evidence]
        by.setdefault(", ".join(told) or "nothing", []).append(f"`{name}`")
    towers = "\n".join(f"- {told}: {', '.join(those)}" for told, those in by.items())
    refused = "\n".join(f"- `{name}`: {reason}" for name, reason in sorted(UNFIT.items()))
    return MORE_HEAD.format(count=len(PROVEN), tolerance="1e-4", names=names, towers=towers) + refused + "\n"


def registry() -> str:
    """The answers that `make registry` wrote: names by verdict, and the classes behind them."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("registry-*.json"), reverse=True)
    asked = {path.stem.partition("-")[2]: json.loads(path.read_text()) for path in paths}
    counts: dict[str, dict[str, int]] = {}
    kinds: dict[str, dict[str, int]] = {}
    for library, record in asked.items():
        for found in record["answers"].values():
            verdict = _short(found["verdict"])
            names = len(found["names"])
            counts.setdefault(verdict, dict.fromkeys(asked, 0))[library] += names
            kind = kinds.setdefault(verdict, {})
            kind[found["kind"]] = kind.get(found["kind"], 0) + names
    unasked = [verdict for verdict in ("multimodal", "not built") if verdict in counts]
    order = sorted(set(counts) - {"supported", *unasked}, key=lambda v: (-sum(counts[v].values()), v))
    lines = ["| | " + " | ".join(asked) + " | of these kinds |", "|---" * (len(asked) + 2) + "|"]
    for verdict in [v for v in ("supported",) if v in counts] + order + unasked:
        most = sorted(kinds[verdict], key=lambda kind: (-kinds[verdict][kind], kind))
        listed = most if verdict == "supported" else most[:8]
        told = ", ".join(listed) + (f" and {len(most) - len(listed)} more" if len(most) > len(listed) else "")
        label = {"supported": "**supported**", "not built": "needs another package, or does not build by default"}
        row = [label.get(verdict, verdict), *(str(n or "") for n in counts[verdict].values()), told]
        lines.append("| " + " | ".join(row) + " |")
    total = [sum(counts[v][library] for v in counts) for library in asked]
    total = [f"{n} of {record['names']}" for n, record in zip(total, asked.values(), strict=True)]
    lines.append("| names asked | " + " | ".join(total) + " | |")
    versions = " and ".join(f"{library} {record['version']}" for library, record in asked.items())
    return REGISTRY_HEAD.format(versions=versions) + "\n".join(lines) + "\n"


def _short(verdict: str) -> str:
    """A reason without the names of parts."""
    reason = re.sub(r" \([^()]*\)", "", verdict.split("; ")[0])
    for end in (" more than once", " behind it", " no account of"):
        reason = reason.partition(f"{end}:")[0] + end if f"{end}:" in reason else reason
    for pattern in (r"block \d+ (.*)", r"(its blocks are given) .*(, which .*)"):
        if found := re.fullmatch(pattern, reason):
            reason = "a block " + found[1] if "block \\d" in pattern else f"{found[1]} arguments{found[2]}"
    reason = re.sub(
        r"^\d+ tokens .* for \d+ patches.*", "more tokens reach its first block than prefix and patches", reason
    )
    return re.sub(r"(expects|knows it): .*", r"\1", reason)


def multimodal() -> list[str]:
    """Every method in every family of multimodal LLMs, methods down and families across."""
    from mllm_zoo import FAMILIES, build

    import vtc
    from vtc.methods import METHODS

    rows = {name: (name, {"keep": 0.5}) for name in METHODS}
    rows |= {f'{name}, where="tower"': (name, {"keep": 0.9, "where": "tower"}) for name in ("pitome", "tome")}
    rows |= {"PPE (`positions=`)": ("dpc_knn", {"keep": 0.5, "positions": "ppe"})}
    rows |= {"`cascade=`": ("dpc_knn", {"keep": 0.5, "cascade": {2: 0.5}})}
    rows |= {"`proportional=True`": ("dpc_knn", {"keep": 0.5, "proportional": True})}
    rows |= {"`events=`": ("dpc_knn", {"keep": 0.5, "events": 0.5})}
    lines, notes = ["| method | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 1) + "|"], []
    for label, (method, options) in rows.items():
        cells = []
        for name in FAMILIES:
            plan = vtc.explain(build(name), method, **options)
            if plan.ok:
                cells.append("yes")
                continue
            reason = plan.encoders[0].refusal.removesuffix('; where="llm" works').removeprefix('where="tower": ')
            if reason not in notes:
                notes.append(reason)
            cells.append(f"no ({notes.index(reason) + 1})")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return [*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(notes, 1))]


def main() -> int:
    page, text = ROOT / "docs" / "models.md", table()
    if "--check" in sys.argv:
        return 0 if page.exists() and page.read_text() == text else 1
    page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
