#!/usr/bin/env python3
"""Write vtc/assets/models.json, what `vtc.explain` says of every model that the tests build and of every name of the
registries, by every method; and docs/models.md of it.

`.venv/bin/python tools/support_matrix.py` writes both, `--check` fails if one is out of date (a test asks a sample).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DATA, PAGE = ROOT / "vtc" / "assets" / "models.json", ROOT / "docs" / "models.md"

Ways = Mapping[str, tuple[str, dict[str, Any]]]  # label -> method, options
Answers = dict[str, str]  # label -> the reason why not, or ""

HEAD = """# Models

Written by `tools/support_matrix.py` from the models that the tests build (`tests/zoo.py`, `tests/mllm_zoo.py`): every
"yes" is a model on which every promise of [the architecture](architecture.md#promises) is tested. The command
`vtc list-models WORD` prints what is known of the models with WORD in their name. Your own model: `vtc.explain(model)`,
or `vtc explain --model timm:vit_base_patch16_224`.

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

Through one generic family, with methods that read the tokens alone (`random`, `norm`,
`divprune`, `dpc_knn`, `tome`, `pitome`, `downsample` where an image's tokens fill a grid, `cdpruner`, and `idpruner`,
`scope`, `vispruner` with `importance="norm"`), and where the tower is described with those that read it.
Tiny models of these {count} model types, with real towers and pixels, give what their plain decoder gives on the tokens
that stay (`tests/test_mllm_classes.py`: one image, two, ragged batches, videos where the class has them; 1e-5 in
float32, 1e-4 for four whose values are large and 2e-4 to 5e-4 for five with linear attention, which adds in another
order when its chunks shift: `tests/classes_oracle.py`), on transformers 5.24:

{names}.

The same holds for `llava` with a Pixtral tower, whose family is LLaVA's own, with every method, and for
`granite4_vision`, which has a family of its own, with the methods that read the tokens alone.

What methods may read of the towers of these (`tests/test_mllm_evidence.py`: against the maps of eager attention in the
plain model, gradients and finite differences; of all others nothing, and methods that read them are refused by name):

{towers}

`positions="ppe"` goes with all of them whose decoder reads positions in its rotary table alone (not Ministral 3,
Mistral 4, Mistral Large 4, GLM5-Next, Qwen 4), and turns pairs of columns by one axis (not Hunyuan VL). `fastv`,
`dart`, `cascade=` and `proportional=True` go with decoders of full attention in every layer; windows, linear attention,
convolutions, indexed attention and caches that layers share are refused by name, and so are layers in front of
DeepStack's planes. `events=` needs videos that are told frame by frame.
Each against the plain decoder, in which nothing is taken out (`tests/test_mllm_between.py`).

Any other class is tried when it is compressed ([how](architecture.md#how-a-prompt-is-shortened)), and so are these on
older transformers, where what works between layers, PPE and `events=` stay refused. Refused are, of transformers'
image-text-to-text classes (encoders inside them may still be merged in):

"""
LLM_HEAD = """
## Multimodal LLMs

Where the decoder takes its image tokens in (`fastv`, `dart`: from a layer of the decoder on), on transformers 5.17 and
5.24, with sdpa and eager attention, in batches, with several images, with video where the family has it.
`where="tower"` is PiToMe and ToMe inside the vision tower. The last four rows go with the methods that merge
(`events=` with `dpc_knn`).

"""


# -- what is asked --------------------------------------------------------------------------------------------------


def encoder_ways() -> Ways:
    from vtc.methods import METHODS

    ways: dict[str, Any] = {name: (name, {}) for name, method in METHODS.items() if method.encoder}
    return ways | {'downsample, mode="resize"': ("downsample", {"mode": "resize"})}


def asked(model: Any, ways: Ways) -> Answers:
    import vtc

    plans = {label: vtc.explain(model, method, **options) for label, (method, options) in ways.items()}
    return {label: next((e.refusal for e in plan.encoders if e.refusal), "") for label, plan in plans.items()}


def models() -> dict[str, Any]:
    """All that is known: `models`, which `vtc list-models` prints, and `matrix`, the encoders of the tests."""
    from zoo import ZOO, model

    versions = {library: record["version"] for library, record in _registries().items()}
    matrix = {name: asked(model(name), encoder_ways()) for name in ZOO}
    return {"versions": versions, "models": [*multimodal(), *encoders()], "matrix": matrix}


def encoders() -> list[dict[str, Any]]:
    """A row for every class of the registries whose names are answered alike."""
    rows: dict[tuple, dict[str, Any]] = {}
    for library, record in _registries().items():
        for found in record["answers"].values():
            if found["verdict"] in ("multimodal", "not built"):
                continue
            supported = found["verdict"] == "supported"
            methods: Answers = found["methods"] if supported else {}
            reason = "" if supported else found["verdict"]
            row = {"kind": "encoder", "library": library, "class": found["kind"], "names": [], "reason": reason}
            key = (library, found["kind"], reason, *methods.items())
            rows.setdefault(key, {**row, "methods": methods})["names"] += found["names"]
    return list(rows.values())


def multimodal(step: int = 1) -> list[dict[str, Any]]:
    """A row for every tiny multimodal LLM of the tests, or for every `step`th."""
    import mllm_classes
    import mllm_zoo
    from mllm_classes import others

    import vtc
    from vtc.methods import METHODS

    ways: dict[str, Any] = {
        name: (name, {"keep": 0.5 if cls.budgeted else 1.0}) for name, cls in METHODS.items() if not cls.rectangle
    }
    ways |= {f'{name}, where="tower"': (name, {"keep": 0.9, "where": "tower"}) for name in ("pitome", "tome")}
    ways |= {"PPE (`positions=`)": ("dpc_knn", {"keep": 0.5, "positions": "ppe"})}
    ways |= {"`cascade=`": ("dpc_knn", {"keep": 0.5, "cascade": {2: 0.5}})}
    ways |= {"`proportional=True`": ("dpc_knn", {"keep": 0.5, "proportional": True})}
    ways |= {"`events=`": ("dpc_knn", {"keep": 0.5, "events": 0.5})}
    rows = []
    kinds = (
        ("mllm_zoo", mllm_zoo.FAMILIES, mllm_zoo.build),
        ("mllm_classes", mllm_classes.CLASSES, mllm_classes.build),
        ("mllm_retrievers", mllm_zoo.RETRIEVERS, mllm_zoo.retriever),
    )
    for tests, names, build in kinds:
        for name in list(names)[::step]:
            model = build(name)
            plan = vtc.explain(model)
            row = {"kind": "multimodal", "library": "transformers", "class": type(model).__name__, "names": [name]}
            row |= {"type": model.config.model_type, "tests": tests, "reason": "", "methods": {}}
            if plan.ok:
                modalities = {modality.name for modality in plan._sites[0].family.modalities}
                row["video"] = "video" in modalities and tests != "mllm_retrievers"
                row["methods"] = asked(model, ways)
            else:
                row["reason"] = plan.encoders[0].refusal
            rows.append(row)
    return [*rows, *map(sketched, list(others.REFUSED)[::step])]


def sketched(name: str) -> dict[str, Any]:
    """The row of a class that no tiny model is made of."""
    from mllm_classes import others

    import vtc

    plan = vtc.explain(others.sketch(name), "divprune", keep=0.5)
    row = {"kind": "multimodal", "library": "transformers", "class": others.CLASSES[name], "names": [name]}
    reason = "it holds no vision encoder that vtc knows"
    for part in plan.encoders[:1]:  # where it is a part of the model that is refused, which
        reason = str(part) if part.path else part.refusal
    return row | {"type": name, "tests": others.__name__, "reason": reason, "methods": {}}


def written(data: Mapping[str, Any]) -> str:
    """The file's text, a model to a line."""
    parts = [f' "versions": {json.dumps(data["versions"])}']
    parts.append(' "models": [\n  ' + ",\n  ".join(map(json.dumps, data["models"])) + "\n ]")
    lines = (f"{json.dumps(name)}: {json.dumps(answers)}" for name, answers in data["matrix"].items())
    parts.append(' "matrix": {\n  ' + ",\n  ".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _registries() -> dict[str, dict[str, Any]]:
    """The answers that `make registry` wrote."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("registry-*.json"), reverse=True)
    return {path.stem.partition("-")[2]: json.loads(path.read_text()) for path in paths}


# -- the page -------------------------------------------------------------------------------------------------------


def page(data: Mapping[str, Any]) -> str:
    """docs/models.md."""
    import vtc

    covers = [f"- **{name}**: {families}" for name, families in vtc.list_adapters().items()]
    llms = {row["names"][0]: row["methods"] for row in data["models"] if row.get("tests") == "mllm_zoo"}
    text = HEAD + "\n".join(covers) + "\n\n" + matrix("encoder", data["matrix"])
    across = {label: {name: answers[label] for name, answers in llms.items()} for label in next(iter(llms.values()))}
    return text + registry() + LLM_HEAD + matrix("method", across) + more(data["models"])


_TOLD = {
    "attention near its end": "attention",
    "attention in its middle": "middle",
    "keys": "keys",
    "the projector and its inputs": "projector",
}


def matrix(corner: str, rows: Mapping[str, Answers]) -> str:
    """A table of yes and no, and the reasons below it."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    notes: list[str] = []
    for label, answers in rows.items():
        cells = []
        for reason in answers.values():
            reason = re.sub(r'^(where|mode)="\w+": |; (where|mode)="\w+" works$', "", reason)
            if reason and reason not in notes:
                notes.append(reason)
            cells.append(f"no ({notes.index(reason) + 1})" if reason else "yes")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(notes, 1))]) + "\n"


def more(rows: list[dict[str, Any]]) -> str:
    """What the generic family takes, and what not."""
    from vtc.adapters.multimodal.families import FAMILIES
    from vtc.adapters.multimodal.families.towers import TOWERS

    own = {row["type"] for row in rows if row.get("tests") == "mllm_zoo"} | set(FAMILIES)
    types = {row["type"] for row in rows if row.get("tests") == "mllm_classes" and not row["reason"]} - own
    names = ", ".join(f"`{name}`" for name in sorted(types))
    by: dict[str, list[str]] = {}
    for name, tower in sorted(TOWERS.items()):
        told = [words for words, field in _TOLD.items() if field in tower.evidence]
        by.setdefault(", ".join(told) or "nothing", []).append(f"`{name}`")
    towers = "\n".join(f"- {told}: {', '.join(those)}" for told, those in by.items())
    why = {row["type"]: row["reason"] for row in rows if row["kind"] == "multimodal" and row["reason"]}
    refused = "\n".join(f"- `{name}`: {reason}" for name, reason in sorted(why.items()))
    return MORE_HEAD.format(count=len(types), names=names, towers=towers) + refused + "\n"


def registry() -> str:
    """The registries: names by verdict, and the classes behind them."""
    records = _registries()
    counts: dict[str, dict[str, int]] = {}
    kinds: dict[str, dict[str, int]] = {}
    for library, record in records.items():
        for found in record["answers"].values():
            verdict = _short(found["verdict"])
            names = len(found["names"])
            counts.setdefault(verdict, dict.fromkeys(records, 0))[library] += names
            kind = kinds.setdefault(verdict, {})
            kind[found["kind"]] = kind.get(found["kind"], 0) + names
    unasked = [verdict for verdict in ("multimodal", "not built") if verdict in counts]
    order = sorted(set(counts) - {"supported", *unasked}, key=lambda v: (-sum(counts[v].values()), v))
    lines = ["| | " + " | ".join(records) + " | of these kinds |", "|---" * (len(records) + 2) + "|"]
    for verdict in [v for v in ("supported",) if v in counts] + order + unasked:
        most = sorted(kinds[verdict], key=lambda kind: (-kinds[verdict][kind], kind))
        listed = most if verdict == "supported" else most[:8]
        told = ", ".join(listed) + (f" and {len(most) - len(listed)} more" if len(most) > len(listed) else "")
        label = {"supported": "**supported**", "not built": "needs another package, or does not build by default"}
        row = [label.get(verdict, verdict), *(str(n or "") for n in counts[verdict].values()), told]
        lines.append("| " + " | ".join(row) + " |")
    total = [sum(counts[v][library] for v in counts) for library in records]
    total = [f"{n} of {record['names']}" for n, record in zip(total, records.values(), strict=True)]
    lines.append("| names asked | " + " | ".join(total) + " | |")
    versions = " and ".join(f"{library} {record['version']}" for library, record in records.items())
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


def main() -> int:
    data = models()
    texts = {DATA: written(data), PAGE: page(data)}
    if "--check" in sys.argv:
        return 0 if all(path.exists() and path.read_text() == text for path, text in texts.items()) else 1
    for path, text in texts.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
