"""How any pre-norm block of transformers works, found by running it once; the trial proves what is found.

    x = x + [scale *] attention(norm1(x)) ...        x = x + [scale *] mlp(norm2(x)) ...

The direct parts of a block are called one after the other, each with what those before it gave. A copy of the block
with random weights runs once while these calls are noted; what a part is given that no part has made must be the
residual. To attend, or to feed, is then to make the same calls again, with other tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.attention_tap import AttentionTap, biased, interfaced, tapped
from vtc.adapters.encoders.arguments import named, parameters_of
from vtc.adapters.encoders.copies import floats, kind_of, stand_in, width_of
from vtc.adapters.encoders.reasons import attends
from vtc.adapters.encoders.site import Block, projected_keys
from vtc.adapters.encoders.state import CallState
from vtc.adapters.encoders.transformers_blocks import rotary_tables
from vtc.errors import first_line
from vtc.scores.attention import head_mean

_MASKS = ("attention_mask", "attn_mask", "mask")
_TABLES = "position_embeddings"  # (cosines, sines) [N, head width], a row for each token, the same for all images
_TOKENS = 23


class Unknown(Exception):
    """Why blocks do not work as told above, behind "its blocks"."""


@dataclass(frozen=True)
class Ref:
    """Where a value comes from: "x", the tokens; "zero", in the residual's place; "out", the output of a call (and
    which of several), times a parameter of the block; "given", an argument of the block; "is", the value itself."""

    kind: str
    value: Any = None
    item: int | None = None
    scale: str = ""


@dataclass(frozen=True)
class Call:
    """One call of a part of the block."""

    part: str
    args: tuple[Ref, ...]
    kwargs: tuple[tuple[str, Ref], ...]


@dataclass(frozen=True)
class Branch:
    """Calls that lead to what is added to the residual: where that comes from."""

    calls: tuple[Call, ...]
    ends: Ref

    def run(self, block: Any, x: Tensor, given: dict[str, Any], attention: str = "", attend: Any = None) -> Tensor:
        """given: the block's own arguments; attend: what is called with the part named `attention`, and its arguments,
        instead of that part."""
        outs: list[Any] = []

        def value(ref: Ref) -> Any:
            if ref.kind == "x":
                return x
            if ref.kind == "zero":
                return torch.zeros_like(x)
            if ref.kind == "given":
                return given.get(ref.value)
            if ref.kind == "is":
                return ref.value
            out = outs[ref.value] if ref.item is None else outs[ref.value][ref.item]
            return getattr(block, ref.scale) * out if ref.scale else out

        for call in self.calls:
            part, args = getattr(block, call.part), [value(ref) for ref in call.args]
            kwargs = {name: value(ref) for name, ref in call.kwargs}
            outs.append(attend(part, args, kwargs) if call.part == attention else part(*args, **kwargs))
        return value(self.ends)


@dataclass(frozen=True)
class PreNorm:
    """What was found of one kind of block.

    Attributes:
        first, second: the branches. attention: the part that attends.
        heads: of keys; size: of all queries, heads x head width.
        keys: the module in the attention whose output holds the keys; "" = they are the middle third of what its
            `fused` projection gives.
        mask: the attention's parameter for a mask; "" = it has none, and the sizes go in at transformers' interface.
        names: the arguments of the block's forward behind its tokens; takes: those of the attention's.
        wrapped: the block gives its tokens in a tuple.
        turns: the width of the rows of the rotary tables that the block must be given; 0 = none.
    """

    first: Branch
    second: Branch
    attention: str
    heads: int
    size: int
    keys: str
    fused: str
    mask: str
    names: tuple[str, ...]
    takes: tuple[str, ...]
    wrapped: bool
    turns: int = 0

    def attend(self, block: Any, x: Tensor, stage: CallState | None, args: tuple, kwargs: dict) -> Tensor:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if stage is None or stage.total is None or not self.turns:
            return self.attended(block, x, given, () if stage is None else (stage.bias(x),))
        # the attention takes one table for all images, and now each has its own rows of it: they attend one by one
        sizes = stage.bias(x)
        each = [None] * len(x) if sizes is None else sizes.expand(len(x), -1, -1, -1).split(1)
        rows = [{_TABLES: tuple(table[at] for table in given[_TABLES])} for at in stage.total.anchor.clamp(min=0)]
        many = zip(x.split(1), rows, each, strict=True)
        return torch.cat([self.attended(block, one, given | its, (size,)) for one, its, size in many])

    def attended(self, block: Any, x: Tensor, given: dict[str, Any], sizes: tuple[Tensor | None, ...] = ()) -> Tensor:
        """given: the block's own arguments; sizes: what takes the place of the mask among them, or ()."""
        extra = {name: value for name, value in given.items() if name not in self.names}

        def call(part: Any, args: list, own: dict[str, Any]) -> Any:
            own = {**dict(zip(self.takes, args, strict=False)), **own, **extra}
            if not sizes or self.mask:
                return part(**own | ({self.mask: sizes[0]} if sizes else {}))
            with biased(sizes[0]):
                return part(**own)

        return self.first.run(block, x, given, self.attention, call)

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return self.second.run(block, x, {})

    def parts(self, block: Any) -> tuple[nn.Module, nn.Module]:
        names = dict.fromkeys(call.part for call in self.second.calls)
        return getattr(block, self.attention), nn.ModuleList([getattr(block, name) for name in names])

    def width(self, block: Any) -> int:
        return self.size

    def count(self, block: Any) -> int:
        return self.heads

    def key_module(self, block: Any) -> nn.Module:
        return getattr(block, self.attention).get_submodule(self.keys)

    def key_product(self, block: Any, x: Tensor) -> Tensor:
        """Keys of a fused projection, of the input that the attention gets."""
        before: list[Tensor] = []

        def stop(part: Any, args: list, own: dict[str, Any]) -> Any:
            before.append(args[0] if args else own[self.takes[0]])
            return x if self.first.ends.item is None else (x,) * 4

        self.first.run(block, x, {}, self.attention, stop)
        fused: Any = getattr(block, self.attention).get_submodule(self.fused)
        return projected_keys(before[0].detach(), fused.weight, fused.bias, self.heads)

    def block(self) -> Block:
        keys: dict[str, Any] = {"keys": self.key_module} if self.keys else {"project": self.key_product}
        keys |= {"example": self.example, "wrapped": self.wrapped, "taps": None if self.mask else self.interface}
        return Block(self.attend, self.feed, self.parts, self.width, self.count, **keys)

    def interface(self, block: Any) -> list[nn.Module]:
        return interfaced(getattr(block, self.attention))

    def example(self, block: Any, prefix: int) -> tuple[int, tuple, dict]:
        required = [n for n, p in parameters_of(type(block)).items() if p.default is p.empty]
        tables = rotary_tables(prefix + _TOKENS, self.turns, next(floats(block)))
        return prefix + _TOKENS, (), dict.fromkeys(required) | ({_TABLES: tables} if self.turns else {})


