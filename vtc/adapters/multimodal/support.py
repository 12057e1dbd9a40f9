"""Whether a method can reduce a multimodal LLM, and why not."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from vtc.adapters.encoders.find import find as find_encoders
from vtc.adapters.encoders.site import EncoderSite, Refusal
from vtc.adapters.encoders.support import refusal
from vtc.adapters.multimodal.columns import TYPES
from vtc.adapters.multimodal.families.base import READ, VIDEO
from vtc.adapters.multimodal.families.generic import ORDERED, Generic
from vtc.adapters.multimodal.find import MultimodalSite
from vtc.adapters.multimodal.rotary import sections_of
from vtc.adapters.multimodal.trial import try_positions
from vtc.adapters.report import Encoder
from vtc.errors import OptionError
from vtc.macs import attention
from vtc.methods import Method
from vtc.positions import slots_for
from vtc.tokens import FIELDS

# What the layers of a decoder take that is cut where tokens go between them, or is no matter of tokens.
_CUT = {"self", "hidden_states", "attention_mask", "position_ids", "position_embeddings", *TYPES}
_CUT |= {"past_key_values", "cache", "use_cache", "cache_position", "output_attentions", "output_router_logits"}

# The classes of the generic family whose videos are told frame by frame; in others frames are encoded as images are, or
# several together.
_FRAMED = frozenset(
    """
    cohere_compass cosmos3_edge cosmos3_omni dots3_note exaone4_5 glm46v glm4v glm4v_moe glm5_next glm_ocr
    hyperclovax_vision_v2 lfm3_vl llava_next_video muse_glimmer muse_spark qwen2_5_omni_thinker qwen3_5 qwen3_5_moe
    qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp
    """.split()
)


def explained(site: MultimodalSite, method: Method | None) -> Encoder:
    decoder = getattr(site.inner, site.family.decoder)
    layers = len(getattr(decoder, "layers", ()))
    where = "" if method is None else "the decoder's input, once"
    if method is not None and method.cascade:
        where = f"the decoder's input and layers {', '.join(str(layer) for layer, _ in method.cascade)}"
    if method is not None and method.where == "tower":
        where = "the layers of its vision tower"
    if method is not None and method.entrance is not None:
        before = "the tower's input"
        where = before if method.entrance is method else f"{before} and {where}"
    if method is not None and method.in_decoder:
        where = f"layer {getattr(method, 'layer', 0)} of the decoder"
    refusal = _refusal(site, method)
    if method is not None and method.ppe and not refusal:
        found = sections_of(decoder.rotary_emb)
        slots = slots_for(method.ppe, found)
        where += f"; a merged token carries the positions of up to {slots} members (rotary sections {list(found)})"
    return Encoder(site.path, type(site.outer).__name__, site.family.name, layers, None, where, refusal)


def _refusal(site: MultimodalSite, method: Method | None) -> str:
    if method is not None and method.rectangle:
        return (
            f"{method.name} works in vision encoders with windows alone (SAM, ViTDet), where it leaves a rectangle of "
            "tokens; this is a multimodal LLM: use tome, pitome or downsample"
        )
    decoder = getattr(site.inner, site.family.decoder)
    if getattr(decoder, "rotary_emb", None) is None:
        kind = type(decoder).__name__
        if site.family.name not in ORDERED:
            return f"its decoder ({kind}) has no rotary positions, which kept tokens would keep"
        if method is not None and (method.turned or method.ppe):
            what = 'frame="rotary"' if method.turned else "positions="
            return f"{what} needs a rotary table, and its decoder ({kind}) has none: leave it out"
    reason = _positions_refuse(decoder, method)
    if reason or method is None:
        return reason
    if not site.family.proven and method.where != "tower":
        asked = {"positions=": method.ppe, "cascade=": method.cascade, "proportional=True": method.proportional}
        asked |= {method.name: method.in_decoder, "events=": method.groups_frames}
        untried = next((name for name, given in asked.items() if given), "")
        if untried:
            return f"{untried} was not tried on {site.family.name}: use a method at its decoder's input, as divprune"
    if method.ppe:
        try:
            slots_for(method.ppe, sections_of(decoder.rotary_emb))
        except OptionError as error:
            return str(error)
    reason = "" if method.entrance is None else site.family.before_tower(site.inner)
    if reason:
        return f"{method.entrance.name}: {reason}"
    if method.resizes:
        return 'mode="resize": give the processor a smaller image instead; mode="pool" works'
    if method.where == "tower":
        tower = tower_site(site)
        return tower if isinstance(tower, str) else refusal(tower, in_tower(method))
    if method.keep is None:
        return "r= and flops= are for the layers of an encoder; at the decoder's input give keep="
    between = method.in_decoder or method.cascade or method.proportional
    if between and decoder.config._attn_implementation == "flex_attention":
        return (
            f"{method.name} cuts the masks of the decoder's layers, and those of flex_attention are no tensors; load "
            'the model with attn_implementation="sdpa"'
        )
    if site.owners.retriever is not None and (method.in_decoder or method.cascade):
        return (
            f"{type(site.outer).__name__} multiplies its embeddings by the mask of the prompt, which gets shorter "
            "between the decoder's layers: use a method at the decoder's input, such as divprune"
        )
    if method.in_decoder:
        return method.lacks("decoder") or _layer_refuses(site, method, method.layer)  # type: ignore[attr-defined]
    reasons = [_layer_refuses(site, method, layer) for layer, _ in method.cascade]
    if method.proportional:
        reasons.append(_bias_refuses(decoder))
    if any(reasons):
        return next(filter(None, reasons))
    if method.groups_frames or method.by_video:
        what = "events=" if method.groups_frames else method.name if method.shares is None else "shares="
        if VIDEO not in site.family.modalities:
            return f"{what} is about the frames of videos, and vtc knows this family with images only"
        if isinstance(site.family, Generic) and site.family.name not in _FRAMED:
            return f"{what} is about frames, and vtc does not know which tokens of {site.family.name} are one"
    method.check(decoder.config.hidden_size)
    missing = method.lacks("input")
    if missing:
        return missing
    unknown = sorted((method.needs - method.optional) & READ - site.family.evidence)
    if unknown:
        why = site.family.withheld.get(unknown[0], "vtc does not know of {name}").format(name=site.family.name)
        return (
            f"{method.name} reads {' and '.join(FIELDS[field] for field in unknown)}, which {why}: use a method that "
            'reads the tokens alone, such as divprune, or importance="norm"'
        )
    if "grid" in method.needs and not site.family.gridded:
        return (
            f"{method.name} reads {FIELDS['grid']}, which {site.family.name} does not tell: use a method that reads "
            "the tokens alone, such as divprune"
        )
    needs = (method.needs - method.optional) & {"attention", "middle", "keys"}
    if needs and not site.family.attentions(site.inner):
        return (
            f"{method.name} reads the tower's attention, and {type(site.family.tower(site.inner)).__name__} shows none"
        )
    return ""


def _positions_refuse(decoder: Any, method: Method | None) -> str:
    """Why the tokens that stay cannot keep their positions throughout this decoder."""
    trial, kind = try_positions(decoder), type(decoder).__name__
    if trial.error:
        return f"its decoder ({kind}) could not be tried on positions with gaps: {trial.error}"
    if trial.counts:
        return (
            f"its decoder ({kind}) scales attention by its own count of the tokens in front, which is another when "
            "some go: give the processor smaller images instead"
        )
    if not trial.told:
        return ""
    how = "reads positions outside of its rotary table" if trial.reads else "keeps positions in its cache"
    if "flash" in str(decoder.config._attn_implementation):
        return (
            f"its decoder ({kind}) {how}, and FlashAttention would take their gaps for borders between prompts: load "
            'the model with attn_implementation="sdpa"'
        )
    if method is not None and method.ppe:
        return f"positions={method.positions!r}: {kind} {how}, one for each token"
    return ""


def _unattending(decoder: Any) -> str:
    """Which of the decoder's layers has no attention (a convolution, linear attention, a state space), or ""."""
    for index, layer in enumerate(decoder.layers):
        if attention(layer) is None:
            return (
                f"layer {index} of this decoder ({type(layer).__name__}) is no attention and keeps a state of its own"
            )
    return ""


