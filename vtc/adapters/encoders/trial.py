"""The trial: an adapter's description of an encoder is checked by running it, before anything is patched.

Do as many tokens reach the first block as the adapter counts? Does every block compute `x + attend(x)`, then
`x + feed(x)`, to the last bit? Do sizes have the right effect: sizes that are all 1 change nothing, and a token of size
4 counts as that token four times? All but the second question are checked on copies with random weights, so that a
model on the meta device, one that is offloaded and one in half precision get the same answers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.attention_tap import tapped
from vtc.adapters.encoders.copies import bare_copy, floats, kind_of, on_meta, stand_in, width_of, zeros
from vtc.adapters.encoders.site import EncoderSite, unforeseen
from vtc.adapters.encoders.state import CallState
from vtc.errors import InputError, first_line
from vtc.scores.attention import head_mean
from vtc.token_map import TokenMap

_MASKS = {"attention_mask", "attn_mask", "mask"}  # read in a call, and cut or refused
_LOOSE = 0.05  # tolerance for a block that is not copied: half precision, quantized weights
_TIGHT = 1e-3


def check(site: EncoderSite) -> str:
    """Why `site` does not match its adapter's description, or ""."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            return check_entry(site) or check_blocks(site)
        except _Unreached as error:  # its blocks may give a better reason
            return check_blocks(site) or str(error)
        except Exception as error:  # from a model of unforeseen structure
            return unforeseen(error)


# -- what reaches the first block -----------------------------------------------------------------------------------


class _Passed(Exception):
    """The last block was called."""


class _Unreached(Exception):
    """A block was not called; the message says why."""


class _Passage(nn.Module):
    """Replaces the blocks of a copy: records what each receives, and ends the call at the last."""

    def __init__(self, index: int, last: bool, wrapped: bool, calls: list) -> None:
        super().__init__()
        self.index, self.last, self.wrapped, self.calls = index, last, wrapped, calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((self.index, args, kwargs))
        if self.last:
            raise _Passed
        x = args[0] if args else next(iter(kwargs.values()))
        return (x,) if self.wrapped else x


def check_entry(site: EncoderSite) -> str:
    """Run the encoder up to its last block on the meta device, with blocks that do nothing."""
    if site.encoder is None or site.probe is None:
        return ""
    patches: list = []
    calls = _calls(site, patches)
    if isinstance(calls, str):
        return calls
    names = list(inspect.signature(type(site.blocks[0]).forward).parameters)[1:]
    _, args, kwargs = calls[0]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x = given.pop(next(iter(given)))
    if not isinstance(x, Tensor) or x.ndim != 3:
        return f"its blocks take {_form(x)}, not one row of tokens for each image [B, N, C]"
    about = site.block.example(site.blocks[0], site.prefix)
    expected = {name for name, value in about[2].items() if value is not None} | _MASKS
    strange = [name for name, value in given.items() if name not in expected and _holds_tensor(value)]
    if strange:
        return f"its blocks are given {' and '.join(strange)}, which vtc does not know how to shorten"
    for name, value in given.items():
        if isinstance(value, (tuple, list)) and _holds_tensor(value):
            forms = [_rows(value, x.shape[1], site.prefix), _rows(about[2][name], about[0], site.prefix)]
            if forms[0] != forms[1]:
                return f"its blocks are given {name} of form {forms[0]}, and vtc can shorten those of form {forms[1]}"
    if site.suffix and (site.block.relative or any(map(_holds_tensor, given.values()))):
        return "its blocks are told where tokens stand, and some of its tokens stand behind the patches"
    for index, args, kwargs in calls[1:]:
        now = args[0] if args else next(iter(kwargs.values()))
        if now.shape != x.shape:
            return f"{now.shape[1]} tokens reach block {index}, and {x.shape[1]} the blocks before: they are no patches"
        if now is not x and not site.between:
            return f"it changes its tokens between block {index - 1} and block {index}, in a way vtc does not know"
    count = _patch_count(patches)
    if count and not site.shuffled and x.shape[1] != site.prefix + count:
        return (
            f"{x.shape[1]} tokens reach its first block for {count} patches, and vtc counts {site.prefix} prefix "
            f"token{'s' * (site.prefix != 1)}: the others would be taken for patches"
        )
    return ""