# -- finding out ----------------------------------------------------------------------------------------------------


_known: dict[tuple, PreNorm | str] = {}


def found(block: nn.Module) -> PreNorm:
    """How a block works, from a copy of it with random weights; those that are alike are examined once.

    Raises:
        Unknown: it is no pre-norm block, and why.
    """
    kind = kind_of(block)
    if kind not in _known:
        try:
            attention = next((child for name, child in block.named_children() if attends(name, child)), block)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                _known[kind] = examine(stand_in(block), width_of(block, attention))
        except Exception as error:  # whatever a foreign block may raise
            _known[kind] = str(error) if isinstance(error, Unknown) else f"do not run alone: {first_line(error)}"
    known = _known[kind]
    if isinstance(known, str):
        raise Unknown(known)
    return known


def examine(block: Any, width: int) -> PreNorm:
    """How a block works. block: a copy in float32 that holds numbers. Raises Unknown."""
    names = [name for name, child in block.named_children() if attends(name, child)]
    if len(names) != 1:
        raise Unknown(f"attend in {len(names)} of their parts")
    inside = getattr(block, names[0])
    parameters = parameters_of(type(block))
    strange = [n for n, p in parameters.items() if p.default is p.empty and n not in (*_MASKS, _TABLES)]
    if strange:
        raise Unknown(f"are given {' and '.join(strange)}, which vtc does not know how to shorten")
    given = {n: None if p.default is p.empty else p.default for n, p in parameters.items()}
    like = next(floats(block))  # of a copy float32; packed weights are tried as they are
    given |= {n: torch.zeros(1, 1, _TOKENS, _TOKENS).to(like) for n in _MASKS if n in parameters}
    if _TABLES in parameters and parameters[_TABLES].default is inspect.Parameter.empty:
        still = torch.ones(_TOKENS, inside.head_dim).to(like)  # angles of 0, so that keys are seen as they were
        given[_TABLES] = (still, torch.zeros_like(still))
    x = torch.randn(1, _TOKENS, width, generator=torch.Generator().manual_seed(0)).to(like)
    with tapped(interfaced(inside), plain=True) as taps:
        return _examined(block, names[0], x, given, taps)


