"""The counter of multiply-adds (MACs) that every method and every table uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class EncoderMACs:
    """The cost of an encoder, computed from its weights alone.

    Per block: `attention` weights times the tokens that enter it, `2 width N^2` for the two products with the attention
    map, `mlp` weights times the tokens that enter it; plus the patch embedding, and the head. Norms, activations and
    the method's own arithmetic are not counted (their time is what `vtc bench` measures).

    Attributes:
        attention, width, mlp: per block: number of weights of its projections, heads x head width, weights of its MLP.
        patch: weights applied to every patch; tail: numbers of weights of the head (applied to every token, applied
            once).
    """

    attention: tuple[int, ...]
    width: tuple[int, ...]
    mlp: tuple[int, ...]
    patch: int
    prefix: int
    tail: tuple[int, int] = (0, 0)

    def total(self, attended: Sequence[int], fed: Sequence[int], patches: int) -> int:
        """MACs of one image whose layers see `attended[l]` tokens in attention and `fed[l]` in the MLP."""
        blocks = sum(
            n * a + 2 * w * n * n + m * p
            for a, w, p, n, m in zip(self.attention, self.width, self.mlp, attended, fed, strict=True)
        )
        return blocks + patches * self.patch + (patches + self.prefix) * self.tail[0] + self.tail[1]

    def first(self, layers: int) -> EncoderMACs:
        """The same encoder cut after its first `layers` layers, without its head."""
        if layers == len(self.attention):
            return self
        attention, width, mlp = self.attention[:layers], self.width[:layers], self.mlp[:layers]
        return EncoderMACs(attention, width, mlp, self.patch, self.prefix)

    def dense(self, patches: int) -> int:
        tokens = [patches + self.prefix] * len(self.attention)
        return self.total(tokens, tokens, patches)

    def after(self, removed: Sequence[int], patches: int) -> int:
        """MACs of one image when layer l removes `removed[l]` tokens between its attention and its MLP."""
        tokens = patches + self.prefix
        attended, fed = [], []
        for r in removed:
            attended.append(tokens)
            tokens -= r
            fed.append(tokens)
        return self.total(attended, fed, patches)


@dataclass(frozen=True)
class WindowMACs(EncoderMACs):
    """The same for blocks that attend in windows of `windows[l]` x `windows[l]` tokens, 0 = in none. Rows and columns
    are padded to whole windows, and padding is attended."""

    windows: tuple[int, ...] = ()

    def on(self, grids: Sequence[tuple[int, int]], patches: int) -> int:
        """MACs of one image whose layers see these rows and columns."""
        count = 0
        for a, w, p, side, (rows, columns) in zip(
            self.attention, self.width, self.mlp, self.windows, grids, strict=False
        ):
            tokens = rows * columns
            padded = -(-rows // side) * -(-columns // side) * side * side if side else tokens
            seen = side * side if side else tokens
            count += padded * a + 2 * w * padded * seen + p * tokens
        done = len(grids) == len(self.attention)
        return count + patches * self.patch + (patches * self.tail[0] + self.tail[1] if done else 0)


def linear_weights(module: nn.Module | None) -> int:
    """How many weights of `module` multiply a token: those of its Linear layers and fused attention projections.
    Counted from the layers' declared shapes, since the weights may be packed (quantized)."""
    if module is None:
        return 0
    count = 0
    for m in module.modules():
        if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None:
            count += m.in_proj_weight.numel()
        sizes = getattr(m, "in_features", None), getattr(m, "out_features", None)
        wraps = any(hasattr(part, "in_features") for part in m.children())  # LoRA wrapper: its parts are counted
        if isinstance(sizes[0], int) and isinstance(sizes[1], int) and not wraps:
            count += sizes[0] * sizes[1]
    return count


def packed_macs(blocks: Any, width: int, lengths: Sequence[Sequence[int]]) -> int:
    """Multiply-adds of a tower's `blocks` on a row of packed patches, of which each block lets runs of `lengths[block]`
    patches attend to each other: every linear weight once per patch, and `2 width N^2` for each run. width: heads x
    head width."""
    total = 0
    for block, runs in zip(blocks, lengths, strict=True):
        total += sum(runs) * linear_weights(block) + 2 * width * sum(n * n for n in runs)
    return total


def decoder_macs(decoder: Any, tokens: int | Sequence[int]) -> int:
    """Multiply-adds of a decoder's layers on a prompt of `tokens`, one number or one per layer. Computed from the
    weights alone: every linear weight once per token (of stacked experts, as many as a token is sent to), and
    `width N^2` for the two products with the causal half of the attention map. Layers without a map (convolutions,
    linear attention, state spaces) have no such term; their recurrent state is not counted."""
    total = 0
    counts = [tokens] * len(decoder.layers) if isinstance(tokens, int) else tokens
    for block, count in zip(decoder.layers, counts, strict=True):
        weights = linear_weights(block) + _expert_weights(block, decoder.config)
        total += count * weights + attention_width(block, decoder.config) * count * count
    return total


def attention(block: nn.Module) -> Any:
    """The module of a decoder layer that uses transformers' attention interface; None = it has none."""
    attends = (m for m in block.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "is_causal"))
    return next(attends, None)


def attention_width(block: nn.Module, config: Any) -> int:
    """Heads x head width of a decoder layer's attention, the mean of keys' and values'; 0 where it has none."""
    module = attention(block)
    if module is None:
        return 0
    own = getattr(module, "config", config)  # layers of one decoder may differ, by a configuration for each
    if getattr(own, "per_layer_config", None):
        own = own.per_layer_config[module.layer_idx]
    heads = own.num_attention_heads
    width = getattr(module, "head_dim", None) or own.hidden_size // heads
    keys, values = (getattr(module, name, None) or width for name in ("qk_head_dim", "v_head_dim"))
    return heads * (keys + values) // 2


def _expert_weights(block: nn.Module, config: Any) -> int:
    """Weights that multiply a token in experts whose matrices are stacked, [experts, out, in]."""
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    owners = [m for m in block.modules() if not isinstance(m, (nn.Conv1d, nn.Conv2d))]
    stacks = [p for m in owners for p in m.parameters(recurse=False) if p.ndim == 3]
    return sum(p[0].numel() * min(chosen, p.shape[0]) for p in stacks)
