"""compress, remove: put a method into a model, say what it did, take it out again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from vtc.adapters.encoders.patch import EncoderPatch
from vtc.adapters.encoders.site import EncoderSite
from vtc.adapters.encoders.state import CallState
from vtc.adapters.multimodal.patch import MultimodalPatch
from vtc.adapters.multimodal.token_batch import CallRecord
from vtc.adapters.patch import strip
from vtc.errors import OptionError, UnsupportedModelError, VTCError
from vtc.macs import decoder_macs
from vtc.methods import METHODS, Method, make
from vtc.plan import explain, in_tower, tower_site
from vtc.token_map import TokenMap


def compress(model: nn.Module, method: str | Method, **options: Any) -> Handle:
    """`vtc.compress` with a budget that is known."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}: compress takes a torch.nn.Module")
    chosen = make(method, **options)
    plan = explain(model, chosen)
    if not plan.ok:
        raise UnsupportedModelError(str(plan))
    remove(model)
    parts: list[EncoderPatch | MultimodalPatch] = []
    try:
        for site in plan._sites:
            if isinstance(site, EncoderSite):
                parts.append(EncoderPatch(site, chosen))
            else:
                inside = EncoderPatch(tower_site(site), in_tower(chosen)) if chosen.where == "tower" else None  # type: ignore[arg-type]
                parts.append(MultimodalPatch(site.family, site.path, site.inner, site.owners, chosen, inside))
            parts[-1].install(model)
    except BaseException:
        remove(model)
        raise
    return Handle(model, chosen, tuple(parts))


def remove(model: nn.Module) -> None:
    """Take every patch of vtc off `model`. Does nothing to a model without."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}: remove takes a torch.nn.Module")
    for module in model.modules():
        strip(module)


@dataclass(frozen=True)
class Report:
    """What happened in the last call.

    Attributes:
        tokens: per layer (tokens into attention, tokens into the MLP), prefix included; per image if they differ.
        before, after: image tokens at the encoder's entry and end, one per image.
        macs_before, macs_after: multiply-adds of the encoder for the whole call; in a multimodal LLM those of the
            decoder's prefill, without the language head.
        notes: what the method chose by itself; which call or encoder this is of, where that is not plain.
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
        if self.layers:
            return sum(self.layers) / len(self.layers)
        return sum(self.after) / sum(self.before) if any(self.before) else 1.0

    @property
    def macs_ratio(self) -> float:
        """The fraction of multiply-adds that remained."""
        return self.macs_after / self.macs_before if self.macs_before else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kept": self.kept, "macs_ratio": self.macs_ratio}

    def __str__(self) -> str:
        def span(values: tuple[int, ...]) -> str:
            return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}" if values else "no"

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
    """A compressed model's method, what it did last, and the way back. `choice`: what keep="auto" measured."""

    choice: Any = None

    def __init__(self, model: nn.Module, method: Method, parts: tuple[EncoderPatch | MultimodalPatch, ...]) -> None:
        self.model, self.method, self.patches = model, method, parts

    def remove(self) -> None:
        """Give the model back as it was. Nothing happens if it is, or if another method took this one's place."""
        for part in self.patches:
            if any(patch.installed for patch in part.patched):
                remove(self.model)
                return

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _ran(self) -> list[EncoderPatch | MultimodalPatch]:
        """The parts that have something to tell, the one that ran last at the end."""
        ran = [part for part in self.patches if _told(part) is not None]
        if not ran:
            raise VTCError("nothing to report yet: no call with an image has gone through the compressed model")
        return sorted(ran, key=lambda part: part.turn)

    def _last(self) -> tuple[EncoderPatch, CallState] | tuple[MultimodalPatch, CallRecord]:
        part = self._ran()[-1]
        return part, _told(part)  # type: ignore[return-value]

    @property
    def token_map(self) -> TokenMap:
        """Image tokens (without CLS and other prefix tokens) to the tokens at the end, in the last call that held
        images; in a multimodal LLM one row per image in prompt order (per crop, per frame), newlines not counted."""
        return self.layer_maps[-1]

    @property
    def layer_maps(self) -> list[TokenMap]:
        """Image tokens to the tokens after each layer that reduced, in the last call; at least one."""
        part, last = self._last()
        if isinstance(last, CallRecord):
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
        if isinstance(last, CallRecord):
            return last.grids
        return last.grid or (None,) * last.batch

    @property
    def kept(self) -> Tensor:
        """[B, L] bool: which columns of the prompt a multimodal LLM's decoder was given in the last call with images.
        Logits of a forward and hidden states are those of these columns, in order."""
        _, last = self._last()
        if not isinstance(last, CallRecord):
            raise VTCError("kept speaks of prompts, and this model is a vision encoder: see token_map")
        return last.kept

    def take(self, values: Tensor, fill: float = 0) -> Tensor:
        """[B, L], one for each column of the prompt (labels, a mask) -> [B, S], one for each of the logits of the last
        call with images; `fill` on padding. For what compares logits by itself, as label smoothing does; labels of a
        batch want -100 in their first column, which padding may come to stand before."""
        _, last = self._last()
        if not isinstance(last, CallRecord):
            raise VTCError("take speaks of prompts, and this model is a vision encoder: see token_map")
        return last.take(values, fill)

    @property
    def report(self) -> Report:
        """What the last call did: tokens per layer and image, MACs before and after. Of a model with several encoders,
        what the one did that ran last; see `reports`."""
        return self._report(self._ran()[-1])

    @property
    def reports(self) -> tuple[Report, ...]:
        """The last report of every encoder that has run, the latest at the end."""
        return tuple(map(self._report, self._ran()))

    def _report(self, part: EncoderPatch | MultimodalPatch) -> Report:
        if isinstance(part, MultimodalPatch):
            assert part.record is not None
            return _prompt_report(self.method, part, part.record)
        assert part.stage is not None
        report, notes = _report(self.method.name, part, part.stage), []
        if part.idle_calls:
            notes.append("no image in the last call: this is of an earlier one")
        if len(self.patches) > 1:
            notes.append(f"encoder {part.where}, one of {len(self.patches)}: handle.reports has all")
        return replace(report, notes="; ".join(notes))

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.method.options().items())
        where = ", ".join(part.where for part in self.patches)
        try:
            last = "; last call " + " | ".join(map(str, self.reports))
        except VTCError:
            last = "; no call yet"
        return f"Handle({self.method.name}({options}) in {where}{last})"


