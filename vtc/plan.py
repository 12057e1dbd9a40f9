"""explain: what a method would reduce in a model, and why not where it would not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from vtc import adapters
from vtc.adapters import multimodal
from vtc.adapters.encoders.block_patch import patch_on
from vtc.adapters.encoders.rotary import column_slots
from vtc.adapters.encoders.site import EncoderSite, Refusal
from vtc.adapters.encoders.trial import check
from vtc.adapters.multimodal import MultimodalSite
from vtc.adapters.multimodal.families.base import VIDEO
from vtc.adapters.multimodal.rotary import axes
from vtc.adapters.multimodal.trial import try_positions
from vtc.errors import OptionError
from vtc.macs import attention
from vtc.methods import Method, make
from vtc.positions import sections, slots_for


def explain(model: nn.Module, method: str | Method | None = None, **options: Any) -> Explanation:
    """What `compress` would do to `model`: which encoders, which layers, what is left out and why. Changes nothing.

    `method` may be a name without a budget.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}: explain takes a torch.nn.Module")
    if isinstance(method, str) and not {"keep", "r", "flops"} & set(options):
        options["keep"] = 1.0
    chosen = None if method is None else make(method, **options)
    sites: list[EncoderSite | MultimodalSite] = []
    found: list[Encoder] = []
    for adapter, item in _find(model):
        if isinstance(item, Refusal):
            found.append(Encoder(item.path, item.kind, adapter, refusal=item.reason))
            continue
        if isinstance(item, MultimodalSite):
            found.append(_explain_gate(item, chosen))
        else:
            reason = _refuses(item, chosen)
            depth = len(item.blocks)
            where = "" if reason else _reduced(item, chosen)
            found.append(Encoder(item.path, item.kind, adapter, depth, item.prefix, where, reason))
        if not found[-1].refusal:
            sites.append(item)
    name = None if chosen is None else chosen.name
    return Explanation(type(model).__name__, name, tuple(found), tuple(sites))


def _find(model: nn.Module) -> Iterator[tuple[str, EncoderSite | MultimodalSite | Refusal]]:
    """Everything that can be reduced, or why not. The tower of a multimodal LLM is a part of it."""
    gates = list(multimodal.find(model))
    for gate in gates:
        yield (gate.family.name if isinstance(gate, MultimodalSite) else "multimodal"), gate
    for adapter, item in adapters.find(model):
        if gates and not item.path:
            continue  # the whole model is what its gate is judged as
        if not any(f"{item.path}.".startswith(f"{gate.path}." if gate.path else "") for gate in gates):
            yield adapter, item


def _explain_gate(gate: MultimodalSite, method: Method | None) -> Encoder:
    decoder = getattr(gate.inner, gate.family.decoder)
    layers = len(getattr(decoder, "layers", ()))
    where = "" if method is None else "the decoder's input, once"
    if method is not None and method.cascade:
        where = f"the decoder's input and layers {', '.join(str(layer) for layer, _ in method.cascade)}"
    if method is not None and method.where == "tower":
        where = "the layers of its vision tower"
    if method is not None and method.in_decoder:
        where = f"layer {getattr(method, 'layer', 0)} of the decoder"
    refusal = _gate_refuses(gate, method)
    if method is not None and method.ppe and not refusal:
        found = sections(axes(decoder.rotary_emb))
        slots = slots_for(method.ppe, found)
        where += f"; a merged token carries the positions of up to {slots} members (rotary sections {list(found)})"
    return Encoder(gate.path, type(gate.inner).__name__, gate.family.name, layers, None, where, refusal)