def _examined(block: Any, name: str, x: Tensor, given: dict[str, Any], taps: list[AttentionTap]) -> PreNorm:
    """The same, with taps on its attention, the part called `name`; given: the block's other arguments."""
    inside = getattr(block, name)
    out, calls, outputs, taken = _record(block, inside, x, given, taps)
    wrapped = isinstance(out, tuple)
    out = out[0] if wrapped else out
    if not isinstance(out, Tensor):
        raise Unknown(f"give a {type(out).__name__}, not one tensor of tokens")
    first, mid, rest = _branch(block, x, calls, given, None)
    second, end, left = _branch(block, mid, rest, {}, out)
    if left or end is not out:
        raise Unknown("call their parts in an order of their own")
    if name not in {call.part for call in first.calls} or name in {call.part for call in second.calls}:
        raise Unknown("do not attend first")
    takes = tuple(parameters_of(type(inside), 1))
    mask = next((name for name in _MASKS if name in takes), "")
    if len(taken) != 1:
        raise Unknown("attend past transformers' interface, where the sizes of merged tokens could go in")
    query, key, *_ = taken[0]
    mean, heads = head_mean(key, key.shape[1]), key.shape[1]
    keys = [path for path, o in outputs.items() if path and _same_keys(o, mean, heads)]
    three = 3 * key.shape[1] * key.shape[-1]
    fused = [path for path, module in inside.named_modules() if getattr(module, "out_features", 0) == three]
    size = query.shape[1] * query.shape[-1]
    made = PreNorm(
        *(first, second, name, heads, size, (keys or [""])[-1], (fused or [""])[0], mask),
        *(tuple(given), takes, wrapped, given[_TABLES][0].shape[-1] if given.get(_TABLES) else 0),
    )
    if _reads_places(made, block, x):
        raise Unknown("attend by where a token stands in the row (positions or windows inside the attention)")
    if not keys and not (fused and _same_keys(made.key_product(block, x), mean, 1)):
        raise Unknown("show none of the keys that they compare")
    return made


def _record(
    block: Any, inside: Any, x: Tensor, given: dict[str, Any], taps: list[AttentionTap]
) -> tuple[Any, list, dict[str, Any], list]:
    """Run a block: what it gives; the calls of its parts (name, arguments, output); the outputs of all modules of its
    attention; and the queries and keys that reached transformers' interface."""
    calls: list[Any] = []
    outputs: dict[str, Any] = {}
    taken: list[tuple] = []

    def called(name: str) -> Callable[..., None]:
        return lambda part, args, kwargs, out: calls.append((name, *named(part, args, kwargs), out))

    def gave(path: str) -> Callable[..., None]:
        return lambda part, args, out: outputs.update({path: out})

    hooks = [part.register_forward_hook(called(name), with_kwargs=True) for name, part in block.named_children()]
    hooks += [module.register_forward_hook(gave(path)) for path, module in inside.named_modules()]
    try:
        for tap in taps:
            tap.calls = taken
        return block(x, **given), calls, outputs, taken
    finally:
        for tap in taps:
            tap.calls = None
        for hook in hooks:
            hook.remove()