def _prompt_report(method: Method, parent: MultimodalPatch, record: CallRecord) -> Report:
    """Of a multimodal LLM: the decoder's prefill, and the tower where the method works in it."""
    decoder = getattr(parent.inner, parent.family.decoder)
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
    if parent.tower is not None and parent.inside is not None:
        inside = _report(method.name, parent.tower, parent.inside)
        macs = [macs[0] + inside.macs_before, macs[1] + inside.macs_after]
    flow = tuple((_plain(counts),) * 2 for counts in prompts)
    said = [step.notes for step in reversed(steps)]
    if parent.bare_calls:
        said.append("the last prompt held no image: this is of the last one that did")
    notes = "; ".join(dict.fromkeys(filter(None, said)))
    layers = tuple(kept) if len(set(kept)) > 1 else ()
    return Report(
        method.name, len(before), before, after, flow, macs[0], macs[1], parent.where, notes, tuple(dense), layers
    )


def _told(part: EncoderPatch | MultimodalPatch) -> CallState | CallRecord | None:
    return part.stage if isinstance(part, EncoderPatch) else part.record


def _report(name: str, tower: EncoderPatch, stage: CallState) -> Report:
    images, prefix, site = stage.batch, stage.prefix, tower.site

    def each(count: Any) -> list[int]:
        return [int(n) for n in count] if isinstance(count, Tensor) else [int(count)] * images

    flow = [(each(a), each(b)) for a, b in stage.flow]
    seen = flow[0][0]  # what the encoder was given; a resized image had more
    entry = seen if stage.front is None else each(stage.front.group.shape[1])
    costs = site.macs.first(stage.layer)
    before = macs = 0
    for b in range(images):
        before += costs.dense(entry[b] - prefix)
        macs += costs.total([a[b] for a, _ in flow], [m[b] for _, m in flow], seen[b] - prefix)

    return Report(
        name,
        images,
        tuple(n - prefix for n in entry),
        tuple(n - prefix for n in flow[-1][1]),
        tuple((_plain(a), _plain(b)) for a, b in flow),
        before,
        macs,
        site.path,
    )


def _plain(counts: list[int]) -> Any:
    return counts[0] if len(set(counts)) == 1 else tuple(counts)


def list_methods() -> dict[str, str]:
    """Name and one-line description of every method."""
    return {name: cls.summary for name, cls in METHODS.items()}
