"""How a family file describes its multimodal models: where the parts are, and how image tokens are laid out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.adapters.multimodal.cache import cache_name
from vtc.adapters.multimodal.rotary import axis_count
from vtc.errors import InputError
from vtc.layout import Grid, Layout, Unit


@dataclass(frozen=True)
class Modality:
    """A kind of visual input: the call's argument with its pixels, the config's placeholder id, the model's encoder."""

    name: str
    pixels: str
    token: str
    encode: str


@dataclass(frozen=True)
class Shorter:
    """What a tower of packed patches needs to run on some of them.

    Attributes:
        patches: [P] bool, which of all patches; given: arguments for the tower, the whole images' tables, cut.
        lengths: how many patches of each image or frame there are.
        source: [m] long, where the projector's input has each token, in their order; None = there.
        macs: the tower's multiply-adds on all patches, and on these.
    """

    patches: Tensor
    given: dict[str, Tensor]
    lengths: list[int]
    source: Tensor | None
    macs: tuple[int, int]


# Fields of `Tokens` that are read off a tower and its projector.
CAPTURED = frozenset({"attention", "middle", "keys", "inputs", "projector"})
READ = CAPTURED | {"pixels"}  # or off the call
IMAGE = Modality("image", "pixel_values", "image_token_id", "get_image_features")
VIDEO = Modality("video", "pixel_values_videos", "video_token_id", "get_video_features")


_FROM_CONFIG = ("vision_feature_layer", "vision_feature_select_strategy")  # which a forward hands to its encoder


class Projection:
    """A projector as methods see it: [..., P, V] -> [..., C], P patches per token. `module` is the model's own
    module."""

    def __init__(self, module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self.module, self.run = module, run

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(self.module, x)


def _one_patch(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.squeeze(-2))


def prompt(call: Mapping[str, Any]) -> Tensor:
    """A call's ids [B, L], or its embeddings [B, L, C] if it has no ids."""
    return call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]


def axes_of(inner: Any, call: dict[str, Any], embeds: Tensor) -> Tensor | None:
    """[axes, B, L]: what a model's compute_3d_position_ids gives for a call without positions; None = columns count.

    Raises InputError for a mask that is not [B, L]."""
    mask = call.get("attention_mask")
    if mask is not None and getattr(mask, "ndim", 0) != 2:
        raise InputError("attention_mask is not [B, L], of which the model makes its positions: give position_ids")
    cache = call.get(cache_name())
    known = {**call, "inputs_embeds": embeds, "past_key_values": cache, cache_name(): cache}
    takes = inspect.signature(inner.compute_3d_position_ids).parameters
    given = {n: known.get(n) for n, p in takes.items() if n in known or p.default is p.empty}
    positions = inner.compute_3d_position_ids(**given)
    return None if positions is None else positions[..., -embeds.shape[1] :]


