"""compress, remove, explain: put a method into a model, take it out again, say beforehand what would happen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from vtc import adapters
from vtc.adapters import multimodal
from vtc.adapters.multimodal import Gate
from vtc.adapters.multimodal.family import VIDEO
from vtc.adapters.multimodal.intake import Intake
from vtc.adapters.multimodal.question import Record
from vtc.adapters.multimodal.rotary import axes
from vtc.adapters.multimodal.standins import strip as strip_intake
from vtc.adapters.rotary import column_slots
from vtc.adapters.site import Refusal, Site, check_blocks
from vtc.adapters.stage import Stage
from vtc.adapters.tower import PatchedForward, Tower, strip
from vtc.errors import OptionError, UnsupportedModelError, VTCError
from vtc.macs import decoder_macs
from vtc.methods import METHODS, Method, make
from vtc.positions import sections, slots_for
from vtc.token_map import TokenMap


def compress(model: nn.Module, method: str | Method, **options: Any) -> Handle:
    """Patch `model` in place so that it works on fewer visual tokens. Takes itself off with `handle.remove()`,
    `vtc.remove(model)` or at the end of a `with` block.

    Args:
        model: a vision encoder of timm, open_clip or transformers, or a model that contains one; or a multimodal LLM of
            transformers.
        method: a name (`vtc.list_methods()`) with its options, or a ready method: `vtc.PiToMe(keep=0.9)`.

    Returns:
        A `Handle`. An encoder's outputs keep their shape: merged tokens are copied back to the places they came from
        after the last block. A multimodal LLM takes its own calls (`generate`, `forward`, `pipeline`); its decoder and
        cache hold fewer tokens. A model that is compressed already gets the new method instead of the old one.

    Raises:
        OptionError: unknown method or option, a value out of range.
        UnsupportedModelError: nothing that can be reduced, and why. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}: compress takes a torch.nn.Module")
    chosen = make(method, **options)
    plan = explain(model, chosen)
    if not plan.ok:
        raise UnsupportedModelError(str(plan))
    remove(model)
    parts: list[Tower | Intake] = []
    try:
        for site in plan._sites:
            if isinstance(site, Site):
                parts.append(Tower(site, chosen))
            else:
                inside = Tower(_tower_site(site), _in_tower(chosen)) if chosen.where == "tower" else None  # type: ignore[arg-type]
                parts.append(Intake(site.family, site.path, site.inner, site.owners, chosen, inside))
            parts[-1].install()
    except BaseException:
        remove(model)
        raise
    return Handle(model, chosen, tuple(parts))


def remove(model: nn.Module) -> None:
    """Take every patch of vtc off `model`. Does nothing to a model without."""
    for module in model.modules():
        strip(module)
        strip_intake(module)


def explain(model: nn.Module, method: str | Method | None = None, **options: Any) -> Explanation:
    """What `compress` would do to `model`: which encoders, which layers, what is left out and why. Changes nothing.

    `method` may be a name without a budget.
    """
    if isinstance(method, str) and not {"keep", "r", "flops"} & set(options):
        options["keep"] = 1.0
    chosen = None if method is None else make(method, **options)
    sites: list[Site | Gate] = []
    found: list[Encoder] = []
    for adapter, item in _find(model):
        if isinstance(item, Refusal):
            found.append(Encoder(item.path, item.kind, adapter, refusal=item.reason))
            continue
        if isinstance(item, Gate):
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


def _find(model: nn.Module) -> Iterator[tuple[str, Site | Gate | Refusal]]:
    """Everything that can be reduced, or why not. The tower of a multimodal LLM is a part of it."""
    gates = list(multimodal.find(model))
    for gate in gates:
        yield (gate.family.name if isinstance(gate, Gate) else "multimodal"), gate
    for adapter, item in adapters.find(model):
        if not any(f"{item.path}.".startswith(f"{gate.path}." if gate.path else "") for gate in gates):
            yield adapter, item


def _explain_gate(gate: Gate, method: Method | None) -> Encoder:
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