def check_passage(site: EncoderSite) -> str:
    """The same for blocks that run on a rectangle: do the patches of the image reach all of them, and nothing else?"""
    patches: list = []
    try:
        calls = _calls(site, patches)
    except _Unreached as error:
        return str(error)
    if isinstance(calls, str):
        return calls
    grid = patches[0].shape[2:] if len(patches) == 1 and patches[0].ndim == 4 else (0, 0)
    (_, args, kwargs), *later = calls
    given = [*args, *kwargs.values()]
    x = given.pop(0)
    rows = slice(1, 3) if site.rectangle == "last" else slice(2, 4)
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[rows] != grid:
        return f"its blocks take {_form(x)}, and {grid[0]}x{grid[1]} patches come out of the image"
    if any(map(_holds_tensor, given)):
        return "its blocks are given more tensors than their tokens, which vtc does not know how to shorten"
    for index, args, kwargs in later:
        if (args[0] if args else next(iter(kwargs.values()))) is not x:
            return f"it changes its tokens between block {index - 1} and block {index}, in a way vtc does not know"
    return ""


def _calls(site: EncoderSite, patches: list) -> list | str:
    """What every block of a copy is given, (index, args, kwargs), and in `patches` what the image was cut into; or why
    the blocks do not run in order. Raises _Unreached."""
    calls: list = []
    last = len(site.blocks) - 1
    try:
        _probe(site, calls, patches)
    except _Passed:
        pass
    except Exception as error:  # a foreign encoder may raise anything
        where = f"after block {len(calls) - 1}" if calls else "before the first"
        what = "it asks for the numbers in a tensor" if "meta tensor" in str(error) else first_line(error)
        raise _Unreached(
            f"it does not run its blocks one after the other on one image, as vtc expects: {where}, {what}"
        ) from error
    else:
        raise _Unreached(f"its call with one image runs {len(calls)} of its {last + 1} blocks")
    if [index for index, *_ in calls] != list(range(last + 1)):
        return f"it runs its blocks in the order {', '.join(str(index) for index, *_ in calls)}"
    return calls


def _probe(site: EncoderSite, calls: list, patches: list) -> None:
    """Call a copy on the meta device; where that fails for a tensor that its forward makes on the CPU, with those on
    meta too; where it reads numbers, on the CPU, with zeros."""
    assert site.encoder is not None and site.probe is not None
    last = len(site.blocks) - 1
    for tensor, default in ((on_meta, "cpu"), (on_meta, "meta"), (zeros, "cpu")):
        calls.clear()
        patches.clear()
        blocks = enumerate(site.blocks)
        known: dict[int, Any] = {id(b): _Passage(i, i == last, site.block.wrapped, calls) for i, b in blocks}
        encoder = bare_copy(site.encoder, tensor, known)
        known[id(site.patchify)].register_forward_hook(lambda module, args, output: patches.append(output))
        try:
            with torch.device(default):
                site.probe(encoder)
            return
        except RuntimeError as error:
            if "meta" not in str(error) or tensor is zeros:
                raise


def _rows(tables: Any, tokens: int, prefix: int) -> str:
    """The form of tables that are to be shortened, which have rows for tokens, or for patches alone."""
    rows = {tokens: "tokens", tokens - prefix: "patches"}
    forms = [[rows.get(table.shape[0], table.shape[0]), *table.shape[1:]] for table in tables]
    return " and ".join(f"[{', '.join(map(str, form))}]" for form in forms)


def _form(x: Any) -> str:
    return f"a tensor {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))


def _patch_count(outputs: list) -> int:
    """Patches in the output of the module that cuts: [B, C, h, w] (a clip's [B, C, t, h, w]), or [B, N, C]; 0 = another
    form."""
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        return 0
    shape = outputs[0].shape
    return shape[1] if len(shape) == 3 else shape[2:].numel() if len(shape) in (4, 5) else 0


# -- blocks ---------------------------------------------------------------------------------------------------------


def check_blocks(site: EncoderSite) -> str:
    """Check every block against its description, and the effect of sizes once for every kind of block."""
    tried = set()
    for index, block in enumerate(site.blocks):
        where = f"block {index} ({type(block).__name__})"
        kind = kind_of(block)
        copied = None if kind in tried else stand_in(block)
        tried.add(kind)
        try:
            if _here(block):
                reason = _exact(site, block, index)
            elif copied is None or copied is block or site.no_bias:
                continue
            else:
                reason = _exact(site, copied, index)
            if not reason and copied is not None:
                reason = _sizes(site, copied, block)
        except Exception as error:  # whatever a foreign block may raise
            reason = f"does not run as vtc knows it: {first_line(error)}"
        if reason:
            return f"{where} {reason}"
    return ""


def _exact(site: EncoderSite, block: nn.Module, seed: int) -> str:
    x, args, kwargs = _example(site, block, seed)
    with evaluating(block), torch.autocast(x.device.type, enabled=False):
        own: Any = block.forward(x, *args, **kwargs)
        if site.block.wrapped and isinstance(own, tuple):
            own = own[0]
        if not isinstance(own, Tensor):
            return f"gives a {type(own).__name__}, not one tensor of tokens"
        ours = x + site.block.attend(block, x, None, args, kwargs)
        ours = ours + site.block.feed(block, ours)
    if not own.isfinite().all():
        return "gives NaN or infinity on a trial: check the model's weights"
    if not torch.equal(own, ours):
        return f"computes something vtc does not know (difference {(own - ours).abs().max().item():.2g} on a trial)"
    return ""


