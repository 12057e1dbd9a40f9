"""How a decoder uses positions, found by running its first layers, before anything is patched.

The patch gives the original positions of the tokens that stay to the rotary embedding, and positions without gaps to
all other code. This is correct if no other code uses positions. In some decoders it does: they scale queries by the
positions that they receive (Ministral 3), or by their own count (Llama 4), or keep positions for later calls (Qwen 4).
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vtc.adapters.multimodal.cache import cache_name

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HUNG_ON = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")
FAR = 10_000_000  # beyond every length at which decoders start to scale by position


@dataclass(frozen=True)
class Trial:
    """How a decoder uses positions apart from its rotary table.

    Attributes:
        reads: it reads its `position_ids`; counts: it counts the preceding tokens by itself.
        error: why it could not be tested.
        keeps: its cache keeps positions, and a rotary table is made for past and present together.
    """

    reads: bool = False
    counts: bool = False
    error: str = ""
    keeps: bool = False

    @property
    def told(self) -> bool:
        """Whether it must be given the true positions of the tokens that stay."""
        return self.reads or self.keeps


_tried: WeakKeyDictionary[nn.Module, Trial] = WeakKeyDictionary()


def try_positions(decoder: nn.Module) -> Trial:
    """Run the first layers of `decoder`, at least one of every kind, on four random tokens, with random weights if the
    model has none."""
    if decoder not in _tried:
        _tried[decoder] = _try(decoder)
    return _tried[decoder]


def _try(decoder: Any) -> Trial:
    from transformers import DynamicCache

    class Claiming(DynamicCache):
        """An empty cache that claims to be full."""

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return FAR

    start = _start(getattr(decoder, "_orig_mod", decoder))  # as it was before torch.compile
    made = weights(start)
    device, dtype = place(start)
    x = torch.randn(1, 4, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    shut = torch.full((1, 1, 4, 4), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)
    near, each = torch.arange(4, device=device)[None], {}
    width = getattr(decoder.config, "hidden_size_per_layer_input", 0)  # Gemma: what every layer is told of each word
    if width and hasattr(start, "per_layer_model_projection"):
        each["per_layer_inputs"] = torch.zeros(
            1, 4, decoder.config.num_hidden_layers, width, device=device, dtype=dtype
        )
    for name in inspect.signature(type(start).forward).parameters:  # words that it reads beside their embeddings
        if name.endswith("_input_ids"):
            each[name] = torch.zeros(1, 4, dtype=torch.long, device=device)
    far = torch.tensor([[0, 1, 70_000, FAR]], device=device)

    def run(ids: Tensor, cache: Any = None, mask: Tensor = shut) -> Tensor:
        given: dict[str, Any] = {"inputs_embeds": x.to(device, dtype), "attention_mask": mask, "position_ids": ids}
        given |= {"use_cache": cache is not None, cache_name(): cache, **each}
        return torch.func.functional_call(start, made, (), given)[0]

    with _at_rest(start), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            alone = run(near)
            again = run(near)
        except Exception as error:  # a foreign decoder may raise anything
            return Trial(error=" ".join(str(error).split()) or type(error).__name__)
        noise = max(float((again - alone).abs().max()), rounding(alone) / 4)
        reads = _moves(alone, lambda: run(far), noise)
        cache = DynamicCache(config=decoder.config)
        try:
            cached = run(near, cache)
        except Exception:  # layers that share their caches do not accept our mask with a cache
            return Trial(reads)
        try:
            run(near + 4, cache, torch.cat([torch.zeros_like(shut), shut], -1))
        except Exception:  # those that take no mask of two lengths
            pass
        keeps = start.asked > 4
        counts = _moves(cached, lambda: run(near, Claiming(config=decoder.config)), noise)
        return Trial(reads, counts, keeps=keeps)


def _moves(before: Tensor, run: Callable[[], Tensor], noise: float) -> bool:
    try:
        return not float((run() - before).abs().max()) <= 4 * noise  # NaN counts as a change
    except (IndexError, RuntimeError):  # the position table ends before these
        return True


def rounding(out: Tensor) -> float:
    """How far two ways to compute `out` may be apart, since kernels do not always add in the same order. Scaling by
    position changes the output a thousand times as much."""
    return max(64 * torch.finfo(torch.float32).eps, 2 * torch.finfo(out.dtype).eps) * float(out.abs().max())


def first(layers: Any) -> nn.ModuleList:
    """The first of a decoder's layers, up to the one with which there is one of every kind."""
    kinds = [_kind(layer) for layer in layers]
    return nn.ModuleList(layers[: 1 + max(kinds.index(kind) for kind in kinds)])


