"""One file per published method. `METHODS` is the registry: name -> class; `vtc` exports what `__all__` names here."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from vtc.errors import OptionError
from vtc.methods.base import Method as Method
from vtc.methods.cdpruner import CDPruner
from vtc.methods.cubist_merge import CubistMerge
from vtc.methods.dart import DART
from vtc.methods.divprune import DivPrune
from vtc.methods.downsample import Downsample
from vtc.methods.dpc_knn import DPCKNN
from vtc.methods.evs import EVS
from vtc.methods.fastv import FastV
from vtc.methods.flashvid import FlashVID
from vtc.methods.frame import USUAL
from vtc.methods.hiprune import HiPrune
from vtc.methods.holov import HoloV
from vtc.methods.idpruner import IDPruner
from vtc.methods.mmtok import MMTok
from vtc.methods.norm import Norm
from vtc.methods.pitome import PiToMe
from vtc.methods.pixelprune import PixelPrune
from vtc.methods.random import Random
from vtc.methods.scope import SCOPE
from vtc.methods.tome import ToMe
from vtc.methods.vidcom2 import VidCom2
from vtc.methods.visionzip import VisionZip
from vtc.methods.vispruner import VisPruner
from vtc.methods.zoo_prune import ZOOPrune
from vtc.tokens import Tokens as Tokens

_MATCHING = (PiToMe, ToMe)
_AT_THE_INPUT = (IDPruner, ZOOPrune, DivPrune, CDPruner, SCOPE, MMTok, VisPruner, HiPrune, HoloV, VisionZip, DPCKNN)
_OVER_VIDEOS = (FlashVID, VidCom2, EVS)
_BEFORE_THE_TOWER = (PixelPrune,)
_IN_THE_DECODER = (FastV, DART)
_IN_WINDOWS = (CubistMerge,)
_BASELINES = (Norm, Random, Downsample)

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for group in (_MATCHING, _AT_THE_INPUT, _OVER_VIDEOS, _BEFORE_THE_TOWER, _IN_THE_DECODER, _IN_WINDOWS, _BASELINES)
    for cls in group
}

# What may follow a name and a +: options of methods that merge, of methods that select, for videos, of both.
PLUS: dict[str, dict[str, Any]] = {
    "ppe": {"positions": "ppe"},
    "proportional": {"proportional": True},
    "frame": {"frame": USUAL},
    "shares": {"shares": "uniqueness"},
    "pixelprune": {"before": PixelPrune()},
}
_WITH_A_VALUE = ("frame", "shares", "pixelprune")  # the share, the score, the tolerance

# Option names of other libraries that mean the opposite, or something else.
_ALIASES = ("ratio", "compression_ratio", "pruning_ratio", "prune_ratio", "rate", "keep_ratio", "reduction")


def budgeted(name: str) -> bool:
    """Whether a method takes a budget. An unknown name counts as one that does: `make` says what is wrong with it."""
    return name not in METHODS or METHODS[name].budgeted


def make(method: str | Method, **options: Any) -> Method:
    """A method from its name and options; a ready one is returned as it is. "tome+ppe" is "tome" with positions="ppe",
    "tome+proportional" with proportional=True, "divprune+frame=0.25" with frame=0.25, "divprune+shares=change" with
    shares="change", "divprune+pixelprune" with before=PixelPrune(). Raises OptionError, with a message that says what
    to do."""
    if isinstance(method, Method):
        if options:
            raise OptionError(
                f"{', '.join(options)} given beside a ready method: put the options into "
                f"{type(method).__name__}(...) instead"
            )
        return method
    if not isinstance(method, str):
        raise OptionError(f"method={method!r}: it takes a name or a method such as vtc.PiToMe(keep=0.9)")
    method, *plus = method.split("+")
    if method == "auto":
        raise OptionError(
            'method "auto" is chosen by measuring: vtc.compress(model, "auto", keep="auto", inputs=..., and one of '
            "ttft=, tokens=, fidelity=); with a budget of your own, name the method"
        )
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(f"unknown method {method!r}: {hint}choose one of {', '.join(METHODS)}")
    for each in plus:
        option, equals, value = each.partition("=")
        if option not in PLUS or (equals and option not in _WITH_A_VALUE):
            raise OptionError(
                f"{method}+{each}: after a + comes one of {', '.join(PLUS)}, or frame=0.25, shares=change and the like"
            )
        if PLUS[option].keys() & options:
            there = ", ".join(PLUS[option])
            raise OptionError(f"{method}+{each}: {there}= is given beside it, leave one of the two out")
        if equals and option == "pixelprune":
            options["before"] = PixelPrune(tolerance=_number(value))  # type: ignore[arg-type]
        else:
            options |= {option: _number(value)} if equals else PLUS[option]
    known = [field.name for field in fields(METHODS[method])]
    for name in options:
        if name not in known:
            alias = " (use keep=, which says what stays)" if name in _ALIASES else ""
            raise OptionError(f"{method} has no option {name!r}{alias}; it has {', '.join(known)}")
    return METHODS[method](**options)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


__all__ = [
    "DART",
    "DPCKNN",
    "EVS",
    "SCOPE",
    "CDPruner",
    "CubistMerge",
    "DivPrune",
    "Downsample",
    "FastV",
    "FlashVID",
    "HiPrune",
    "HoloV",
    "IDPruner",
    "MMTok",
    "Norm",
    "PiToMe",
    "PixelPrune",
    "Random",
    "ToMe",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "ZOOPrune",
]
