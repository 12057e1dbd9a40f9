"""compress, remove, explain: put a method into a model, take it out again, say beforehand what would happen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from vtc import adapters
from vtc.adapters.site import Refusal, Site, check_blocks
from vtc.adapters.stage import Stage
from vtc.adapters.tower import PatchedForward, Tower, strip
from vtc.errors import OptionError, UnsupportedModelError, VTCError
from vtc.methods import METHODS, Method, make
from vtc.token_map import TokenMap


def compress(model: nn.Module, method: str | Method, **options: Any) -> Handle:
    """Patch `model` in place so that its vision encoders work on fewer tokens. Takes itself off with `handle.remove()`,
    `vtc.remove(model)` or at the end of a `with` block.

    Args:
        model: a model of timm, open_clip or transformers, or one that contains such an encoder.
        method: a name (`vtc.list_methods()`) with its options, or a ready method: `vtc.PiToMe(keep=0.9)`.

    Returns:
        A `Handle`. Outputs keep their shape: merged tokens are copied back to the places they came from after the last
        block. A model that is compressed already gets the new method instead of the old one.

    Raises:
        OptionError: unknown method or option, a value out of range.
        UnsupportedModelError: no encoder that can be reduced, and why. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}: compress takes a torch.nn.Module")
    chosen = make(method, **options)
    plan = explain(model, chosen)
    if not plan.ok:
        raise UnsupportedModelError(str(plan))
    remove(model)
    towers: list[Tower] = []
    try:
        for site in plan._sites:
            towers.append(Tower(site, chosen))
            towers[-1].install()
    except BaseException:
        remove(model)
        raise
    return Handle(model, chosen, tuple(towers))


def remove(model: nn.Module) -> None:
    """Take every patch of vtc off `model`. Does nothing to a model without."""
    for module in model.modules():
        strip(module)


def explain(model: nn.Module, method: str | Method | None = None, **options: Any) -> Explanation:
    """What `compress` would do to `model`: which encoders, which layers, what is left out and why. Changes nothing.

    `method` may be a name without a budget.
    """
    if isinstance(method, str) and not {"keep", "r", "flops"} & set(options):
        options["keep"] = 1.0
    chosen = None if method is None else make(method, **options)
    sites: list[Site] = []
    found: list[Encoder] = []
    for adapter, item in adapters.find(model):
        if isinstance(item, Refusal):
            found.append(Encoder(item.path, item.kind, adapter, refusal=item.reason))
            continue
        reason = _refuses(item, chosen)
        depth = len(item.blocks)
        found.append(Encoder(item.path, item.kind, adapter, depth, item.prefix, _reduced(item, chosen), reason))
        if not reason:
            sites.append(item)
    name = None if chosen is None else chosen.name
    return Explanation(type(model).__name__, name, tuple(found), tuple(sites))


def _refuses(site: Site, method: Method | None) -> str:
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
    if getattr(method, "mode", "") == "resize" and isinstance(site.resizable, str):
        return f'mode="resize": {site.resizable}; mode="pool" works'
    return ""


def _reduced(site: Site, method: Method | None) -> str:
    if method is None:
        return ""
    if getattr(method, "mode", "") == "resize":
        return "the image, before the first layer"
    return "layer 0" if method.one_shot else f"layers 0-{len(site.blocks) - 1}, between attention and MLP"


@dataclass(frozen=True)
class Encoder:
    """One encoder that was found: where, what, how deep, where tokens would go; or why not."""

    path: str
    kind: str
    adapter: str
    layers: int = 0
    prefix_tokens: int = 0
    reduces: str = ""
    refusal: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        if self.refusal:
            return f"{where}{self.kind} is left alone: {self.refusal}"
        at = f", reduced at {self.reduces}" if self.reduces else ""
        prefix = f"{self.prefix_tokens} prefix token{'s' * (self.prefix_tokens != 1)}"
        return f"{where}{self.kind} ({self.adapter}), {self.layers} layers, {prefix}{at}"


