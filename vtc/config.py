"""Methods as JSON: without code, versioned; unknown keys are dropped with a warning."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from vtc.errors import OptionError
from vtc.methods import METHODS, Method, PixelPrune, make
from vtc.version import __version__

if TYPE_CHECKING:
    from vtc.handle import Handle

FORMAT = 1
_logger = logging.getLogger(__name__)


def save_config(source: Handle | Method, path: str | Path) -> None:
    """Write a method, or the method of a handle, to a JSON file. Refuses to overwrite any file that is not a vtc
    config."""
    method = source if isinstance(source, Method) else getattr(source, "method", None)
    if not isinstance(method, Method):
        raise OptionError(f"{source!r} is neither a handle nor a method, so there is nothing to save")
    target = Path(path)
    if target.exists() and _read(target).get("vtc_config") is None:
        raise OptionError(f"{target} exists and is no vtc config: choose another name")
    data = {"vtc_config": FORMAT, "vtc_version": __version__, "method": method.name, "options": method.options()}
    try:
        target.write_text(json.dumps(data, indent=2, default=asdict) + "\n")
    except OSError as error:
        raise OptionError(f"{target} cannot be written: {error.strerror}") from None


def load_config(path: str | Path) -> Method:
    """Read a method that `save_config` wrote. Unknown options are dropped with a warning; a newer format raises."""
    data = _read(Path(path))
    if not isinstance(data.get("vtc_config"), int) or not isinstance(data.get("options"), dict):
        raise OptionError(f"{path} is no vtc config: vtc.save_config writes them")
    if data["vtc_config"] > FORMAT:
        raise OptionError(f"{path} was written by vtc {data.get('vtc_version')}, in a newer format: update vtc")
    name = str(data.get("method"))
    before = data["options"].get("before")
    if isinstance(before, dict):  # a method's own options, all of them
        data["options"]["before"] = make("pixelprune", **{k: v for k, v in before.items() if k in _names(PixelPrune)})
    known = _names(METHODS[name]) if name in METHODS else set()
    for option in sorted(set(data["options"]) - known) if known else ():
        _logger.warning("%s: option %r of %s is unknown to this version and was dropped", path, option, name)
    return make(name, **{k: v for k, v in data["options"].items() if k in known or not known})


def _names(cls: type[Method]) -> set[str]:
    return {f.name for f in fields(cls)}


def _read(path: Path) -> dict:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read as a vtc config: {error}") from None
    return data if isinstance(data, dict) else {}
