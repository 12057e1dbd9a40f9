"""The same layers, a third faster to train on a processor.

Matrix products in bfloat16 are what a processor with AMX does best; Transformers' convolution over patches and torch's
fused attention backwards are slow in it. So patches go through a product, all windows of the tower through one
attention, and the decoder's attention is split into the pictures, which see no question, and the questions. Compiled
by torch.compile the same functions are slower.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

Weights = list[Tensor | None]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root mean square norm."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, the first half of the width with the second."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[B, heads, rows, D] of few key heads, each for several of the queries': these are one after another in a row."""
    batch, heads, rows, width = q.shape
    few, total = k.shape[1], k.shape[2]
    mask = mask.to(q.dtype).expand(batch, heads, rows, total).reshape(batch * few, heads // few * rows, total)
    q = q.reshape(batch * few, heads // few * rows, width)
    near = torch.baddbmm(mask, q, k.reshape(batch * few, total, width).transpose(1, 2))
    out = near.softmax(-1) @ v.reshape(batch * few, total, width)
    return out.view(batch, heads, rows, width).transpose(1, 2).flatten(2)


def gated(x: Tensor, weights: Weights) -> Tensor:
    gate, gate_bias, up, up_bias, down, down_bias = weights
    assert gate is not None and up is not None and down is not None
    inner = functional.silu(linear(x, gate, gate_bias)) * linear(x, up, up_bias)
    return linear(inner, down, down_bias)


def decode(
    x: Tensor, cos: Tensor, sin: Tensor, before: Tensor, behind: Tensor, weights: Weights, width: int, kind: torch.dtype
) -> Tensor:
    """A layer of the decoder. before [P, P], behind [B, 1, L, P + L]: the masks of what stands before the questions,
    and of these."""
    one, wq, bq, wk, bk, wv, bv, wo, two, *mlp = weights
    assert one is not None and wq is not None and wk is not None and wv is not None
    assert wo is not None and two is not None
    prefix = before.shape[0]
    inner = norm(x, one).to(kind)
    q, k, v = (
        linear(inner, w, b).unflatten(-1, (-1, width)).transpose(1, 2) for w, b in ((wq, bq), (wk, bk), (wv, bv))
    )
    q, k = turned(q * width**-0.5, cos, sin), turned(k, cos, sin)
    first = attend(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], before)
    second = attend(q[:, :, prefix:], k, v, behind)
    x = x + linear(torch.cat([first, second], 1), wo, None)
    return x + gated(norm(x, two).to(kind), mlp)


def look(x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, weights: Weights, heads: int, kind: torch.dtype) -> Tensor:
    """A block of the tower. x [windows, patches, width]; mask [windows, 1, 1, patches]: where patches are."""
    one, w, b, wo, bo, two, *mlp = weights
    assert one is not None and w is not None and wo is not None and two is not None
    count, most, width = x.shape
    q, k, v = (t.transpose(1, 2) for t in linear(norm(x, one).to(kind), w, b).view(count, most, 3, heads, -1).unbind(2))
    q, k = turned(q * (width // heads) ** -0.5, cos, sin), turned(k, cos, sin)
    x = x + linear(attend(q, k, v, mask), wo, bo)
    return x + gated(norm(x, two).to(kind), mlp)


def part(layer: nn.Module, names: str) -> Weights:
    """Parameters by name; a missing bias is None."""
    found = dict(layer.named_parameters())
    return [found.get(name) for name in names.split()]


def pairs(*names: str) -> str:
    return " ".join(f"{name}.weight {name}.bias" for name in names)


MLP = pairs("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DECODER = " ".join(
    [
        "input_layernorm.weight",
        pairs("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj.weight post_attention_layernorm.weight",
        MLP,
    ]
)
BLOCK = " ".join(["norm1.weight", pairs("attn.qkv", "attn.proj"), "norm2.weight", MLP])


class Fast:
    """A model's tower and decoder through the functions above, in bfloat16 or float32."""

    def __init__(self, model: Any, kind: torch.dtype = torch.float32) -> None:
        self.model, self.kind = model.model, kind

    def decoder(self, x: Tensor, places: Tensor, behind: Tensor) -> Tensor:
        """[B, P + L, width], positions, and the mask of the questions [B, 1, L, P + L] -> the decoder's output."""
        language = self.model.language_model
        cos, sin = (t[:, None].to(self.kind) for t in language.rotary_emb(x, places))
        before, behind = (mask.to(x.device, self.kind) for mask in (causal(x.shape[1] - behind.shape[2]), behind))
        width = language.layers[0].self_attn.head_dim
        for layer in language.layers:
            x = decode(x, cos, sin, before, behind, part(layer, DECODER), width, self.kind)
        return norm(x, language.norm.weight)

    def tower(self, pixels: Tensor, grids: Tensor) -> Tensor:
        """Patches of pictures -> the Qwen's image tokens, those of all pictures in a row."""
        visual: Any = self.model.visual
        unit, heads = visual.spatial_merge_unit, visual.blocks[0].attn.num_heads
        where = get_vision_position_ids(grids, visual.spatial_merge_size)
        order, ends = get_vision_window_index(grids, visual.spatial_merge_size, visual.window_size, visual.patch_size)
        every = torch.arange(len(pixels)).view(-1, unit)[order].flatten()  # patches, window after window
        lengths = ends[1:] - ends[:-1]
        most = int(lengths.max())
        inside = torch.arange(most) < lengths[:, None]
        at = every[(ends[:-1, None] + torch.arange(most)).clamp(max=len(pixels) - 1)]
        mask = torch.zeros(inside.shape).masked_fill_(~inside, float("-inf"))[:, None, None]
        found = (at, inside, mask.to(self.kind), where, order.argsort())
        at, inside, mask, where, back = (t.to(pixels.device) for t in found)
        x = linear(pixels.to(self.kind), visual.patch_embed.proj.weight.flatten(1), None).float()
        cos, sin = (t[at][:, None].to(self.kind) for t in visual.rotary_pos_emb(x, where))
        x = x[at]
        for block in visual.blocks:
            x = look(x, cos, sin, mask, part(block, BLOCK), heads, self.kind)
        merger = visual.merger
        x = norm(x[inside], merger.ln_q.weight).view(-1, unit * x.shape[-1]).to(self.kind)
        for layer in merger.mlp:
            x = linear(x, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer(x)
        return x.float()[back]


@lru_cache(64)
def causal(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1)
