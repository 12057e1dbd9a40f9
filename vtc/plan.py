"""`explain`: what a method would reduce in a model, and what not and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from vtc.adapters.encoders.find import ADAPTERS
from vtc.adapters.encoders.find import find as find_encoders
from vtc.adapters.encoders.rectangle import of_rectangles
from vtc.adapters.encoders.site import EncoderSite, Refusal
from vtc.adapters.encoders.support import reduced, refusal
from vtc.adapters.multimodal.families import FAMILIES
from vtc.adapters.multimodal.families.generic import Generic
from vtc.adapters.multimodal.find import MultimodalSite
from vtc.adapters.multimodal.find import find as find_llms
from vtc.adapters.multimodal.self_check import failed
from vtc.adapters.multimodal.support import encoder_site, explained
from vtc.adapters.report import Encoder
from vtc.errors import OptionError
from vtc.methods import Method, make


def explain(model: nn.Module, method: str | Method | None = None, **options: Any) -> Explanation:
    """What `compress` would do to `model`: which encoders, which layers, what is left out, and why. Changes nothing.

    `method` may be a name without a budget.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}: explain takes a torch.nn.Module")
    if isinstance(method, str) and not {"keep", "r", "flops", "rows", "columns"} & set(options):
        options["keep"] = 1.0
    chosen = None if method is None else make(method, **options)
    sites: list[EncoderSite | MultimodalSite] = []
    found: list[Encoder] = []
    for adapter, item in _find(model, chosen):
        if isinstance(item, MultimodalSite) and chosen is not None and chosen.where == "tower" and item.family.copied:
            item = encoder_site(item)
        if isinstance(item, Refusal):
            found.append(Encoder(item.path, item.type_name, adapter, refusal=item.reason))
            continue
        if isinstance(item, MultimodalSite):
            found.append(explained(item, chosen))
            if not found[-1].refusal:
                found[-1] = replace(found[-1], refusal=failed(item))
        else:
            reason = refusal(item, chosen)
            depth = len(item.blocks)
            where = "" if reason else reduced(item, chosen)
            found.append(Encoder(item.path, item.type_name, adapter, depth, item.prefix, where, reason))
        if not found[-1].refusal:
            sites.append(item)
    name = None if chosen is None else chosen.name
    return Explanation(type(model).__name__, name, tuple(found), tuple(sites))


def _find(model: nn.Module, method: Method | None) -> Iterator[tuple[str, EncoderSite | MultimodalSite | Refusal]]:
    """Everything that can be reduced, or why not. The tower of a multimodal LLM belongs to the LLM."""
    llms = list(find_llms(model))
    for llm in llms:
        yield (llm.family.name if isinstance(llm, MultimodalSite) else "multimodal"), llm
    for adapter, item in of_rectangles(model, list(find_encoders(model)), method):
        if llms and not item.path:
            continue  # a model that contains an LLM is judged as that LLM
        if not any(f"{item.path}.".startswith(f"{llm.path}." if llm.path else "") for llm in llms):
            yield adapter, item


@dataclass(frozen=True)
class Explanation:
    """What would be patched, and what not and why. Prints as sentences; `to_dict()` is plain data."""

    model: str
    method: str | None
    encoders: tuple[Encoder, ...]
    _sites: tuple[EncoderSite | MultimodalSite, ...] = ()

    @property
    def ok(self) -> bool:
        """True if something would be reduced and nothing would be left out."""
        return bool(self.encoders) and not any(encoder.refusal for encoder in self.encoders)

    def to_dict(self) -> dict[str, Any]:
        encoders = [asdict(encoder) for encoder in self.encoders]
        return {"model": self.model, "method": self.method, "ok": self.ok, "encoders": encoders, "text": str(self)}

    def __str__(self) -> str:
        if not self.encoders:
            known = "; ".join(f"{name}: {covers}" for name, covers in list_adapters().items())
            return f"{self.model} holds no vision encoder that vtc knows. Known are {known}"
        return "\n".join(map(str, self.encoders)) if len(self.encoders) > 1 else str(self.encoders[0])


def list_adapters() -> dict[str, str]:
    """Name of every adapter and the model families it covers."""
    known = {name: adapter.covers for name, adapter in ADAPTERS.items()}
    return {**known, **{name: family.covers for name, family in FAMILIES.items()}, "generic": Generic.covers}