@dataclass(frozen=True)
class Explanation:
    """What would be patched, and what not and why. Prints as sentences; `to_dict()` is plain data."""

    model: str
    method: str | None
    encoders: tuple[Encoder, ...]
    _sites: tuple[Site, ...] = ()

    @property
    def ok(self) -> bool:
        """True if something would be reduced and nothing would be left out."""
        return bool(self.encoders) and not any(encoder.refusal for encoder in self.encoders)

    def to_dict(self) -> dict[str, Any]:
        encoders = [asdict(encoder) for encoder in self.encoders]
        return {"model": self.model, "method": self.method, "ok": self.ok, "encoders": encoders, "text": str(self)}

    def __str__(self) -> str:
        if not self.encoders:
            known = "; ".join(f"{a.name}: {a.covers}" for a in adapters.ADAPTERS.values())
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
        macs_before, macs_after: multiply-adds of the encoder for the whole call.
    """

    method: str
    images: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    tokens: tuple[tuple[Any, Any], ...]
    macs_before: int
    macs_after: int
    path: str = ""

    @property
    def macs_ratio(self) -> float:
        """The fraction of multiply-adds that remained."""
        return self.macs_after / self.macs_before

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "macs_ratio": self.macs_ratio}

    def __str__(self) -> str:
        def span(values: tuple[int, ...]) -> str:
            return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"

        kept = sum(self.after) / max(1, sum(self.before))
        return (
            f"{self.method}: {span(self.before)} -> {span(self.after)} image tokens ({kept:.1%} kept, {1 - kept:.1%} "
            f"removed), {self.images} image{'s' * (self.images != 1)}, {self.macs_before / 1e9:.2f} -> "
            f"{self.macs_after / 1e9:.2f} GMACs ({self.macs_ratio:.1%} remain)"
        )


class Handle:
    """A compressed model's method, what it did last, and the way back."""

    def __init__(self, model: nn.Module, method: Method, towers: tuple[Tower, ...]) -> None:
        self.model, self.method, self._towers = model, method, towers

    def remove(self) -> None:
        """Give the model back as it was. Nothing happens if it is, or if another method took this one's place."""
        for tower in self._towers:
            for patch in tower.patched:
                if patch.block.__dict__.get(patch.name) is patch:
                    remove(self.model)
                    return

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _stage(self) -> tuple[Tower, Stage]:
        for tower in self._towers:
            if tower.stage is not None and tower.stage.layer == len(tower.site.blocks):
                return tower, tower.stage
        raise VTCError("nothing to report yet: no call with an image has gone through the compressed model")

    @property
    def token_map(self) -> TokenMap:
        """Image tokens (without CLS and other prefix tokens) to the tokens at the encoder's end, in the last call."""
        return self.layer_maps[-1]

    @property
    def layer_maps(self) -> list[TokenMap]:
        """Image tokens to the tokens after each layer that reduced, in the last call; at least one."""
        tower, stage = self._stage()
        maps = [] if stage.front is None else [stage.front]
        for step in stage.maps:
            maps.append(maps[-1].compose(step) if maps else step)
        if not maps:
            maps = [TokenMap.identity(stage.batch, stage.entry)]
        return [step.drop_prefix(stage.prefix) for step in maps]

    @property
    def report(self) -> Report:
        """What the last call did: tokens per layer and image, MACs before and after."""
        tower, stage = self._stage()
        return _report(self.method.name, tower, stage)

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.method.options().items())
        where = ", ".join(tower.site.path or tower.site.kind for tower in self._towers)
        try:
            last = f"; last call {self.report}"
        except VTCError:
            last = "; no call yet"
        return f"Handle({self.method.name}({options}) in {where}{last})"


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

    def plain(counts: list[int]) -> Any:
        return counts[0] if len(set(counts)) == 1 else tuple(counts)

    return Report(
        name,
        images,
        tuple(n - prefix for n in entry),
        tuple(n - prefix for n in flow[-1][1]),
        tuple((plain(a), plain(b)) for a, b in flow),
        before,
        macs,
        tower.site.path,
    )


def list_methods() -> dict[str, str]:
    """Name and one-line description of every method."""
    return {name: cls.summary for name, cls in METHODS.items()}


def list_adapters() -> dict[str, str]:
    """Name of every adapter and the model families it covers."""
    return {name: adapter.covers for name, adapter in adapters.ADAPTERS.items()}


__all__ = ["Explanation", "Handle", "Report", "compress", "explain", "list_adapters", "list_methods", "remove"]
