"""What is served: a method, its budget and the positions of the tokens that stay, and how processes are told."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import Any

from vtc.budget import Budget
from vtc.errors import OptionError
from vtc.methods import Method, make

VARIABLE = "VTC_VLLM"  # vLLM's processes are told by the environment alone
POSITIONS = ("keep", "compact")
_WAY_OUT = 'use divprune, dpc_knn, tome, pitome, norm, random or downsample, or importance="norm"'


@dataclass(frozen=True)
class Settings:
    """What a server does with its images.

    Args:
        method: with the budget of a request that names none.
        positions: of the tokens that stay. "keep": those they had in the whole image; "compact": as if the others had
            never been there.

    Raises:
        OptionError: the method cannot run in vLLM, with the reason.
    """

    method: Method
    positions: str = "keep"

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            why = ": vLLM gives a token one position on each axis, and PPE several" if self.positions == "ppe" else ""
            raise OptionError(f'positions={self.positions!r}{why}: in vLLM it takes "keep" or "compact"')
        reason = refusal(self.method)
        if reason:
            raise OptionError(f"vLLM cannot run {self.method.name} so: {reason}: {_WAY_OUT}")

    def of_request(self, given: Any) -> Settings:
        """The settings of a request that passes `given` as mm_processor_kwargs["vtc"]. Raises OptionError."""
        if given is None:
            return self
        if not isinstance(given, dict) or set(given) != {"keep"}:
            raise OptionError(f'vtc={given!r}: a request gives its budget and nothing else, such as {{"keep": 0.5}}')
        try:
            Budget(keep=_all(given["keep"]))
        except OptionError as error:
            raise OptionError(f"vtc: {error}") from None
        return replace(self, method=replace(self.method, keep=_all(given["keep"])))

    def text(self) -> str:
        """What `read` reads."""
        return json.dumps({"method": self.method.name, **self.method.options(), "positions": self.positions})


def refusal(method: Method) -> str:
    """Why vLLM cannot run the method; "" = it can."""
    if method.rectangle:
        return f"{method.name} works in vision encoders with windows alone (SAM, ViTDet)"
    if method.in_decoder or method.cascade:
        what = method.name if method.in_decoder else "cascade="
        return f"{what} removes tokens between the decoder's layers, and vLLM's KV cache has one length for all of them"
    if method.entrance is not None:
        return "pixelprune takes patches out before the tower, and vLLM runs it on whole images"
    if method.proportional:
        return "proportional=True adds a bias to the logits of merged keys, and vLLM's attention takes none"
    if method.ppe:
        return f"positions={method.positions!r} gives a token several positions, and vLLM holds one on each axis"
    if method.where == "tower":
        return 'where="tower" reduces inside the vision tower, and vLLM counts tokens before it has encoded an image'
    if method.pooled:
        return "pooled=True lets images share a budget, and vLLM encodes and caches each image alone"
    if method.resizes:
        return 'mode="resize" shrinks the image itself, which the processor\'s own limits do: give mm_processor_kwargs'
    if method.shares is not None:
        return "shares= is for the frames of videos, and vtc leaves videos to vLLM"
    if method.keep is None:
        return "r= and flops= are for the layers of an encoder: give keep="
    if method.turned:
        return 'frame="rotary" reads the positions of the prompt, and vLLM caches each image for every prompt'
    if "text" in method.needs - method.optional:
        return f"{method.name} reads the question, and vLLM caches what it made of an image for every question"
    return method.lacks("served")


def read(text: str) -> Settings:
    """Settings from `NAME:keep=0.25,OPTION=VALUE`, or from a JSON object with "method" and its options; "positions" is
    one of `POSITIONS`. In the short form 1 means 1.0, as on the command line.

    Raises:
        OptionError: it is neither, or one of the options is wrong.
    """
    try:
        options = json.loads(text) if text.lstrip().startswith("{") else _short(text)
        name, positions = options.pop("method"), options.pop("positions", "keep")
    except (ValueError, KeyError):
        raise OptionError(
            f"{VARIABLE}={text!r}: it takes METHOD:keep=0.25, or a JSON object such as "
            '{"method": "divprune", "keep": 0.25}'
        ) from None
    try:
        return Settings(make(name, **options), positions)
    except OptionError as error:
        raise OptionError(f"{VARIABLE}: {error}") from None


def _short(text: str) -> dict[str, Any]:
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {"method": name.strip()}
    for pair in filter(None, (part.strip() for part in rest.split(","))):
        option, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(pair)
        options[option.strip()] = _value(value.strip())
    if "keep" in options:
        options["keep"] = _all(options["keep"])
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _all(keep: Any) -> Any:
    """1 means 1.0 where no type can be told: on a command line, and in JSON that was not written by Python."""
    return 1.0 if type(keep) is int and keep == 1 else keep


def configured() -> Settings | None:
    """The settings in the environment; None = vtc is not to do anything. Raises OptionError."""
    text = os.environ.get(VARIABLE, "")
    return read(text) if text.strip() else None
