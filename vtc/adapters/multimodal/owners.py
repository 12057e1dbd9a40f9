"""The models that wrap a multimodal one: what they do with ids, masks and labels once it returns fewer columns.

Known wrappers pass the call on, or slice and project the output, or pool each row's last token. Any other may index the
output by columns of the full prompt, so it is refused with an error that names it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtc.adapters.patch import FORWARDS, Patch

# Modules that pass the call on unchanged.
_WRAPPERS = {"torch.OptimizedModule", "torch.DataParallel", "torch.DistributedDataParallel"}
_WRAPPERS |= {"torch.FullyShardedDataParallel", "peft.PeftModel", "peft.PeftMixedModel", "peft.BaseTuner"}
_CLASSIFIERS = {"GenericForSequenceClassification", "Gemma3ForSequenceClassification"}
_READERS = {"ShieldGemma2ForImageClassification"}  # it reads the last column of the logits, which is still the last
_REASONS = {
    "ColPaliForRetrieval": "multiplies what comes back by the mask of the whole prompt",
    "ColQwen2ForRetrieval": "puts the image features into the embeddings itself, past what vtc patches",
    "PI0Model": "puts the image features into the embeddings itself, past what vtc patches",
    "XLoraModel": "runs it twice and weighs its columns",
}


@dataclass(frozen=True)
class Owners:
    """The known wrappers of one model: those with a language head, and those that pool each row's last token."""

    heads: tuple[nn.Module, ...] = ()
    classifiers: tuple[nn.Module, ...] = ()


def around(root: nn.Module, inner: nn.Module, families: Collection[str], head: str = "") -> Owners | str:
    """The models in `root` that contain `inner`; or why one of them is not known. `families`: the class names of
    possible inner models; their heads have similar names and come from transformers, or from the package of `inner`."""
    names = {f"{name.removesuffix('Model')}ForConditionalGeneration" for name in families} | ({head} - {""})
    home = type(inner).__module__.split(".")[0]
    heads, classifiers = [], []
    for owner, path in _holders(root, inner):
        kind, who = known_as(owner, {*names, *_CLASSIFIERS, *_READERS}, home), type(owner).__name__
        way = f"; compress model.{path} itself if {who} only calls it"
        if who in _REASONS:
            return f"{who} holds it and {_REASONS[who]}; compress model.{path} itself, and call that"
        if kind and foreign(owner, kind):
            return f"{who} holds it, with a forward that is not that of transformers' {kind}{way}"
        if not kind and not _hands_on(owner):
            return f"{who} holds it, and vtc does not know what {who} does with ids, masks and labels behind it{way}"
        if kind in names:
            heads.append(owner)
        elif kind in _CLASSIFIERS:
            classifiers.append(owner)
    return Owners(tuple(heads), tuple(classifiers))


def known_as(module: nn.Module, names: Collection[str], home: str = "transformers") -> str:
    """Which of `names`, classes of transformers (or of `home`), a module is an instance of; "" = none of them."""
    for kind in type(module).__mro__:
        if kind.__name__ in names and kind.__module__.split(".")[0] in ("transformers", home):
            return kind.__name__
    return ""


def foreign(module: nn.Module, name: str) -> bool:
    """Whether a module that is known as `name` has another forward than that class, overridden or replaced."""
    kind: Any = next(kind for kind in type(module).__mro__ if kind.__name__ == name)
    own = inspect.unwrap(kind.forward)
    placed = (inspect.unwrap(module.__dict__[key]) for key in FORWARDS if key in module.__dict__)
    replaced = any(getattr(one, "__func__", one) is not own for one in placed if not isinstance(one, Patch))
    writer = next(base for base in kind.__mro__ if "forward" in vars(base))
    return replaced or type(module).forward is not kind.forward or own.__module__ != writer.__module__


def _holders(root: nn.Module, inner: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module in `root` that holds `inner`, the nearest first, each with the path in `root` of what holds it."""
    seen: set[nn.Module] = set()
    for path, module in root.named_modules(remove_duplicate=False):
        parts = path.split(".") if path else []
        for end in range(len(parts) - 1, -1, -1) if module is inner else ():
            owner = root.get_submodule(".".join(parts[:end]))
            if owner not in seen:
                seen.add(owner)
                yield owner, ".".join(parts[: end + 1])


def _hands_on(owner: nn.Module) -> bool:
    """Whether a module calls its inner module with its own arguments, and returns the result."""
    if type(owner) is nn.Sequential:
        return len(owner) == 1
    if type(owner) in (nn.ModuleList, nn.ModuleDict):  # these are never called themselves
        return True
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(owner).__mro__}
    return bool(names & _WRAPPERS) and type(owner).forward.__module__.split(".")[0] in ("torch", "peft")  # type: ignore[attr-defined]
