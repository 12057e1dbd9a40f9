"""Models by name, for `vtc explain` and `vtc bench`: with random weights, without a network."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtc.errors import OptionError, VTCError, first_line

FORMS = "dinov2-small, timm:NAME, open_clip:NAME or hf:FOLDER_OR_ID"
_LARGE = 1_000_000_000  # parameters above which a model is inspected, but gets no weights


class ModelError(VTCError, ValueError):
    """No model with that name can be made."""


@dataclass(frozen=True)
class Named:
    """A model, the side of the images it takes, and how to run it on a batch of them."""

    model: nn.Module
    size: int
    call: Callable[[nn.Module, Tensor], Any]

    @property
    def sketch(self) -> bool:
        """True if the model is too large to be given weights here: it can be explained, not run."""
        return any(parameter.is_meta for parameter in self.model.parameters())


def named(name: str, size: int | None = None, *, download: bool = False, weights: bool = False) -> Named:
    """The model that `name` stands for, in eval mode, on the CPU.

    Args:
        name: dinov2-small (with its real weights), timm:NAME, open_clip:NAME or hf:FOLDER_OR_ID (random weights).
        size: side of the images, if the model can be made for another size than its default.
        download: let Hugging Face download the configuration of a model that is not available locally.
        weights: use the trained weights, not random ones: from a folder, or with `download` from the Hub.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise OptionError(f"size={size!r}: it takes a positive number of pixels")
    if name == "dinov2-small":
        from vtc.checkpoints import dinov2_small

        return Named(dinov2_small(), size or 224, _plain)
    library, _, rest = name.partition(":")
    if not rest and (Path(name).is_dir() or name.count("/") == 1):
        library, rest = "hf", name
    makers = {"timm": _timm, "open_clip": _open_clip, "hf": _hf}
    if library not in makers or not rest:
        raise ModelError(f"unknown model {name!r}: give {FORMS}")
    with quiet(), torch.random.fork_rng(devices=[]):
        return _trained(library, rest, size, download) if weights else makers[library](rest, size, download)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings in the log: random weights are intended."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _timm(name: str, size: int | None, download: bool) -> Named:
    with _needs("timm"):
        import timm
    if not name.startswith(("hf_hub:", "hf-hub:")) and not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ModelError(f"timm has no model {name!r}{_hint(near)}")
    extra: dict[str, Any] = {} if size is None else {"img_size": size}
    model = _make(lambda: timm.create_model(name, pretrained=False, **extra), f"timm:{name}", size)
    own = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1]
    return Named(model, size or own, _plain)


def _open_clip(name: str, size: int | None, download: bool) -> Named:
    with _needs("open_clip"):
        import open_clip
    known = open_clip.list_models()
    if name not in known:
        raise ModelError(f"open_clip has no model {name!r}{_hint(difflib.get_close_matches(name, known, n=1))}")
    extra = {} if size is None else {"force_image_size": size}
    model = _make(lambda: open_clip.create_model(name, pretrained=None, **extra), f"open_clip:{name}", size)
    own = getattr(model.visual, "image_size", 224)
    return Named(model, own[0] if isinstance(own, (tuple, list)) else own, _encode_image)


def _hf(name: str, size: int | None, download: bool) -> Named:
    with _needs("transformers"):
        from transformers import AutoConfig, AutoModel
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=not download)
    except Exception as error:  # OSError, ValueError, or any error of the Hub's client
        way = "check the name" if download else "give a folder with a config.json, or add --download"
        raise ModelError(f"hf:{name}: no configuration found ({first_line(error)}); {way}") from error
    vision = getattr(config, "vision_config", None) or config
    if size is not None and hasattr(vision, "image_size"):
        vision.image_size = size
    model = _make(lambda: AutoModel.from_config(config), f"hf:{name}", size)
    own = getattr(vision, "image_size", None) or 224
    return Named(model, size or (own if isinstance(own, int) else own[0]), _hf_call)


def _trained(library: str, name: str, size: int | None, download: bool) -> Named:
    if library == "open_clip":
        raise ModelError(
            f"open_clip:{name}: which weights is not said here; in Python, vtc.bench.fidelity takes your own model"
        )
    if library == "timm":
        if not download:
            raise ModelError(f"timm:{name}: its trained weights come from the network: add --download")
        sketch = _timm(name, size, download)
        import timm

        model = _make(lambda: timm.create_model(name, pretrained=True), f"timm:{name}", size)
        return Named(model, sketch.size, _plain)
    sketch = _hf(name, size, download)
    from transformers import AutoModel

    model = _make(lambda: AutoModel.from_pretrained(name, local_files_only=not download), f"hf:{name}", size)
    return Named(model, sketch.size, _hf_call)


def _hf_call(model: Any, pixels: Tensor) -> Any:
    inner = getattr(model, "vision_model", model)  # CLIP and SigLIP also require text
    return inner(pixel_values=pixels)


def _encode_image(model: Any, pixels: Tensor) -> Any:
    return model.encode_image(pixels)


def _plain(model: nn.Module, pixels: Tensor) -> Any:
    return model(pixels)


def _make(make: Callable[[], nn.Module], name: str, size: int | None) -> nn.Module:
    """The model with random weights; one too large for that has none ("meta": it can be explained, not run)."""
    try:
        try:
            with torch.device("meta"):
                sketch = make()
            large = sum(p.numel() for p in sketch.parameters()) > _LARGE
        except Exception:  # not every library supports this
            large = False
        return (sketch if large else make()).eval()
    except Exception as error:
        way = "check the name" if size is None else "try it at its own size"
        raise ModelError(f"{name} cannot be made ({first_line(error)}); {way}") from error


class _needs:
    def __init__(self, library: str) -> None:
        self.library = library

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, ModuleNotFoundError) and error.name == self.library:
            extra = {"open_clip": "open-clip", "transformers": "hf"}.get(self.library, self.library)
            raise ModelError(f'{self.library} is not installed: pip install "vtc-torch[{extra}]"') from error


def _hint(near: list[str]) -> str:
    return f": did you mean {near[0]!r}?" if near else "; check the name"
