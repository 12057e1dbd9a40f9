"""Ways of running a model in which its tensors are not what they seem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from vtc.errors import UnsupportedModelError

SCRIPT = "__prepare_scriptable__"  # what torch.jit.script asks a module for first


class Unscriptable:
    """Stands in for that."""

    def __call__(self) -> None:
        raise UnsupportedModelError(unrecorded("torch.jit.script"))


def tracer(x: Any) -> str:
    """What records this call as fixed steps, in which no method could look at the tokens; "" = nothing."""
    if isinstance(x, torch.fx.Proxy):
        return "torch.fx"
    return "torch.jit.trace, or torch.onnx.export(dynamo=False)," if torch.jit.is_tracing() else ""


def unrecorded(what: str) -> str:
    return (
        f"{what} cannot record what vtc does: use torch.export.export(model, (images,), strict=False) for one size of "
        "batch and image, or call vtc.remove(model) first"
    )


def refuse_traced(x: Any) -> None:
    """Raise where the call is being recorded, or the batch hidden from the method (torch.func.vmap)."""
    if torch.compiler.is_compiling():
        return
    what = tracer(x)
    if what:
        raise UnsupportedModelError(unrecorded(what))
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            raise UnsupportedModelError(
                "torch.func.vmap hides the batch from vtc: call the model on the batch, or call vtc.remove(model) first"
            )
        x = _functorch.get_unwrapped(x)


def rides(x: Tensor) -> bool:
    """Whether a note may ride on the memory of x, for a backward pass to find: not where x only stands for a tensor
    (torch.func), nor where no backward pass can come."""
    return not (torch.compiler.is_compiling() or _functorch.is_functorch_wrapped_tensor(x) or x.is_inference())
