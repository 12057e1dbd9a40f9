"""Towers and projectors of models that the generic family serves, by model type: which fields a method can be given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtc.adapters.multimodal.families.base import CAPTURED, Family, Modality, Projection
from vtc.adapters.multimodal.families.generic import Generic
from vtc.adapters.multimodal.families.qwen_vl import QwenTower, told
from vtc.errors import InputError
from vtc.layout import Grid, Layout

_PROJECTED = frozenset({"inputs", "projector"})


class Towered(Generic):
    """A model of the generic family whose tower and projector are described: more may be read than its tokens."""

    evidence = CAPTURED
    in_tower = Family.in_tower

    def tower(self, inner: Any) -> nn.Module:
        return inner.vision_tower


class Qwen(QwenTower, Towered):
    """Qwen 3.5, Qwen3-VL-MoE, Qwen 4 and others with that tower."""


class QwenWindowed(Qwen):
    """Some layers attend in windows, by which the tokens are ordered."""

    def layout(self, inner: Any, modality: Modality, lengths: list[int], call: dict[str, Any]) -> Layout:
        return replace(super().layout(inner, modality, lengths, call), source=self.windows(inner, told(modality, call)))


class Glm(Qwen):
    """A convolution makes one row of a token's patches before the projector sees them."""

    def projection(self, inner: Any) -> Projection:
        return Family.projection(self, inner)

    def blocks(self, inner: Any, seen: Tensor, modality: Modality, call: dict[str, Any]) -> Tensor:
        return Family.blocks(self, inner, seen, modality, call)