def _gate_refuses(gate: Gate, method: Method | None) -> str:
    decoder = getattr(gate.inner, gate.family.decoder)
    if not hasattr(decoder, "rotary_emb"):
        return f"its decoder ({type(decoder).__name__}) has no rotary positions, which kept tokens would keep"
    if method is None:
        return ""
    if method.ppe:
        try:
            slots_for(method.ppe, sections(axes(decoder.rotary_emb)))
        except OptionError as error:
            return str(error)
    if getattr(method, "mode", "") == "resize":
        return 'mode="resize": give the processor a smaller image instead; mode="pool" works'
    if method.where == "tower":
        site = _tower_site(gate)
        return site if isinstance(site, str) else _refuses(site, _in_tower(method))
    if method.keep is None:
        return "r= and flops= are for the layers of an encoder; at the decoder's input give keep="
    if method.in_decoder:
        return _layer_refuses(gate, method, method.layer)  # type: ignore[attr-defined]
    reasons = [_layer_refuses(gate, method, layer) for layer, _ in method.cascade]
    if method.proportional:
        reasons.append(_bias_refuses(decoder))
    if any(reasons):
        return next(filter(None, reasons))
    if getattr(method, "events", None) and VIDEO not in gate.family.kinds:
        return "events= merges the frames of videos, and vtc knows this family with images only"
    method.check(decoder.config.hidden_size)
    needs = (method.needs - method.optional) & {"attention", "middle", "keys"} if not method.encoder else frozenset()
    if needs and not gate.family.attentions(gate.inner):
        return (
            f"{method.name} reads the tower's attention, and {type(gate.family.tower(gate.inner)).__name__} shows none"
        )
    return ""


def _bias_refuses(decoder: Any) -> str:
    if "sliding_attention" in (getattr(decoder.config, "layer_types", None) or ()):
        return "proportional=True: the caches of this decoder's sliding layers hold a part of the sizes only"
    if "flash" in str(decoder.config._attn_implementation):
        return 'proportional=True: FlashAttention takes no size bias; load the model with attn_implementation="sdpa"'
    return ""


def _layer_refuses(gate: Gate, method: Method, layer: int) -> str:
    decoder = getattr(gate.inner, gate.family.decoder)
    depth = len(decoder.layers)
    if not 1 <= layer < depth:
        return f"layer={layer}: the decoder has {depth} layers, so it takes 1 to {depth - 1}"
    if "sliding_attention" in (getattr(decoder.config, "layer_types", None) or ()):
        return f"{method.name} reduces between layers, and the windows of this decoder's sliding layers would shift"
    planes = len(getattr(getattr(gate.inner, "visual", None), "deepstack_visual_indexes", ()))
    if layer < planes:
        return f"layer={layer}: DeepStack adds to the image tokens behind {planes} layers; give layer={planes} or more"
    return ""


def _in_tower(method: Method) -> Method:
    """What a multimodal LLM's tower does for `method`: the positions that PPE means are the decoder's."""
    return replace(method, positions="original")


def _tower_site(gate: Gate) -> Site | str:
    """The layers of a multimodal LLM's tower up to the one that is projected, or why it cannot be reduced."""
    reason = gate.family.in_tower
    if reason:
        return f'where="tower": {reason}; where="llm" works'
    for _, item in adapters.find(gate.family.tower(gate.inner)):
        if isinstance(item, Refusal):
            return f'where="tower": {item.reason}'
        depth = len(item.blocks) + 1 + gate.family.feature_layer(gate.inner)
        macs = item.macs
        macs = replace(
            macs, attention=macs.attention[:depth], width=macs.width[:depth], mlp=macs.mlp[:depth], tail=(0, 0)
        )
        path = f"{gate.path}.vision_tower".strip(".")
        return replace(item, path=path, blocks=item.blocks[:depth], macs=macs)
    return f'where="tower": {type(gate.family.tower(gate.inner)).__name__} is no encoder that vtc knows'


def _refuses(site: Site, method: Method | None) -> str:
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
    if not any(isinstance(block.__dict__.get("forward"), PatchedForward) for block in site.blocks):
        reason = check_blocks(site)  # an encoder that is patched has been tried already
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
        if getattr(method, "mode", "") == "resize":
            return (
                f'positions={method.positions!r}: mode="resize" merges no tokens, so none has several; mode="pool" does'
            )
        try:
            column_slots(*site.rotary(), method.ppe)
        except OptionError as error:
            return str(error)
    if getattr(method, "mode", "") == "resize" and isinstance(site.resizable, str):
        return f'mode="resize": {site.resizable}; mode="pool" works'
    return ""