def _sizes(site: EncoderSite, copied: nn.Module, block: nn.Module) -> str:
    """On the copy; on the block itself where a copy does not run (kernels of a GPU alone, quantized weights)."""
    if copied is not block and not site.no_bias:
        try:
            return _sizes_of(site, copied, _TIGHT)
        except Exception:
            if not _here(block) or next(floats(block)).device.type == "cpu":
                raise
    device = next(floats(block)).device.type
    with evaluating(block), torch.autocast(device, enabled=False):
        return _sizes_of(site, block, _LOOSE)


def _sizes_of(site: EncoderSite, block: nn.Module, tolerance: float) -> str:
    about = site.block
    x, args, kwargs = _example(site, block, 0)
    tokens, taps = x.shape[1], [] if about.taps is None else about.taps(block)

    def attended(which: list[int], size: list[float] | None) -> Tensor:
        """The attention branch of tokens `which`, with sizes."""
        anchor = torch.tensor([which], device=x.device)
        sizes = None if size is None else torch.tensor([size], device=x.device)
        total = replace(TokenMap.identity(1, tokens, x.device), anchor=anchor, size=anchor.float())
        stage = CallState(0, site.prefix, tokens, (), None, anchor[:, :0], total=total, size=sizes)
        with tapped(taps):
            return about.attend(block, x[:, which], stage, args, kwargs)

    every, twin = list(range(tokens)), site.prefix + 1
    copies = sorted([*every, *[twin] * 3])
    fed = about.feed(block, x)
    if _differ(about.feed(block, x[:, copies]), fed[:, copies], tolerance):
        return "mixes tokens in its MLP, so it needs every token in its place"
    plain, keys = _heard(site, block, x, args, kwargs)
    if keys:
        return keys
    if site.no_bias:
        return ""
    if _causal(site, block, x, args, kwargs, plain):
        return "attends causally: each token sees only those before it, and a merged token has no place in that order"
    if _differ(attended(every, [1.0] * tokens), plain, tolerance):
        return "attends differently once it is given sizes, even if they are all 1"
    size = [1.0] * tokens
    size[twin] = 4.0
    if _differ(attended(copies, None), attended(every, size)[:, copies], tolerance):
        return "does not take a token of size 4 for that token four times: the sizes of merged tokens do not reach it"
    return ""


def _heard(site: EncoderSite, block: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, str]:
    """The attention branch of all tokens, and why the keys do not match the adapter's description, or ""."""
    about, outputs = site.block, []
    if about.keys is None:
        if about.project is not None:
            outputs.append(about.project(block, x))
        return about.attend(block, x, None, args, kwargs), "" if outputs and outputs[0].shape[:2] == x.shape[:2] else (
            "does not show one key for each token"
        )
    hook = about.keys(block).register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        plain = about.attend(block, x, None, args, kwargs)
    finally:
        hook.remove()
    if not outputs:
        return plain, "attends without showing its keys, which methods compare"
    keys, heads = outputs[-1], about.heads(block)
    try:
        found = head_mean(keys, heads).shape[:2] == x.shape[:2]
    except (InputError, RuntimeError, IndexError):  # of another form altogether
        found = False
    return plain, "" if found else f"has keys of form {list(keys.shape)}, not {heads} heads of {x.shape[1]} tokens"


def _causal(site: EncoderSite, block: nn.Module, x: Tensor, args: tuple, kwargs: dict, plain: Tensor) -> bool:
    """Whether changing the last token leaves the output of the first ones unchanged."""
    other = x.clone()
    other[:, -1] = -other[:, -1]
    moved = site.block.attend(block, other, None, args, kwargs)[:, :-1] - plain[:, :-1]
    return not bool(moved.any()) and bool(plain.any())


def _differ(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return not bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())  # NaN counts as different


def _example(site: EncoderSite, block: nn.Module, seed: int) -> tuple[Tensor, tuple, dict]:
    """Random tokens for a block, and its other arguments."""
    tokens, args, kwargs = site.block.example(block, site.prefix)
    channels = width_of(block, site.block.parts(block)[0])
    x = torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(seed), device="cpu")
    like = next(floats(block))
    return x.to(like.device, like.dtype), args, kwargs


def _here(block: nn.Module) -> bool:
    """True if the block has actual values, not only shapes (meta: not loaded, or offloaded)."""
    return not any(parameter.is_meta for parameter in block.parameters())


@contextmanager
def evaluating(block: nn.Module) -> Iterator[None]:
    """In this context dropout is off in `block`."""
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