class Rastered(Towered):
    """The tower has its patches row by row, and a token is made of a square of them."""

    def edge(self, inner: Any) -> int:
        """Patches along a token's side."""
        raise NotImplementedError

    def rasters(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[Grid]:
        """Rows and columns of patches in every image or frame."""
        return [(rows, columns) for frames, rows, columns in told(modality, call).tolist() for _ in range(frames)]

    def segments(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[int]:
        return [rows * columns for rows, columns in self.rasters(inner, modality, call)]

    def members(self, inner: Any, modality: Modality, call: dict[str, Any], count: int) -> Tensor:
        return squares(self.rasters(inner, modality, call), self.edge(inner))

    def blocks(self, inner: Any, seen: Tensor, modality: Modality, call: dict[str, Any]) -> Tensor:
        rows = seen.reshape(-1, seen.shape[-1])
        return rows[self.members(inner, modality, call, len(rows)).to(rows.device)]


def squares(rasters: list[Grid], edge: int) -> Tensor:
    """[tokens, edge * edge] long: the patches of every token, counted over all rasters. What is left of a row or a
    column that does not part into squares is in none, as the models have it."""
    out, start = [], 0
    for rows, columns in rasters:
        index = torch.arange(start, start + rows * columns).view(rows, columns)
        index = index.unfold(0, edge, edge).unfold(1, edge, edge)  # [rows, columns, edge, edge] of tokens
        out.append(index.reshape(-1, edge * edge))
        start += rows * columns
    return torch.cat(out)


def _mistral(module: Any, x: Tensor) -> Tensor:
    channels = module.norm(x).transpose(-1, -2)  # its merger has the patches of a channel side by side
    return module.linear_2(module.act(module.linear_1(module.patch_merger.merging_layer(channels.flatten(-2)))))


class Mistral3(Rastered):
    """Pixtral's tower, and a projector that merges patches first."""

    def edge(self, inner: Any) -> int:
        return inner.config.spatial_merge_size

    def rasters(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[Grid]:
        side = inner.config.vision_config.patch_size
        return [(high // side, wide // side) for high, wide in torch.as_tensor(call["image_sizes"]).tolist()]

    def projection(self, inner: Any) -> Projection:
        return Projection(self.projector(inner), _mistral)


def _paddle(module: Any, x: Tensor) -> Tensor:
    return module.linear_2(module.act(module.linear_1(module.pre_norm(x).flatten(-2))))


class PaddleOCR(Rastered):
    def edge(self, inner: Any) -> int:
        return inner.config.vision_config.spatial_merge_size

    def tower(self, inner: Any) -> nn.Module:
        return inner.visual

    def projector(self, inner: Any) -> nn.Module:
        return inner.projector

    def projection(self, inner: Any) -> Projection:
        return Projection(self.projector(inner), _paddle)


def _kimi(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.flatten(0, -3)).view(*x.shape[:-2], -1)


class Kimi(Rastered):
    """The frames of a video attend to one another, and a token is made of one square in all of them."""

    def edge(self, inner: Any) -> int:
        return inner.vision_tower.merge_kernel_size[0]

    def segments(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[int]:
        return told(modality, call).prod(1).tolist()

    def members(self, inner: Any, modality: Modality, call: dict[str, Any], count: int) -> Tensor:
        """Padded with -1 where videos of several lengths, or a video, lie beside an image."""
        grids, out, start = told(modality, call).tolist(), [], 0
        for frames, rows, columns in grids:
            square = squares([(rows, columns)], self.edge(inner))
            times = torch.arange(frames)[:, None] * rows * columns
            out.append((start + times + square[:, None]).flatten(1))
            start += frames * rows * columns
        most = max(each.shape[1] for each in out)
        return torch.cat([nn.functional.pad(each, (0, most - each.shape[1]), value=-1) for each in out])

    def projector(self, inner: Any) -> nn.Module:
        return inner.mm_projector

    def projection(self, inner: Any) -> Projection:
        return Projection(self.projector(inner), _kimi)

    def blocks(self, inner: Any, seen: Tensor, modality: Modality, call: dict[str, Any]) -> Tensor:
        return seen


class Gemma4(Towered):
    """Patches with their places, padded to one number; the mean of a square of them is projected."""

    def segments(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[int]:
        real = self.places(modality, call).ge(0).all(-1)
        counts = real.sum(1)
        if not torch.equal(real, torch.arange(real.shape[1], device=real.device) < counts[:, None]):
            raise InputError(f"{modality.name}_position_ids: vtc knows padding (-1) behind the patches alone")
        return counts.tolist()

    def places(self, modality: Modality, call: dict[str, Any]) -> Tensor:
        """[images or frames, patches, 2]: column and row of every patch; -1 = padding."""
        return call[f"{modality.name}_position_ids"]

    def members(self, inner: Any, modality: Modality, call: dict[str, Any], count: int) -> Tensor:
        edge, out, start = inner.config.vision_config.pooling_kernel_size, [], 0
        for places, real in zip(self.places(modality, call), self.segments(inner, modality, call), strict=True):
            column, row = places[:real].unbind(-1)
            cell = column // edge + (int(column.max()) + 1) // edge * (row // edge)
            sizes = cell.bincount()
            if not bool((sizes == edge * edge).all()):
                raise InputError(f"{modality.name}_position_ids do not part into tokens of {edge} x {edge} patches")
            out.append(start + cell.argsort(stable=True).view(-1, edge * edge))
            start += real
        return torch.cat(out)

    def projector(self, inner: Any) -> nn.Module:
        return inner.embed_vision

    def projection(self, inner: Any) -> Projection:
        return Projection(self.projector(inner), _embed)


def _embed(module: nn.Module, x: Tensor) -> Tensor:
    return module(inputs_embeds=x.squeeze(-2))


class Gemma3n(Towered):
    evidence = _PROJECTED
    in_tower = "its tower is of convolutions"
    withheld = dict.fromkeys(
        ("attention", "middle", "keys"), "the tower of {name}, a MobileNet of convolutions from timm, does not show"
    )

    def projector(self, inner: Any) -> nn.Module:
        return inner.embed_vision

    def projection(self, inner: Any) -> Projection:
        return Projection(self.projector(inner), _embed)


class Gemma4Unified(Towered):
    """Pixels go to the decoder's width by a few layers, with their places added in between."""

    evidence = frozenset()
    in_tower = "it has no vision tower"
    withheld = {
        **dict.fromkeys(("attention", "middle", "keys"), "{name} does not have: it has no vision tower"),
        **dict.fromkeys(_PROJECTED, "{name} does not have: a token is made of pixels and of its place"),
    }

    def tower(self, inner: Any) -> nn.Module:
        return inner.embed_vision


def _unshuffle(module: Any, x: Tensor) -> Tensor:
    edge = module.factor
    rows = x.reshape(-1, edge, edge, x.shape[-1]).transpose(0, 1)  # the squares side by side, as one image
    return module(rows.reshape(1, edge, -1, x.shape[-1])).view(*x.shape[:-2], -1)


class Lfm2(Rastered):
    """SigLIP 2's tower pads images to one number of patches; all squares are projected side by side."""

    def edge(self, inner: Any) -> int:
        return inner.config.downsample_factor

    def rasters(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[Grid]:
        return [(rows, columns) for rows, columns in torch.as_tensor(call["spatial_shapes"]).tolist()]

    def projection(self, inner: Any) -> Projection:
        return Projection(self.projector(inner), _unshuffle)

    def blocks(self, inner: Any, seen: Tensor, modality: Modality, call: dict[str, Any]) -> Tensor:
        edge, rasters = self.edge(inner), self.rasters(inner, modality, call)
        width = seen.shape[-1]
        slots = seen.reshape(edge, -1, edge, width).transpose(0, 1).reshape(len(rasters), -1, edge * edge, width)
        return torch.cat([slots[i, : rows * columns // edge**2] for i, (rows, columns) in enumerate(rasters)])


def _minicpm(module: Any, x: Tensor) -> Tensor:
    shape, square = x.shape[:-2], module.merge_kernel_size[0] ** 2
    rows = x.flatten(0, -2)
    for mlp in module.mlp:
        rows = mlp(rows.reshape(-1, square * rows.shape[-1]))
    return rows.view(*shape, -1)


class MiniCPM(Rastered):
    """The tower merges squares of patches after some layers, and its last layers attend between what became of them."""

    evidence = CAPTURED - {"middle"}
    withheld = {"middle": "vtc does not know of {name}, whose tower merges patches on the way"}

    def edge(self, inner: Any) -> int:
        return inner.merger.merge_kernel_size[0]

    def attentions(self, inner: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in inner.vision_tower.encoder.layers]

    def rasters(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[Grid]:
        """Rows and columns of what the last layers attend between."""
        video = modality.name == "video"
        sizes = call["target_sizes_videos" if video else "target_sizes"]
        merged = 1 if (call.get("downsample_mode") or inner.config.downsample_mode) == "4x" else 2
        rasters = [(rows // merged, columns // merged) for rows, columns in torch.as_tensor(sizes).tolist()]
        return rasters * (len(call[modality.pixels]) if video else 1)

    def members(self, inner: Any, modality: Modality, call: dict[str, Any], count: int) -> Tensor:
        edge, rasters = self.edge(inner), self.rasters(inner, modality, call)
        found = squares(rasters, edge)
        for _ in range(1, inner.merger.merger_times):
            rasters = [(rows // edge, columns // edge) for rows, columns in rasters]
            found = found[squares(rasters, edge)].flatten(1)
        return found

    def projector(self, inner: Any) -> nn.Module:
        return inner.merger

    def projection(self, inner: Any) -> Projection:
        return Projection(self.projector(inner), _minicpm)


TOWERS: dict[str, type[Towered]] = {
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker"), Qwen),
    **dict.fromkeys(("qwen4_exp", "cohere_compass", "cosmos3_omni"), Qwen),
    **dict.fromkeys(("qwen2_5_omni_thinker", "exaone4_5"), QwenWindowed),
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr"), Glm),
    **dict.fromkeys(("mistral3", "mistral_large4"), Mistral3),
    "paddleocr_vl": PaddleOCR,
    "kimi_k25": Kimi,
    "gemma4": Gemma4,
    "gemma4_unified": Gemma4Unified,
    "gemma3n": Gemma3n,
    "lfm2_vl": Lfm2,
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7"), MiniCPM),
}


def generic(inner: Any) -> Generic:
    """The generic family's account of a model; raises Unfit."""
    return TOWERS.get(getattr(inner.config, "model_type", ""), Generic)(inner)