def _reduced(site: Site, method: Method | None) -> str:
    if method is None:
        return ""
    if getattr(method, "mode", "") == "resize":
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
    _sites: tuple[Site | Gate, ...] = ()

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
            return (
                f"{self.model} holds no vision encoder that vtc knows: it is a CNN, a windowed or pooling pyramid, or "
                f"of a family without an adapter. Known are {known}"
            )
        return "\n".join(map(str, self.encoders)) if len(self.encoders) > 1 else str(self.encoders[0])


@dataclass(frozen=True)
class Report:
    """What happened in the last call.

    Attributes:
        tokens: per layer (tokens into attention, tokens into the MLP), prefix included; per image if they differ.
        before, after: image tokens at the encoder's entry and end, one per image.
        macs_before, macs_after: multiply-adds of the encoder for the whole call; in a multimodal LLM those of the
            decoder's prefill, without the language head.
        notes: what the method chose by itself.
        prompts: in a multimodal LLM, the length of every prompt as it came, without padding; `tokens` tells the rest.
        layers: where the decoder's layers differ, the fraction of the image tokens that each of them sees.
    """

    method: str
    images: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    tokens: tuple[tuple[Any, Any], ...]
    macs_before: int
    macs_after: int
    path: str = ""
    notes: str = ""
    prompts: tuple[int, ...] = ()
    layers: tuple[float, ...] = ()

    @property
    def kept(self) -> float:
        """The fraction of the image tokens that stayed; where tokens go between a decoder's layers, the mean over the
        layers."""
        return sum(self.layers) / len(self.layers) if self.layers else sum(self.after) / max(1, sum(self.before))

    @property
    def macs_ratio(self) -> float:
        """The fraction of multiply-adds that remained."""
        return self.macs_after / self.macs_before

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kept": self.kept, "macs_ratio": self.macs_ratio}

    def __str__(self) -> str:
        def span(values: tuple[int, ...]) -> str:
            return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"

        over = " on average over the layers" if self.layers else ""
        where = f"{self.images} image{'s' * (self.images != 1)}"
        if self.prompts:
            where = f"{self.images} image{'s, crops or frames' * (self.images != 1)}"
            last = self.tokens[-1][0]
            where += f", prompt {span(self.prompts)} -> {span(last if isinstance(last, tuple) else (last,))}"
        return (
            f"{self.method}: {span(self.before)} -> {span(self.after)} image tokens ({self.kept:.1%} kept, "
            f"{1 - self.kept:.1%} removed{over}), {where}, {self.macs_before / 1e9:.2f} -> "
            f"{self.macs_after / 1e9:.2f} GMACs ({self.macs_ratio:.1%} remain)"
            f"{'; ' if self.notes else ''}{self.notes}"
        )


class Handle:
    """A compressed model's method, what it did last, and the way back."""

    def __init__(self, model: nn.Module, method: Method, parts: tuple[Tower | Intake, ...]) -> None:
        self.model, self.method, self._parts = model, method, parts

    def remove(self) -> None:
        """Give the model back as it was. Nothing happens if it is, or if another method took this one's place."""
        for part in self._parts:
            if any(patch.installed for patch in part.patched):
                remove(self.model)
                return

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _last(self) -> tuple[Tower, Stage] | tuple[Intake, Record]:
        for part in self._parts:
            if isinstance(part, Intake):
                if part.record is not None:
                    return part, part.record
            elif part.stage is not None and part.stage.layer == len(part.site.blocks):
                return part, part.stage
        raise VTCError("nothing to report yet: no call with an image has gone through the compressed model")

    @property
    def token_map(self) -> TokenMap:
        """Image tokens (without CLS and other prefix tokens) to the tokens at the end, in the last call that held
        images; in a multimodal LLM one row per image in prompt order (per crop, per frame), newlines not counted."""
        return self.layer_maps[-1]

    @property
    def layer_maps(self) -> list[TokenMap]:
        """Image tokens to the tokens after each layer that reduced, in the last call; at least one."""
        part, last = self._last()
        if isinstance(last, Record):
            return [last.token_map]
        maps = [] if last.front is None else [last.front]
        for step in last.maps:
            maps.append(maps[-1].compose(step) if maps else step)
        if not maps:
            maps = [TokenMap.identity(last.batch, last.entry)]
        return [step.drop_prefix(last.prefix) for step in maps]

    @property
    def grids(self) -> tuple[tuple[int, int] | None, ...]:
        """(rows, columns) of the image tokens in each row of `token_map`, for pictures; None where they fill no
        rectangle (an image cut to its shape) or nobody knows."""
        _, last = self._last()
        if isinstance(last, Record):
            return last.grids
        return last.grid or (None,) * last.batch

    @property
    def kept(self) -> Tensor:
        """[B, L] bool: which columns of the prompt a multimodal LLM's decoder was given in the last call with images.
        Logits of a forward and hidden states are those of these columns, in order."""
        _, last = self._last()
        if not isinstance(last, Record):
            raise VTCError("kept speaks of prompts, and this model is a vision encoder: see token_map")
        return last.kept

    @property
    def report(self) -> Report:
        """What the last call did: tokens per layer and image, MACs before and after."""
        part, last = self._last()
        if isinstance(part, Intake):
            assert isinstance(last, Record)
            return _prompt_report(self.method, part, last)
        assert isinstance(last, Stage)
        return _report(self.method.name, part, last)

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.method.options().items())
        where = ", ".join(part.where for part in self._parts)
        try:
            last = f"; last call {self.report}"
        except VTCError:
            last = "; no call yet"
        return f"Handle({self.method.name}({options}) in {where}{last})"