def _windows(decoder: Any) -> bool:
    """Whether some layers attend to a window: their caches are made for one."""
    from transformers import DynamicCache

    return any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=decoder.config).layers)


def _keeps_more(decoder: Any) -> str:
    """What a layer holds or takes for every token beside what vtc cuts, or ""."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    for index, cache in enumerate(DynamicCache(config=decoder.config).layers):
        if type(cache) is not DynamicLayer:
            return f"the cache of layer {index} of this decoder ({type(cache).__name__}) is not keys and values alone"
    for index, layer in enumerate(decoder.layers):
        takes = inspect.signature(type(layer).forward).parameters.items()  # a wrapper takes anything
        unknown = [name for name, p in takes if name not in _CUT and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if unknown:
            return f"layer {index} of this decoder ({type(layer).__name__}) takes {unknown[0]}, which vtc does not cut"
    return ""


def _bias_refuses(decoder: Any) -> str:
    if _windows(decoder):
        return "proportional=True: the caches of this decoder's sliding layers hold a part of the sizes only"
    reason = _unattending(decoder) or _keeps_more(decoder)
    if reason:
        return f"proportional=True: {reason}"
    if "flash" in str(decoder.config._attn_implementation):
        return 'proportional=True: FlashAttention takes no size bias; load the model with attn_implementation="sdpa"'
    return ""


def _layer_refuses(site: MultimodalSite, method: Method, layer: int) -> str:
    decoder = getattr(site.inner, site.family.decoder)
    depth = len(decoder.layers)
    if not 1 <= layer < depth:
        return f"layer={layer}: the decoder has {depth} layers, so it takes 1 to {depth - 1}"
    if _windows(decoder):
        return f"{method.name} reduces between layers, and the windows of this decoder's sliding layers would shift"
    reason = _unattending(decoder) or _keeps_more(decoder)
    if reason:
        return f"{method.name} reduces between layers, and {reason}: use a method at the input, such as divprune"
    deep = planes(site.inner, decoder)
    if deep is None:
        return f"{method.name} reduces between layers, and DeepStack adds to image tokens behind layers vtc cannot tell"
    if layer < deep:
        return f"layer={layer}: DeepStack adds to the image tokens behind {deep} layers; give layer={deep} or more"
    return ""


def planes(inner: Any, decoder: Any) -> int | None:
    """Behind how many of its first layers DeepStack adds to the image tokens; None = it does, and they are not told."""
    for part in (getattr(inner, "visual", None), getattr(inner.config, "vision_config", None)):
        indexes = getattr(part, "deepstack_visual_indexes", None)
        if indexes is not None:
            return len(indexes)
    takes = inspect.signature(type(decoder).forward).parameters
    return None if any(name.startswith("deepstack") for name in takes) else 0


def in_tower(method: Method) -> Method:
    """The method as it runs inside a multimodal LLM's tower: without PPE, which concerns the decoder's positions."""
    return replace(method, positions="original")


def tower_site(site: MultimodalSite) -> EncoderSite | str:
    """The layers of a multimodal LLM's tower up to the one that is projected, or why it cannot be reduced."""
    reason = site.family.in_tower
    if reason:
        return f'where="tower": {reason}; where="llm" works'
    for _, item in find_encoders(site.family.tower(site.inner)):
        if isinstance(item, Refusal):
            return f'where="tower": {item.reason}'
        away = site.family.prefix(site.inner, {})
        if item.prefix != away:
            return (
                f'where="tower": of {item.prefix} class and register tokens of its tower {item.prefix - away} reach '
                'the decoder among the image tokens, and vtc merges patches alone there; where="llm" works'
            )
        depth = len(item.blocks) + 1 + site.family.feature_layer(site.inner)
        macs = item.macs
        macs = replace(
            macs, attention=macs.attention[:depth], width=macs.width[:depth], mlp=macs.mlp[:depth], tail=(0, 0)
        )
        path = f"{site.path}.vision_tower".strip(".")
        return replace(item, path=path, blocks=item.blocks[:depth], macs=macs)
    return f'where="tower": {type(site.family.tower(site.inner)).__name__} is no encoder that vtc knows'


def encoder_site(site: MultimodalSite) -> EncoderSite | Refusal:
    """The tower as an encoder by itself, whose merged tokens are copied back behind its layers."""
    tower = tower_site(site)
    return Refusal(site.path, type(site.outer).__name__, tower) if isinstance(tower, str) else tower
