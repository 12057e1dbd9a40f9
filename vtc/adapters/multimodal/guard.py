"""A patched multimodal model never bypasses its patch, and never runs in two threads at once.

Image tokens go through the projector. If the projector ran during a call of any model from the one given to `compress`
down to the patched one, the patch must have seen images. And if a call without pixels has embeddings that contain the
projector's output, other code inserted them, which is refused.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.encoders.guard import enclosing, recomputing, refuse_replica
from vtc.adapters.hooks import Hook, Scope
from vtc.errors import InputError


class Guard:
    """Watches one patched multimodal model.

    Attributes:
        open: (module, thread, `images` and `prompts` before it) for every running module, outermost first.
        images: how often the projector ran; prompts: how often the patch saw images.
        ends: [2, C], the first and the last row of the projector's last output, until a prompt has used them.
    """

    def __init__(self, parent: Any) -> None:
        self.parent = parent
        self.open: list[tuple[Any, int, int, int]] = []
        self.images = self.prompts = 0
        self.ends: Tensor | None = None

    def install(self, root: nn.Module) -> None:
        for module in enclosing(root, self.parent.inner):
            module.register_forward_pre_hook(Scope("enter", self))
            module.register_forward_hook(Scope("close", self), always_call=True)
        self.parent.family.watched(self.parent.inner).register_forward_hook(Hook("projected", self))

    def projected(self, hook: Hook, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling() or recomputing():
            return
        if isinstance(output, Tensor) and output.numel():
            self.ends = output.detach().flatten(0, -2)[[0, -1]]
        elif isinstance(output, Tensor) or getattr(output, "last_hidden_state", None) is None:
            return
        self.images += 1

    def enter(self, module: Any) -> None:
        if torch.compiler.is_compiling():
            return
        refuse_replica(module)
        self.leave(module)  # it is still open if a call was interrupted (Ctrl+C)
        mine = (module, threading.get_ident(), self.images, self.prompts)
        self.open.append(mine)
        try:
            self.alone()
        except InputError:
            self.open.remove(mine)
            raise

    def alone(self) -> None:
        """Raise if another thread is running the model."""
        if self.open and self.open[0][1] != threading.get_ident():
            raise InputError(
                f"another thread is in {self.parent.where}: vtc works on one call of it at a time; take turns, or give "
                "each thread a copy (copy.deepcopy)"
            )

    def leave(self, module: Any) -> tuple[int, int] | None:
        """Forget a module and what began inside it; returns the counts from before it."""
        me = threading.get_ident()
        for place, (opened, thread, images, prompts) in enumerate(self.open):
            if opened is module and thread == me:
                self.open[place:] = [each for each in self.open[place:] if each[1] != me]
                return images, prompts
        return None

    def close(self, module: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        before = self.leave(module)
        if before is None or (output is None and sys.exc_info()[1] is not None):
            return
        images, prompts = before
        if self.images > images and self.prompts == prompts and not self.idle:
            self.ends = None
            raise InputError("images " + self.past)

    @property
    def past(self) -> str:
        return (
            f"were filled in before {type(self.parent.outer).__name__}'s own forward, where vtc takes them out: pass "
            "it the pixels, with the ids or the embeddings, or call vtc.remove(model)"
        )

    @property
    def idle(self) -> bool:
        """Whether every image keeps all of its tokens."""
        method = self.parent.method
        return isinstance(method.keep, float) and method.keep == 1.0 and not method.cascade and method.entrance is None

    def saw(self, images: bool, call: dict[str, Any]) -> None:
        """Record whether the patch found images in a call; raise if embeddings contain image tokens without pixels."""
        ends, embeds = self.ends, call.get("inputs_embeds")
        if images:
            self.prompts, self.ends = self.prompts + 1, None
        elif ends is not None and embeds is not None and not self.idle and ends.shape[-1] == embeds.shape[-1]:
            found = embeds[..., None, :] == ends.to(embeds.device, embeds.dtype)
            if bool(found.all(-1).flatten(0, -2).any(0).all()):
                raise InputError("the image tokens in inputs_embeds " + self.past)