def _prompt_report(method: Method, intake: Intake, record: Record) -> Report:
    """Of a multimodal LLM: the decoder's prefill, and the tower where the method works in it."""
    decoder = getattr(intake.inner, intake.family.decoder)
    before, after = record.lengths, tuple(record.token_map.mask().sum(1).tolist())
    dense = record.real.sum(1).tolist()
    steps = [record]  # the last first
    while steps[-1].earlier is not None:
        steps.append(steps[-1].earlier)
    prompts, kept = [], []  # of every layer: the lengths of the prompts, the part of the image tokens that is there
    for layer in range(len(decoder.layers)):
        there = next((step for step in steps if step.layer <= layer), None)
        prompts.append(dense if there is None else there.prompts)
        kept.append(1.0 if there is None else int(there.token_map.mask().sum()) / max(1, sum(before)))
    macs = [
        sum(decoder_macs(decoder, n) for n in dense),
        sum(decoder_macs(decoder, n) for n in zip(*prompts, strict=True)),
    ]
    if intake.tower is not None and intake.tower.stage is not None:
        inside = _report(method.name, intake.tower, intake.tower.stage)
        macs = [macs[0] + inside.macs_before, macs[1] + inside.macs_after]
    flow = tuple((_plain(counts),) * 2 for counts in prompts)
    notes = "; ".join(dict.fromkeys(step.notes for step in reversed(steps) if step.notes))
    layers = tuple(kept) if len(set(kept)) > 1 else ()
    return Report(
        method.name, len(before), before, after, flow, macs[0], macs[1], intake.where, notes, tuple(dense), layers
    )


def _report(name: str, tower: Tower, stage: Stage) -> Report:
    images, prefix = stage.batch, stage.prefix

    def each(count: Any) -> list[int]:
        return [int(n) for n in count] if isinstance(count, Tensor) else [int(count)] * images

    flow = [(each(a), each(b)) for a, b in stage.flow]
    seen = flow[0][0]  # what the encoder was given; a resized image had more
    entry = seen if stage.front is None else each(stage.front.group.shape[1])
    before = macs = 0
    for b in range(images):
        before += tower.site.macs.dense(entry[b] - prefix)
        macs += tower.site.macs.total([a[b] for a, _ in flow], [m[b] for _, m in flow], seen[b] - prefix)

    return Report(
        name,
        images,
        tuple(n - prefix for n in entry),
        tuple(n - prefix for n in flow[-1][1]),
        tuple((_plain(a), _plain(b)) for a, b in flow),
        before,
        macs,
        tower.site.path,
    )


def _plain(counts: list[int]) -> Any:
    return counts[0] if len(set(counts)) == 1 else tuple(counts)


def list_methods() -> dict[str, str]:
    """Name and one-line description of every method."""
    return {name: cls.summary for name, cls in METHODS.items()}


def list_adapters() -> dict[str, str]:
    """Name of every adapter and the model families it covers."""
    known = {name: adapter.covers for name, adapter in adapters.ADAPTERS.items()}
    return {**known, **{name: family.covers for name, family in multimodal.FAMILIES.items()}}


__all__ = ["Explanation", "Handle", "Report", "compress", "explain", "list_adapters", "list_methods", "remove"]
