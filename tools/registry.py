#!/usr/bin/env python3
"""`vtc.explain` over the whole registries of timm, open_clip and transformers: make registry.

Every name of timm, every configuration of open_clip and every vision class of transformers is built on the meta device
and explained. Names that build the same kind of model in other sizes are one case. Where something would be reduced, a
small one with random weights must get the same verdict, run bit-identical at keep=1.0, and keep the shape of its output
with fewer tokens; where not, `compress` must refuse with the same words. Nothing may raise anything else.

The answers go into benchmarks/results/registry-LIBRARY.json, from which tools/support_matrix.py writes its table and
the data of `vtc list-models`. A run that was stopped goes on where it was; `--fresh` asks everything again.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from support_matrix import asked, encoder_ways  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
_LARGE = 500_000_000  # parameters of two layers; none is
SIZES = {  # of a model, not its kind
    *("embed_dim", "depth", "num_heads", "img_size", "patch_size", "mlp_ratio", "num_classes", "pretrained_cfg"),
    *("pretrained_strict", "pretrained_cfg_overlay", "feature_cfg", "cache_dir"),
}


@dataclass(frozen=True)
class Case:
    """One kind of model, and how to make a small one."""

    library: str
    kind: str
    names: tuple[str, ...]
    build: Callable[[], nn.Module]


# -- what there is --------------------------------------------------------------------------------------------------


class _Captured(Exception):
    """What timm was about to build."""


def timm_cases() -> Iterator[Case]:
    """Names whose constructors get the same arguments, but for sizes, are one case."""
    import timm

    def capture(cls: type, variant: str, pretrained: bool = False, **kwargs: Any) -> None:
        raise _Captured(cls, kwargs)

    groups: dict[tuple, list[tuple[str, type, dict]]] = {}
    modules = [m for n, m in sys.modules.items() if n.startswith("timm.models.") and hasattr(m, "build_model_with_cfg")]
    kept = [module.build_model_with_cfg for module in modules]
    for module in modules:
        module.build_model_with_cfg = capture
    try:
        for name in timm.list_models():
            if not timm.models.model_entrypoint(name).__module__.startswith("timm."):  # somebody's own
                continue
            try:
                timm.create_model(name)
            except _Captured as found:
                cls, kwargs = found.args
                groups.setdefault((cls.__name__, _form(kwargs)), []).append((name, cls, kwargs))
    finally:
        for module, build in zip(modules, kept, strict=True):
            module.build_model_with_cfg = build
    for (kind, _), members in groups.items():
        names = tuple(name for name, *_ in members)
        small = min(members, key=lambda member: _size(member[2]))
        patch = small[2].get("patch_size")
        side = 6 * patch if isinstance(patch, int) else 112 if patch is None else 224  # not told, it is 14 or 16
        depth = {"depth": 2} if isinstance(small[2].get("depth", 12), int) else {}
        narrow = {**depth, "img_size": side, "embed_dim": 96, "num_heads": 4}
        tries = [narrow, {**narrow, "num_kv_heads": 2}, depth, {}]
        if not hasattr(small[1], "blocks") and "embed_dim" not in inspect.signature(small[1].__init__).parameters:
            tries = [{}]

        def build(name: str = small[0], tries: list[dict] = tries, small: tuple = small) -> nn.Module:
            if is_dataclass(cfg := small[2].get("cfg")):  # all sizes are in it
                return small[1](replace(cfg, depth=2))
            for sizes in tries[:-1]:
                with contextlib.suppress(Exception):  # its entry point knows no such size
                    return timm.create_model(name, **sizes)
            return timm.create_model(name, **tries[-1])

        yield Case("timm", kind, names, build)


def _form(kwargs: dict) -> tuple:
    return tuple(sorted((k, _plain(v)) for k, v in kwargs.items() if k not in SIZES and _plain(v)))


def _plain(value: Any) -> str:
    """What of an argument says which kind of model is built: numbers do not."""
    if isinstance(value, dict):
        return str(_form(value))
    if isinstance(value, (list, tuple)):
        return str(sorted({_plain(item) for item in value} - {""}))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return ""
    func = getattr(value, "func", value)  # functools.partial
    return getattr(func, "__name__", re.sub(r"[\d.]+", "", str(func)))


def _size(kwargs: dict) -> int:
    width = kwargs.get("embed_dim", 768)
    return width if isinstance(width, int) else 0


def open_clip_cases() -> Iterator[Case]:
    """The vision towers; the text towers of some need the network, and vtc leaves them alone."""
    import open_clip
    import timm

    groups: dict[tuple, list[tuple[str, dict, int]]] = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        key = vision.get("timm_model_name") or (_form(vision), isinstance(vision.get("layers"), list))
        groups.setdefault((key,), []).append((name, vision, config["embed_dim"]))
    for members in groups.values():
        _, vision, embed = min(members, key=lambda member: member[1].get("width", 768))
        if isinstance(vision.get("layers"), int):
            vision = {**vision, "layers": 2}
        if "timm_model_name" in vision:
            vision = {**vision, "timm_model_pretrained": False}

        def build(vision: dict = vision, embed: int = embed) -> nn.Module:
            from open_clip.model import _build_vision_tower

            holder, create = nn.Module(), timm.create_model

            def shallow(*args: Any, **kwargs: Any) -> nn.Module:
                with contextlib.suppress(Exception):  # its entry point knows no depth
                    return create(*args, **kwargs, depth=2)
                return create(*args, **kwargs)

            with mock.patch.object(timm, "create_model", shallow):
                holder.visual = _build_vision_tower(embed, vision)
            return holder

        kind = "timm trunk" if "timm_model_name" in vision else "VisionTransformer"
        if isinstance(vision.get("layers"), list):
            kind = "ModifiedResNet"
        yield Case("open_clip", kind, tuple(name for name, *_ in members), build)


def transformers_cases(names: Sequence[str] = ()) -> Iterator[Case]:
    """Every model class that takes pixels (or those called `names`) and is no multimodal LLM, with the configuration it
    comes with, two layers deep."""
    import transformers
    from transformers import GenerationMixin, PreTrainedModel

    for name in names or sorted(dir(transformers)):
        if name.endswith("PreTrainedModel"):
            continue
        try:
            cls = getattr(transformers, name)
        except Exception:  # needs a package that is not here
            continue
        if not (inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.config_class is not None):
            continue
        if issubclass(cls, GenerationMixin) or hasattr(cls, "get_placeholder_mask"):
            continue  # multimodal LLMs have a table of their own
        named = cls.main_input_name
        named = (named,) if isinstance(named, str) else tuple(named)
        if not any(n.startswith("pixel_values") for n in (*named, *inspect.signature(cls.forward).parameters)):
            continue

        def build(cls: type = cls) -> nn.Module:
            return cls(_shallow(cls.config_class()))

        yield Case("transformers", name, (name,), build)


def _shallow(config: Any, layers: int = 2) -> Any:
    if hasattr(config, "stage_names"):  # a backbone names the layers it gives out, when it is made
        with contextlib.suppress(Exception):
            return type(config)(num_hidden_layers=layers) if hasattr(config, "num_hidden_layers") else config
        return config
    for name in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"):
        if isinstance(getattr(config, name, None), int) and getattr(config, name) > layers:
            with contextlib.suppress(Exception):  # derived from something else
                setattr(config, name, layers)
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:layers])
    for part in vars(config).values():
        if hasattr(part, "to_dict") and part is not config:
            _shallow(part, layers)
    return config


CASES = {"timm": timm_cases, "open_clip": open_clip_cases, "transformers": transformers_cases}

# -- what vtc says of it --------------------------------------------------------------------------------------------


class _Broken(Exception):
    """The model itself does not run."""


def answer(case: Case) -> dict[str, Any]:
    """{kind, names, verdict, wrong}: "supported" or the reason; what does not hold, or "". Where it is supported also
    `methods`: what each of them says."""
    record: dict[str, Any] = {"kind": case.kind, "names": list(case.names), "wrong": ""}
    try:
        with torch.device("meta"):
            model = case.build()
    except Exception as error:
        return {**record, "verdict": "not built", "wrong": "", "note": f"{type(error).__name__}: {error}"[:200]}
    import vtc
    from vtc.adapters.multimodal.find import find as find_llms

    try:
        if any(True for _ in find_llms(model)):
            return {**record, "verdict": "multimodal"}
        plan = vtc.explain(model)
        if plan.ok:
            methods = asked(model, encoder_ways())
            return {**record, "verdict": "supported", "methods": methods, "wrong": _runs(case, plan)}
        verdict = "; ".join(encoder.refusal for encoder in plan.encoders if encoder.refusal) or "no vision encoder"
        return {**record, "verdict": verdict, "wrong": _refuses(model, plan)}
    except _Broken as error:
        return {**record, "verdict": "not built", "note": str(error)[:200]}
    except Exception as error:
        return {**record, "verdict": "raw exception", "wrong": f"{type(error).__name__}: {error}"[:300]}


def _refuses(model: nn.Module, plan: Any) -> str:
    """On meta, and on weights where they are few."""
    import vtc

    try:
        vtc.compress(model, "tome", keep=0.9)
        return "compress did not refuse"
    except vtc.UnsupportedModelError as error:
        told = str(error)
    return "" if all(encoder.refusal in told for encoder in plan.encoders if encoder.refusal) else f"compress: {told}"


@torch.no_grad()
def _runs(case: Case, plan: Any) -> str:
    """The same on weights: the verdict, keep=1.0 to the bit, and fewer tokens inside an output of the same shape."""
    import vtc
    from vtc.adapters.encoders.site import EncoderSite

    for site in plan._sites:
        assert isinstance(site, EncoderSite) and site.encoder is not None
        if sum(parameter.numel() for parameter in site.encoder.parameters()) > _LARGE:
            return "too large to be given weights"
        encoder = _filled(case, site)
        real = vtc.explain(encoder)
        if not real.ok:
            return f"on weights: {real}"
        found = real._sites[0]
        image = {"generator": torch.Generator().manual_seed(0)}

        def run(encoder: nn.Module = encoder, found: Any = found, image: dict = image) -> torch.Tensor:
            torch.manual_seed(0)  # some shuffle the patches
            return _tensor(_probed(found, encoder))

        try:
            dense = run()
        except Exception as error:  # its configuration, shortened to two layers, does not fit together
            raise _Broken(f"{type(error).__name__}: {error}") from error
        with vtc.compress(encoder, "tome", keep=1.0):
            if not torch.equal(run(), dense):
                return "keep=1.0 is not the model"
        with vtc.compress(encoder, "tome", keep=0.7) as handle:
            out = run()
            if out.shape != dense.shape or not out.isfinite().all():
                return f"keep=0.7: {list(out.shape)} of {list(dense.shape)}"
            if handle.report.after[0] >= handle.report.before[0] or torch.equal(out, dense):
                return "keep=0.7 reduces nothing"
    return ""


def _filled(case: Case, site: Any) -> nn.Module:
    """A model with weights: of transformers the encoder alone, others as they are."""
    if case.library == "transformers" and hasattr(site.encoder, "config"):
        with contextlib.suppress(TypeError):
            return _drawn(type(site.encoder)(site.encoder.config))
    if case.library == "transformers":  # what it draws besides the encoder may be a language model, and large
        with mock.patch("transformers.PreTrainedModel.init_weights"):
            return _drawn(case.build())
    return _drawn(case.build())


def _drawn(model: nn.Module) -> nn.Module:
    """LayerScales and the like may start at 0, where nothing shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.2, 0.6, generator=generator)
    return model.eval()