class Family:
    """One family of multimodal models. Subclasses set names and override what differs.

    Attributes:
        classes: class names of the model without its language head; this part contains tower, projector and decoder.
        decoder: the attribute with the text decoder.
        modalities: the visual inputs it takes.
        passed: arguments for the tower that the model's forward passes on without naming them.
        proven: tests compare PPE and what works between the decoder's layers with the plain model; False = only what
            works at the decoder's input.
        gridded: its tokens are cells of an image, whose rows and columns are told, if not of every image.
        in_tower: why methods cannot merge inside the tower so that fewer tokens reach the decoder; "" = they can.
        copied: merged tokens are copied back behind the tower's last layer, as in an encoder alone, and the decoder
            gets all of them.
    """

    name: str
    covers: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    decoder: str = "language_model"
    modalities: tuple[Modality, ...] = (IMAGE,)
    ignored: ClassVar[frozenset[str]] = (
        frozenset()
    )  # arguments of the encoder that the model's forward does not pass on
    passed: ClassVar[frozenset[str]] = frozenset()
    proven: bool = True
    gridded: bool = True
    evidence: ClassVar[frozenset[str]] = CAPTURED  # which of these fields vtc can read off its tower and projector
    withheld: ClassVar[dict[str, str]] = {}  # why it cannot read one of the others ("which ...", {name})
    middle: ClassVar[float] = 0.375  # depth of the tower's "middle" layer (HiPrune: 9 of CLIP's 24)
    copied: ClassVar[bool] = False
    in_tower: ClassVar[str] = "its tower's tokens are rearranged on the way to the decoder"

    # -- the prompt ---------------------------------------------------------------------------------------------

    def pooled(self, output: Any) -> Any:
        """The features of every item [tokens, C] in an encoder's output; None = not an output as an object."""
        return getattr(output, "pooler_output", None)

    def lengths(self, inner: Any, modality: Modality, features: list[int], call: dict[str, Any]) -> list[int]:
        """Number of tokens of every item, given the number of rows of each tensor that the encoder returned
        (`features`)."""
        return features

    def layout(self, inner: Any, modality: Modality, lengths: list[int], call: dict[str, Any]) -> Layout:
        """How the tokens of the items with `lengths` tokens are laid out. By default every item is an image whose
        patches are folded evenly; it has a grid if the grid of its pixels has as many tokens."""
        grids = [self.folded(inner, grid) for grid in self.grids(inner, modality, call)]
        units, start = [], 0
        for item, length in enumerate(lengths):
            grid = grids[item] if len(grids) == len(lengths) else None
            fits = grid is not None and grid[0] * grid[1] == length
            units.append(Unit(torch.arange(start, start + length), item, grid if fits else None))
            start += length
        return Layout(tuple(units))

    def grids(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[Grid]:
        """(rows, columns) of the patches that the tower cuts every image into, derived from the pixels; [] =
        unknown."""
        pixels, patch = call.get(modality.pixels), self.patch(inner)
        if not isinstance(pixels, Tensor) or pixels.ndim < 4 or patch is None:
            return []
        grid = (pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])
        return [grid] * pixels.shape[:-3].numel()

    def patch(self, inner: Any) -> Grid | None:
        """(height, width) of the tower's patches in pixels; None = unknown."""
        size = getattr(getattr(self.tower(inner), "config", None), "patch_size", None)
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return (int(size[0]), int(size[1]))
        return (size, size) if isinstance(size, int) else None

    def folded(self, inner: Any, grid: Grid) -> Grid | None:
        """The grid of the tokens that the projector makes from a grid of patches; None = they do not fill a grid."""
        return grid

    def token(self, inner: Any, modality: Modality, ids: Tensor | None) -> int:
        """The placeholder's id, in a prompt of `ids`."""
        return getattr(inner.config, modality.token)

    def filled(self, inner: Any, names: Any) -> dict[str, Any]:
        """Arguments of the encoder, among `names`, that the model's forward reads off its configuration."""
        known = {name: getattr(inner.config, name, None) for name in _FROM_CONFIG if name in names}
        return {name: value for name, value in known.items() if value is not None}

    def trailing(self, inner: Any, modality: Modality) -> int:
        """Placeholders behind every item that the model's forward fills itself, after the encoder."""
        return 0

    def positions(self, inner: Any, call: dict[str, Any], past: int, embeds: Tensor) -> Tensor:
        """Positions [B, L] or [axes, B, L] that the model computes for a call without positions."""
        batch, length = embeds.shape[:2]
        return torch.arange(past, past + length, device=embeds.device).expand(batch, length)

    def axes(self, inner: Any) -> int:
        """How many axes positions have where they have several."""
        return axis_count(getattr(getattr(inner, self.decoder), "rotary_emb", None))

    def placed(self, inner: Any, call: dict[str, Any], past: int) -> Tensor:
        """The positions of all of a call's columns, [B, L] or [axes, B, L], as in the dense model."""
        given = prompt(call)
        positions = call.get("position_ids")
        if positions is None:
            words = inner.get_input_embeddings()(given.clamp(min=0)) if given.ndim == 2 else given
            positions = self.positions(inner, call, past, words)
        positions = positions[-self.axes(inner) :] if positions.ndim == 3 else positions  # text may have one in front
        return positions.expand(*positions.shape[:-2], len(given), -1)[..., -given.shape[1] :]

    # -- the tower ----------------------------------------------------------------------------------------------

    def tower(self, inner: Any) -> nn.Module:
        return inner.vision_tower

    def attentions(self, inner: Any) -> list[nn.Module]:
        """The attention modules of the tower, in order, up to the layer whose output is projected."""
        found = [m for m in self.tower(inner).modules() if _attends(m)]
        return found[: len(found) + 1 + self.feature_layer(inner)]

    def feature_layer(self, inner: Any) -> int:
        """Which of the tower's hidden states is projected, from the end: -1 = the last."""
        layer = getattr(inner.config, "vision_feature_layer", -1)
        if not isinstance(layer, int):
            return -1
        depth = getattr(inner.config.vision_config, "num_hidden_layers", 0)
        return layer if layer < 0 else layer - depth - 1

    def prefix(self, inner: Any, call: dict[str, Any]) -> int:
        """How many leading tokens of the tower (CLS) do not reach the projector in a call of the encoder."""
        own = getattr(inner.config, "vision_feature_select_strategy", "full")
        return int((call.get("vision_feature_select_strategy") or own) == "default")

    def segments(self, inner: Any, modality: Modality, call: dict[str, Any]) -> list[int] | None:
        """Patches per image or frame, if the tower packs all into one row, or pads rows at their end; None = one image
        per row."""
        return None

    def watched(self, inner: Any) -> nn.Module:
        """A module that runs when images are encoded, and at no other time."""
        return self.projector(inner)

    def before_tower(self, inner: Any) -> str:
        """Why patches cannot leave before the tower; "" = they can, and the three methods that follow say how."""
        return f"vtc takes patches out before the towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and this is {self.name}"

    def image_std(self, inner: Any) -> tuple[float, float, float]:
        """By what the family's processor divides each channel of the pixels."""
        raise NotImplementedError

    def cells(
        self, inner: Any, pixels: Tensor, modality: Modality, call: dict[str, Any]
    ) -> list[tuple[Tensor, Grid, bool]]:
        """The pixels of every frame's tokens [n, 3, values], in raster order, the rows and columns of these, and
        whether it is an item's only frame."""
        raise NotImplementedError

    def shorter(self, inner: Any, modality: Modality, call: dict[str, Any], kept: Tensor) -> Shorter:
        """What the tower needs to run on the patches of the tokens `kept` [n] bool alone."""
        raise NotImplementedError

    # -- the projector ------------------------------------------------------------------------------------------

    def projector(self, inner: Any) -> nn.Module:
        """The module that maps the tower's patches to the decoder's width; ZOO-Prune perturbs its input."""
        return inner.multi_modal_projector

    def projection(self, inner: Any) -> Projection:
        return Projection(self.projector(inner), _one_patch)

    def blocks(self, inner: Any, seen: Tensor, modality: Modality, call: dict[str, Any]) -> Tensor:
        """The projector's input -> [rows, P, V], the patches of each of its output rows."""
        return seen.reshape(-1, 1, seen.shape[-1])

    def streams(self, inner: Any) -> str:
        """What has a run of placeholders of its own in the prompt, "video" or "frame", if its tower sees the frames of
        a video one by one (or in pairs): then a video may come in pieces. "" = it may not."""
        return ""

    def pixels(self, modality: Modality, call: dict[str, Any]) -> Tensor:
        """[tokens, V], the values of the pixels that each token covers; for a family with "pixels" in `evidence`."""
        raise NotImplementedError

    def rows_per_image(self, inner: Any, patches: int) -> int:
        """Projector rows of an image with `patches` patches, if images are not packed."""
        return patches

    def patches_per_token(self, inner: Any) -> int:
        """Consecutive patches per projector row, if images are packed."""
        return 1

    def members(self, inner: Any, modality: Modality, call: dict[str, Any], count: int) -> Tensor:
        """[rows, P] long: which of the `count` patches of all images each projector row is made from, if images are
        packed or padded; -1 = fewer."""
        return torch.arange(count).view(-1, self.patches_per_token(inner))

    def patches(self, inner: Any, count: int, rows: int) -> Tensor:
        """[rows, P] long: which of an image's `count` patches each of its projector rows is made from."""
        assert count == rows, "a family that folds patches says how"
        return torch.arange(count)[:, None]


def _attends(module: nn.Module) -> bool:
    """Whether this is an attention module that uses transformers' attention interface."""
    return type(module).__name__.endswith("Attention") and hasattr(module, "config") and hasattr(module, "is_causal")