def _gate_refuses(gate: MultimodalSite, method: Method | None) -> str:
    decoder = getattr(gate.inner, gate.family.decoder)
    if getattr(decoder, "rotary_emb", None) is None:
        return f"its decoder ({type(decoder).__name__}) has no rotary positions, which kept tokens would keep"
    reason = _positions_refuse(decoder, method)
    if reason or method is None:
        return reason
    if method.ppe:
        try:
            slots_for(method.ppe, sections(axes(decoder.rotary_emb)))
        except OptionError as error:
            return str(error)
    if method.resizes:
        return 'mode="resize": give the processor a smaller image instead; mode="pool" works'
    if method.where == "tower":
        site = tower_site(gate)
        return site if isinstance(site, str) else _refuses(site, in_tower(method))
    if method.keep is None:
        return "r= and flops= are for the layers of an encoder; at the decoder's input give keep="
    between = method.in_decoder or method.cascade or method.proportional
    if between and decoder.config._attn_implementation == "flex_attention":
        return (
            f"{method.name} cuts the masks of the decoder's layers, and those of flex_attention are no tensors; load "
            'the model with attn_implementation="sdpa"'
        )
    if method.in_decoder:
        return _layer_refuses(gate, method, method.layer)  # type: ignore[attr-defined]
    reasons = [_layer_refuses(gate, method, layer) for layer, _ in method.cascade]
    if method.proportional:
        reasons.append(_bias_refuses(decoder))
    if any(reasons):
        return next(filter(None, reasons))
    if method.groups_frames and VIDEO not in gate.family.kinds:
        return "events= merges the frames of videos, and vtc knows this family with images only"
    method.check(decoder.config.hidden_size)
    needs = (method.needs - method.optional) & {"attention", "middle", "keys"} if not method.encoder else frozenset()
    if needs and not gate.family.attentions(gate.inner):
        return (
            f"{method.name} reads the tower's attention, and {type(gate.family.tower(gate.inner)).__name__} shows none"
        )
    return ""


def _positions_refuse(decoder: Any, method: Method | None) -> str:
    """Why the tokens that stay could not keep their positions everywhere in this decoder."""
    trial, kind = try_positions(decoder), type(decoder).__name__
    if trial.error:
        return f"its decoder ({kind}) could not be tried on positions with gaps: {trial.error}"
    if trial.counts:
        return (
            f"its decoder ({kind}) scales attention by its own count of the tokens in front, which is another when "
            "some go: give the processor smaller images instead"
        )
    if not trial.reads:
        return ""
    if "flash" in str(decoder.config._attn_implementation):
        return (
            f"its decoder ({kind}) reads positions outside of its rotary table, and FlashAttention would take their "
            'gaps for borders between prompts: load the model with attn_implementation="sdpa"'
        )
    if method is not None and method.ppe:
        return f"positions={method.positions!r}: {kind} reads positions outside of its rotary table, one for each token"
    if method is not None and (method.in_decoder or method.cascade or method.proportional):
        what = "cascade=" if method.cascade else "proportional=" if method.proportional else method.name
        return (
            f"{what} works between the layers of the decoder, and {kind} reads positions there: use a method at the "
            "decoder's input, such as divprune"
        )
    return ""


def _unattending(decoder: Any) -> str:
    """Which of the decoder's layers has no attention (a convolution, linear attention, a state space), or ""."""
    for index, layer in enumerate(decoder.layers):
        if attention(layer) is None:
            return (
                f"layer {index} of this decoder ({type(layer).__name__}) is no attention and keeps a state of its own"
            )
    return ""


def _bias_refuses(decoder: Any) -> str:
    reason = _unattending(decoder)
    if reason:
        return f"proportional=True: {reason}"
    if "sliding_attention" in (getattr(decoder.config, "layer_types", None) or ()):
        return "proportional=True: the caches of this decoder's sliding layers hold a part of the sizes only"
    if "flash" in str(decoder.config._attn_implementation):
        return 'proportional=True: FlashAttention takes no size bias; load the model with attn_implementation="sdpa"'
    return ""


def _layer_refuses(gate: MultimodalSite, method: Method, layer: int) -> str:
    decoder = getattr(gate.inner, gate.family.decoder)
    depth = len(decoder.layers)
    if not 1 <= layer < depth:
        return f"layer={layer}: the decoder has {depth} layers, so it takes 1 to {depth - 1}"
    if "sliding_attention" in (getattr(decoder.config, "layer_types", None) or ()):
        return f"{method.name} reduces between layers, and the windows of this decoder's sliding layers would shift"
    reason = _unattending(decoder)
    if reason:
        return f"{method.name} reduces between layers, and {reason}: use a method at the input, such as divprune"
    planes = len(getattr(getattr(gate.inner, "visual", None), "deepstack_visual_indexes", ()))
    if layer < planes:
        return f"layer={layer}: DeepStack adds to the image tokens behind {planes} layers; give layer={planes} or more"
    return ""


def in_tower(method: Method) -> Method:
    """What a multimodal LLM's tower does for `method`: the positions that PPE means are the decoder's."""
    return replace(method, positions="original")


