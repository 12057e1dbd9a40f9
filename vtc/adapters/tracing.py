"""Ways of running a model on stand-ins for tensors: tracing, scripting, torch.func."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from vtc.errors import UnsupportedModelError

SCRIPT = "__prepare_scriptable__"  # the attribute that torch.jit.script looks up first on a module


class Unscriptable:
    """Set as that attribute, to refuse scripting."""

    def __call__(self) -> None:
        raise UnsupportedModelError(unrecorded("torch.jit.script"))


def tracer(x: Any) -> str:
    """The tracer that records this call as fixed steps, where no method could look at the tokens; "" = none."""
    if isinstance(x, torch.fx.Proxy):
        return "torch.fx"
    return "torch.jit.trace, or torch.onnx.export(dynamo=False)," if torch.jit.is_tracing() else ""


def unrecorded(what: str) -> str:
    return (
        f"{what} cannot record what vtc does: use torch.export.export(model, (images,)) or "
        "torch.onnx.export(model, (images,), dynamo=True), or call vtc.remove(model) first"
    )


def refuse_traced(x: Any) -> None:
    """Raise if the call is being recorded, or the batch is hidden from the method (torch.func.vmap)."""
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
    """Whether state may be attached to the storage of x, for a backward pass to find: not if x only stands for a tensor
    (torch.func), nor if there can be no backward pass."""
    return not (torch.compiler.is_compiling() or _functorch.is_functorch_wrapped_tensor(x) or x.is_inference())
