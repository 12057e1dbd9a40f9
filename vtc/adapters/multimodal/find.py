"""Finds multimodal LLMs in a model, or says why there is none that vtc supports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vtc.adapters.encoders.site import Refusal
from vtc.adapters.multimodal.families import FAMILIES
from vtc.adapters.multimodal.families.base import Family
from vtc.adapters.multimodal.families.generic import TOKENS, Unfit
from vtc.adapters.multimodal.families.towers import generic
from vtc.adapters.multimodal.kinds import foreign, known_as
from vtc.adapters.multimodal.owners import Owners, around

# Models whose text part reads windows of columns in both directions, which would reach farther with fewer of them:
# their tower is reduced as an encoder alone.
_WINDOWED = {"ModernVBertModel"}


@dataclass(frozen=True)
class MultimodalSite:
    """One multimodal model that was found: the part without language head, and the models that wrap it."""

    path: str
    family: Family
    inner: Any
    owners: Owners

    @property
    def outer(self) -> Any:
        """The model whose own forward runs on the shorter prompt."""
        return self.owners.outer(self.inner)


def find(model: nn.Module) -> Iterator[MultimodalSite | Refusal]:
    """Every multimodal LLM in `model`; those of unknown families, or in unknown wrappers, as refusals."""
    known = {name: family for family in FAMILIES.values() for name in family.classes}
    for path, module in model.named_modules():
        type_name = type(module).__name__
        name = type_name if type_name in known else known_as(module, known)
        if name:
            owners = around(model, module, known)
            own = isinstance(owners, Owners) and owners.retriever is not None and owners.retriever.module is module
            if name != type_name and not own and foreign(module, name):
                owners = _overridden(type_name, name)
            yield _site(model, path, known[name], module, owners)
        elif _multimodal(module):
            yield _generic(model, path, module, known)


def _multimodal(module: Any) -> bool:
    """A model that encodes images for placeholders in a prompt, and holds none that does."""
    if not callable(getattr(module, "get_image_features", None)) or not hasattr(module, "config"):
        return False
    if known_as(module, _WINDOWED) or known_as(getattr(module, "model", module), _WINDOWED):
        return False
    inside = getattr(module, "model", None)
    ids = (getattr(module.config, name, None) for name in TOKENS["image"])
    takes = hasattr(module, "get_placeholder_mask") or any(isinstance(token, int) for token in ids)
    return takes and not callable(getattr(inside, "get_image_features", None))


def _head(module: Any) -> str:
    """The class with a language head that transformers builds around a model, where its name says nothing of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as HEADS

    return HEADS.get(getattr(module.config, "model_type", ""), "")


def _generic(model: nn.Module, path: str, module: Any, known: dict[str, Family]) -> MultimodalSite | Refusal:
    type_name = type(module).__name__
    homes = (kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformers.models."))
    if (home := next(homes, type_name)) != type_name and foreign(module, home):
        return Refusal(path, type_name, _overridden(type_name, home))
    try:
        family = generic(module)
        family.watched(module)
    except Unfit as error:
        return Refusal(path, type_name, f"{type_name} {error}")
    return _site(model, path, family, module, around(model, module, {*known, type_name}, _head(module)))


def _overridden(type_name: str, home: str) -> str:
    return f"{type_name} has a forward that is not that of transformers' {home}; use {home} itself"


def _site(model: nn.Module, path: str, family: Family, module: Any, owners: Owners | str) -> MultimodalSite | Refusal:
    if isinstance(owners, str):
        return Refusal(path, type(module).__name__, owners)
    site = MultimodalSite(path, family, module, owners)
    return replace(site, path=next(path for path, part in model.named_modules() if part is site.outer))