def tower_site(gate: MultimodalSite) -> EncoderSite | str:
    """The layers of a multimodal LLM's tower up to the one that is projected, or why it cannot be reduced."""
    reason = gate.family.in_tower
    if reason:
        return f'where="tower": {reason}; where="llm" works'
    for _, item in adapters.find(gate.family.tower(gate.inner)):
        if isinstance(item, Refusal):
            return f'where="tower": {item.reason}'
        away = gate.family.prefix(gate.inner, {})
        if item.prefix != away:
            return (
                f'where="tower": of {item.prefix} class and register tokens of its tower {item.prefix - away} reach '
                'the decoder among the image tokens, and vtc merges patches alone there; where="llm" works'
            )
        depth = len(item.blocks) + 1 + gate.family.feature_layer(gate.inner)
        macs = item.macs
        macs = replace(
            macs, attention=macs.attention[:depth], width=macs.width[:depth], mlp=macs.mlp[:depth], tail=(0, 0)
        )
        path = f"{gate.path}.vision_tower".strip(".")
        return replace(item, path=path, blocks=item.blocks[:depth], macs=macs)
    return f'where="tower": {type(gate.family.tower(gate.inner)).__name__} is no encoder that vtc knows'


def _refuses(site: EncoderSite, method: Method | None) -> str:
    if method is not None:
        given = {"pooled=": method.pooled, "cascade=": method.cascade, "proportional=": method.proportional}
        given |= {"where=": method.where == "llm", method.name: not method.encoder}
        if any(given.values()):
            what = next(name for name, is_given in given.items() if is_given)
            return (
                f"{what} is for multimodal LLMs, where the decoder takes its image tokens; this is a vision encoder "
                "alone"
            )
    if method is not None and method.merges and site.no_bias:
        return f'{site.no_bias} takes no size bias, which merged tokens need; load it with attn_implementation="sdpa"'
    if not any(map(patch_on, site.blocks)):
        reason = check(site)  # an encoder that is patched has been tried already
        if reason:
            return reason
    if method is None:
        return ""
    if isinstance(method.r, tuple) and len(method.r) != len(site.blocks):
        return f"r= lists {len(method.r)} layers, but the encoder has {len(site.blocks)}"
    if isinstance(method.keep, float) and method.keep < 0.5 and not method.one_shot:
        return (
            f"keep={method.keep}: inside a ViT a fraction is per layer, and a layer keeps at least half; "
            "give the final number of tokens (an int), or flops="
        )
    if "grid" in method.needs and site.shuffled:
        return f"{method.name} needs the patches in their places, but this encoder's embeddings shuffle them"
    if method.ppe:
        if isinstance(site.rotary, str):
            return f'positions={method.positions!r}: {site.rotary}; positions="original" works'
        if method.resizes:
            return (
                f'positions={method.positions!r}: mode="resize" merges no tokens, so none has several; mode="pool" does'
            )
        try:
            column_slots(*site.rotary(), method.ppe)
        except OptionError as error:
            return str(error)
    if method.resizes and isinstance(site.resizable, str):
        return f'mode="resize": {site.resizable}; mode="pool" works'
    return ""


def _reduced(site: EncoderSite, method: Method | None) -> str:
    if method is None:
        return ""
    if method.resizes:
        return "the image, before the first layer"
    where = "layer 0" if method.one_shot else f"layers 0-{len(site.blocks) - 1}, between attention and MLP"
    if method.ppe and not isinstance(site.rotary, str):
        where += (
            f"; a merged token carries the positions of up to {column_slots(*site.rotary(), method.ppe)[0]} members"
        )
    return where


@dataclass(frozen=True)
class Encoder:
    """One encoder that was found: where, what, how deep, where tokens would go; or why not."""

    path: str
    kind: str
    adapter: str
    layers: int = 0
    prefix_tokens: int | None = 0  # None: a multimodal LLM, whose layers are the decoder's
    reduces: str = ""
    refusal: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        if self.refusal:
            return f"{where}{self.kind} is left alone: {self.refusal}"
        at = f", reduced at {self.reduces}" if self.reduces else ""
        prefix = f", {self.prefix_tokens} prefix token{'s' * (self.prefix_tokens != 1)}"
        if self.prefix_tokens is None:
            prefix = ""
        return f"{where}{self.kind} ({self.adapter}), {self.layers} layers{prefix}{at}"


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
    known = {name: adapter.covers for name, adapter in adapters.ADAPTERS.items()}
    return {**known, **{name: family.covers for name, family in multimodal.FAMILIES.items()}}