def _probed(site: Any, encoder: nn.Module) -> Any:
    """The site's own probe, with numbers in place of shapes."""
    shapes: list[Any] = []

    class Recorder(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> None:
            shapes.append((args, kwargs))

        forward_features = forward

    site.probe(Recorder())
    args, kwargs = shapes[0]
    generator = torch.Generator().manual_seed(1)

    def real(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_meta:
            return torch.randn(value.shape, generator=generator)
        return value

    call = site.encoder.forward_features if hasattr(site.encoder, "forward_features") else site.encoder
    return call(*map(real, args), **{k: real(v) for k, v in kwargs.items()})


def _tensor(out: Any) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    values = out.values() if isinstance(out, dict) else out
    return next(_tensor(value) for value in values if isinstance(value, (torch.Tensor, tuple, list, dict)))


# -- the run --------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="What vtc says of every model that three libraries can name.")
    parser.add_argument("libraries", nargs="*", choices=[*CASES, []], help="all, if none is given")
    parser.add_argument("--fresh", action="store_true", help="ask again what has been answered")
    args = parser.parse_args()
    from tqdm import tqdm

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    wrong = 0
    for library in args.libraries or list(CASES):
        for key, record in _library(library, tqdm, args.fresh).items():
            if record["wrong"]:
                wrong += 1
                tqdm.write(f"{key}: {record['wrong']}")
    return 1 if wrong else 0


def _library(library: str, tqdm: Any, fresh: bool) -> dict[str, dict]:
    """The answers for one library, written as they come."""
    path = RESULTS / f"registry-{library}.json"
    version = metadata.version({"open_clip": "open_clip_torch"}.get(library, library))
    old = json.loads(path.read_text()) if path.exists() and not fresh else {"answers": {}}
    known = old["answers"] if old.get("version") == version else {}
    answers: dict[str, dict] = {}
    cases = list(CASES[library]())
    head = {"version": version, "names": sum(len(case.names) for case in cases)}
    for case in (bar := tqdm(cases, desc=library)):
        bar.set_postfix_str(case.names[0][:40])
        done = known.get(case.names[0])
        with contextlib.redirect_stdout(io.StringIO()):
            if done is None or done["wrong"] or done["names"] != list(case.names):
                done = answer(case)
            elif done["verdict"] == "supported" and list(done.get("methods", ())) != list(encoder_ways()):
                with torch.device("meta"):
                    model = case.build()
                methods = asked(model, encoder_ways())
                done = {**done, "methods": methods} if "" in methods.values() else answer(case)
        answers[case.names[0]] = done
        path.write_text(json.dumps({**head, "answers": {**known, **answers}}, indent=1) + "\n")
    path.write_text(json.dumps({**head, "answers": answers}, indent=1) + "\n")
    return answers


if __name__ == "__main__":
    sys.exit(main())