def on_hand(rotary: Any) -> Any:
    """A copy of a rotary embedding, made anew on the CPU if its buffers are on meta."""
    if not any(buffer.is_meta for buffer in rotary.buffers()):
        return bare(rotary)
    with torch.device("cpu"):
        return type(rotary)(rotary.config)


def _start(decoder: Any) -> Any:
    """The decoder cut after the first layers that include every kind of layer. Shares all weights."""
    start = bare(decoder)
    start._modules["layers"] = first(decoder.layers)
    start.__dict__["asked"] = 0  # for how many positions at once a rotary table was made
    if getattr(decoder, "rotary_emb", None) is None:
        return start
    rotary = on_hand(decoder.rotary_emb)

    def fixed(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Rotates tokens by their index, whatever positions it receives."""
        start.asked = max(start.asked, position_ids.shape[-1])
        counted = torch.arange(position_ids.shape[-1], device=position_ids.device).expand_as(position_ids)
        return type(rotary).forward(rotary, x, counted, *args, **kwargs)

    rotary.__dict__["forward"] = fixed
    start._modules["rotary_emb"] = rotary
    return start


def bare(module: nn.Module) -> Any:
    """A module with the same parts and tensors, without what others have added (hooks, a `forward` of accelerate).
    Attributes set on it later, such as growing rotary tables, are not set on `module`."""
    bare = object.__new__(type(module))
    bare.__dict__ = {k: v for k, v in module.__dict__.items() if k not in _HUNG_ON}
    for name, value in bare.__dict__.items():
        if name in ("_modules", "_parameters", "_buffers"):
            bare.__dict__[name] = dict(value)
        elif "_hooks" in name and isinstance(value, dict):
            bare.__dict__[name] = type(value)()
    return bare


def place(start: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of the layers' computation; for weights on meta, the CPU, or the device accelerate loads
    them to."""
    own = next((p for p in start.parameters() if p.is_floating_point() and p.element_size() > 1), None)
    if own is None or not own.is_meta:
        return (torch.device("cpu"), torch.float32) if own is None else (own.device, own.dtype)
    for part in start.modules():
        where = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if where is not None:
            return torch.device(where), own.dtype
    return torch.device("cpu"), torch.float32


def _kind(layer: nn.Module) -> tuple:
    """A key that differs between layers that compute differently: their modules, and the switches set in these."""
    found = []
    for path, module in layer.named_modules():
        switches = [(name, value) for name, value in module.__dict__.items() if isinstance(value, (bool, str))]
        found.append((path, type(module), tuple(sorted(switches))))
    return tuple(found)


def weights(start: nn.Module) -> dict[str, Tensor]:
    """Random weights for the parameters on meta, each a view of few numbers; not for those that accelerate loads."""
    found = {}
    for path, module in start.named_modules():
        if hasattr(module, "_hf_hook"):
            continue
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_meta:
                whole = torch.zeros if tensor.dtype == torch.bool else torch.ones  # numbers may be divided by
                found[f"{path}.{name}".strip(".")] = (
                    _few(tensor.shape) if tensor.is_floating_point() else whole(tensor.shape, dtype=tensor.dtype)
                )
    return found


def _few(shape: torch.Size) -> Tensor:
    """Random weights by fan-in. A matrix is a view of a line of numbers; the matrices of a stack (experts) are all the
    same, and so are the rows of a table with millions (n-grams)."""
    generator = torch.Generator().manual_seed(sum(shape))
    if len(shape) == 2:
        step = int(shape[0] < 5_000_000)
        line = torch.randn(step * shape[0] + shape[1], generator=generator) / shape[-1] ** 0.5
        return line.as_strided(shape, (step, 1))
    return (torch.randn(shape[-2:], generator=generator) / max(1, shape[-1:].numel()) ** 0.5).expand(shape)


@contextmanager
def _at_rest(start: Any) -> Iterator[None]:
    """No dropout, no foreign hooks (which would take this for a real call), and plain attention, which accepts our mask
    even if the model's own attention does not."""
    training = {module: module.training for module in start.modules()}
    hooks = {module: {name: module.__dict__[name] for name in _HOOKS} for module in training}
    attention = start.config._attn_implementation
    try:
        for module in training:
            module.training = False
            module.__dict__.update({name: OrderedDict() for name in _HOOKS})
        start.config._attn_implementation = "eager"
        yield
    finally:
        start.config._attn_implementation = attention
        for module, mode in training.items():
            module.training = mode
            module.__dict__.update(hooks[module])


def remember(copied: nn.Module, decoder: nn.Module) -> None:
    """A copy of a decoder uses positions as the decoder does."""
    _tried[copied] = try_positions(decoder)
