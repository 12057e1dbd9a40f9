"""A model with its weights and a folder of the user's own pictures, ready for measuring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vtc.bench.fidelity import (
    fitting,
)
from vtc.errors import OptionError
from vtc.methods import make

MOST = 32  # maximum number of pictures from a folder


@dataclass(frozen=True)
class Opened:
    """What `vtc bench --self-check` measures. `methods`, `budgets`: defaults if none are given; `budget`: the option
    that budgets are given as."""

    model: nn.Module
    inputs: list[Any]
    call: Callable[[nn.Module, Any], Any] | None
    methods: list[str]
    budgets: list[float]
    budget: str


def opened(name: str, folder: str, prompt: str | None, size: int | None, *, download: bool = False) -> Opened:
    """A model with its weights, and at most 32 pictures of a folder, sorted by name, as the model's inputs.

    Raises:
        OptionError: no such folder, or no picture in it; an option for the other kind of model.
        ModelError, ChatError: there is no such model, or its weights are not available.
        ImageError: a picture that cannot be read.
    """
    from vtc.models.configs import find_config
    from vtc.models.encoders import named
    from vtc.models.images import load_image, preprocess

    where = Path(folder)
    if not where.is_dir():
        raise OptionError(f"--images {folder}: no such folder")
    endings = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
    paths = sorted(path for path in where.iterdir() if path.suffix.lower() in endings)[:MOST]
    if not paths:
        raise OptionError(f"--images {folder}: no picture in it ({', '.join(endings)})")
    pictures = [load_image(path) for path in paths]
    if find_config(name, download=download) is not None:
        from vtc.models.llms import build_inputs, load, prepared

        if size is not None:
            raise OptionError("--size is for encoders: the processor of a multimodal LLM decides on its own")
        processor, make_model = load(name, make("random", keep=0.5))
        asked, model = prompt or "Describe this image.", make_model()
        return Opened(
            model,
            [prepared(model, build_inputs(processor, [picture], asked)) for picture in pictures],
            None,
            fitting(model),
            [0.5, 0.25, 0.1],
            "keep",
        )
    if prompt is not None:
        raise OptionError("--prompt is for multimodal LLMs")
    found = named(name, size, download=download, weights=True)
    inputs = [preprocess(picture, found.size) for picture in pictures]
    return Opened(found.model, inputs, found.call, fitting(found.model), [0.8, 0.65, 0.5], "flops")