def _reads_places(found: PreNorm, block: Any, x: Tensor) -> bool:
    """Does another order of the tokens give more than that order? Not of a causal attention, which the trial names."""

    every, tables = torch.arange(_TOKENS), rotary_tables(_TOKENS, found.turns, x)

    def attended(x: Tensor, rows: Tensor = every) -> Tensor:
        return found.attended(block, x, {_TABLES: tuple(table[rows] for table in tables)} if found.turns else {})

    plain, order, other = attended(x), every.flip(0), x.clone()
    other[:, -1] = -other[:, -1]
    causal = torch.equal(attended(other)[:, :-1], plain[:, :-1])
    return not causal and not _near(attended(x[:, order], order), plain[:, order])


def _same_keys(out: Any, mean: Tensor, heads: int) -> bool:
    if not isinstance(out, Tensor) or out.shape[-1] * (out.ndim == 3) not in (heads * mean.shape[-1], 0):
        return False
    try:
        own = head_mean(out, heads)
    except Exception:  # einops says in its own way that the shape is another
        return False
    return own.shape == mean.shape and _near(own, mean)


def _near(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-4 if one.dtype == other.dtype == torch.float32 else 0.05
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def _branch(
    block: Any, x: Tensor, calls: list, given: dict[str, Any], last: Tensor | None
) -> tuple[Branch, Tensor, list]:
    """The calls up to the next residual, that residual, and the calls behind it. given: the block's own arguments;
    last: what the residual is, None = what a call is given that none has made."""
    made: list[Call] = []
    outs: list[Any] = []
    known: list[tuple[Any, Ref]] = [(x, Ref("x"))]

    def ref(value: Any, name: str = "") -> Ref:
        if name in given and given[name] is value:
            return Ref("given", name)
        if isinstance(value, Tensor):
            found = [r for v, r in known if v is value]
            found = found or [r for v, r in _scaled(block, known) if r.scale and torch.equal(v, value)]
            if not found:
                raise LookupError
            return found[-1]
        if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            raise Unknown("hand several tensors at once to a part")
        return Ref("is", value)

    for at, (name, args, kwargs, out) in enumerate(calls):
        try:
            call = Call(name, tuple(map(ref, args)), tuple((k, ref(v, k)) for k, v in kwargs.items()))
        except LookupError:
            new = next(
                v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and not any(v is k for k, _ in known)
            )
            return Branch(tuple(made), _residual(block, x, known, new)), new, calls[at:]
        made.append(call)
        outs.append(out)
        number = len(outs) - 1
        if isinstance(out, tuple):
            known += [(v, Ref("out", number, i)) for i, v in enumerate(out) if isinstance(v, Tensor)]
        else:
            known.append((out, Ref("out", number)))
    if last is None:
        raise Unknown("add nothing to their tokens behind the attention")
    if outs and outs[-1] is last:  # the last part adds the residual itself: nothing, in its place, leaves the branch
        *rest, end = made
        zero = Ref("zero")
        swapped = tuple(zero if i and r.kind == "x" else r for i, r in enumerate(end.args))
        end = Call(end.part, swapped, tuple((k, zero if r.kind == "x" else r) for k, r in end.kwargs))
        return Branch((*rest, end), Ref("out", len(outs) - 1)), last, []
    return Branch(tuple(made), _residual(block, x, known, last)), last, []


def _residual(block: Any, x: Tensor, known: list[tuple[Any, Ref]], new: Tensor) -> Ref:
    """What was added to `x` to make `new`."""
    for value, ref in _scaled(block, known):
        if value.shape == x.shape and torch.equal(x + value, new):
            return ref
    raise Unknown("have something between their parts that is no residual connection")


def _scaled(block: Any, known: list[tuple[Any, Ref]]) -> Iterator[tuple[Tensor, Ref]]:
    """Outputs, the last first, and each times every one of the block's own parameters that fits."""
    for value, ref in reversed(known):
        if ref.kind == "out" and isinstance(value, Tensor):
            yield value, ref
            for name, scale in block.named_parameters(recurse=False):
                if scale.ndim == 0 or scale.shape[-1] in (1, value.shape[-1]):
                    yield scale * value, replace(ref, scale=name)
