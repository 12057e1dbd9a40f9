"""A model of vLLM that hands its decoder fewer image tokens.

Behind the tower a method decides; the rows that stay are cached, scheduled and scattered by vLLM as if the image had
never had more. Where positions have three axes the tokens keep theirs: the row of each says where in its image it was,
and vLLM asks for positions anew once it has the rows (which it does for its own pruning of videos).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError
from vtc.methods import Method
from vtc.token_map import TokenMap
from vtc.vllm.decide import reduce
from vtc.vllm.evidence import READ, Evidence, Tap
from vtc.vllm.families import SECTION, Family
from vtc.vllm.processor import KEY, shortened
from vtc.vllm.settings import configured

BASE = 128  # rows and columns travel as two digits each, which bfloat16 holds exactly; 257 it would not
DIGITS = 4


class Reduced:
    """In front of a model's class."""

    family: Family
    vtc_taps: tuple[Tap, ...] = ()

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        settings = configured()
        if settings is None:
            raise InputError("vtc was switched off while this model was being made: start the server anew")
        self.vtc_use(settings.method)
        self.vtc_width = vllm_config.model_config.get_hidden_size()
        self.vtc_at_once = vllm_config.scheduler_config.max_num_encoder_input_tokens
        if isinstance(self, Placed):
            # the runner asks the configuration, after the model is made, whether to ask for positions anew
            config = vllm_config.model_config.multimodal_config
            object.__setattr__(config, "is_multimodal_pruning_enabled", partial(bool, True))

    def vtc_use(self, method: Method) -> None:
        """Decide by this method from here on."""
        for tap in self.vtc_taps:
            tap.hook.remove()
        self.vtc_method, family = method, self.family
        tower = getattr(self, family.tower)
        needs = method.needs & READ if family.attends else frozenset()
        self.vtc_evidence = Evidence(tower, needs, family.middle, family.prefix)
        self.vtc_taps = tuple(self.vtc_evidence.taps.values())

    def embed_multimodal(self, **kwargs: Any) -> Any:
        told = kwargs.pop(KEY, None)
        if told is None:
            raise InputError("images came without the number of their tokens that stay: vtc's processor did not run")
        counts = [one.tolist() for one in told]  # dense, kept, rows, columns, kept of each tile
        dense, kept = [one[0] for one in counts], [one[1] for one in counts]
        images, evidence = self._encoded(kwargs, dense, listening=kept != dense)
        each, tiles = [one[4:] for one in counts], [len(one) - 4 for one in counts]
        grids = [(one[2], one[3]) if one[2] else None for one in counts for _ in one[4:]]
        units = [tile for image, n in zip(images, tiles, strict=True) for tile in image.chunk(n)]
        found = reduce(
            self.vtc_method, units, [k for one in each for k in one], grids, self.vtc_width, evidence, _agreed
        )
        if isinstance(self, Placed):
            inside = [
                (tile * len(x) // n, (1, len(x))) for x, n in zip(images, tiles, strict=True) for tile in range(n)
            ]
            if isinstance(self, OnThreeAxes):
                inside = [(0, grid) for grid in grids]  # type: ignore[misc]
            found = [
                (torch.cat([rows, _digits(places + start, grid).to(rows)], 1), places)  # type: ignore[arg-type]
                for (rows, places), (start, grid) in zip(found, inside, strict=True)
            ]
        rows = iter([rows for rows, _ in found])
        return tuple(torch.cat([next(rows) for _ in range(n)]) for n in tiles)

    def _encoded(
        self, kwargs: dict[str, Any], dense: list[int], listening: bool
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """The tower's rows of every image, and what else the method reads. vLLM plans with the tokens that stay, so
        that more images may come together than its memory was measured for: they are encoded as many at a time as
        without vtc."""
        images: list[Tensor] = []
        evidence: list[dict[str, Tensor]] = []
        start = 0
        while start < len(dense):
            end, total = start + 1, dense[start]
            while end < len(dense) and total + dense[end] <= self.vtc_at_once:
                total, end = total + dense[end], end + 1
            some = kwargs if (start, end) == (0, len(dense)) else _part(kwargs, start, end, self.family.tiles)
            self.vtc_evidence.listen(listening)
            try:
                images += super().embed_multimodal(**some)  # type: ignore[misc]
                if listening and self.vtc_evidence.taps:
                    evidence += self.vtc_evidence.of(*self._patches(some, dense[start:end]))
            finally:
                self.vtc_evidence.listen(False)
            start = end
        if [len(image) for image in images] != dense:
            raise InputError(f"the tower made {[len(image) for image in images]} tokens of images announced as {dense}")
        return images, evidence

    def _patches(self, kwargs: dict[str, Any], dense: list[int]) -> tuple[list[int], list[Tensor | None], int]:
        """How many patches each image has, where a window attention puts its tokens, and the patches of a token."""
        grid = kwargs.get("image_grid_thw")
        if grid is None:
            return dense, [None] * len(dense), 1
        tower = getattr(self, self.family.tower)
        windowed = hasattr(tower, "get_window_index_thw")
        orders = [tower.get_window_index_thw(*each)[0] if windowed else None for each in grid.tolist()]
        return grid.prod(-1).tolist(), orders, tower.spatial_merge_size**2


class Placed(Reduced):
    """Its image tokens keep their positions."""

    supports_multimodal_pruning = True

    def vtc_positions(self, prompt: Tensor, digits: Tensor, at: Tensor) -> Tensor:
        """[3, n]: a prompt's positions, with those of the image tokens `at` as their digits say. What these begin on is
        not lost: it is read again by the next chunk, and by a request that was preempted."""
        raise NotImplementedError

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """The rows of the images in this step without their digits, and the prompt's positions [3, n] with theirs."""
        rows = [each[:, :-DIGITS] for each in multimodal_embeddings]
        positions = mrope_positions
        if rows:  # else a step of words alone, as most are
            config: Any = self.config  # type: ignore[attr-defined]
            marks = torch.as_tensor(input_ids, device=positions.device) == getattr(config, self.family.token)
            at = marks.nonzero()[:, 0]
            digits = torch.cat([each[:, -DIGITS:] for each in multimodal_embeddings]).to(positions)
            at = at[at >= num_computed_tokens][: len(digits)]
            positions = self.vtc_positions(positions.clone(), digits, at)
        delta = int(positions.max()) + 1 - positions.shape[1]  # the last words', which follow the whole image
        return rows, positions, delta


class OnOneAxis(Placed):
    """Of a model with one axis: vLLM is told that it has three, and its decoder reads the first alone: the third can
    hold where an image begins."""

    supports_mrope = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        rope = vllm_config.model_config.hf_text_config.rope_parameters
        section = rope.pop(SECTION)  # which the runner has seen; the rotary table is the model's own
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            rope[SECTION] = section

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(input_ids, positions[0], *args, **kwargs)  # type: ignore[misc]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Counted over the whole prompt; an image's tokens all stand where it begins, until they are known."""
        positions = torch.arange(len(input_tokens)).expand(3, -1).clone()
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            place = feature.mm_position
            dense, kept = feature.data[KEY].data.tolist()[:2]
            inside = torch.arange(place.length) if place.is_embed is None else place.is_embed.nonzero()[:, 0]
            start = place.offset + int(inside[0])
            positions[:, start : start + kept] = positions[0, start].clone()
            positions[:, start + kept :] += dense - kept
        return positions, int(positions.max()) + 1 - len(input_tokens)

    def vtc_positions(self, prompt: Tensor, digits: Tensor, at: Tensor) -> Tensor:
        prompt[0, at] = prompt[2, at] + digits[:, 2] * BASE + digits[:, 3]
        return prompt


class OnThreeAxes(Placed):
    """Its image tokens share their first axis, on which their rows and columns begin."""

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Those of the whole prompt, at the columns that stay. Which of an image's these are is not known yet; the
        first stand in for them, whose first axis is already right."""
        tokens: list[int] = []
        columns: list[int] = []
        whole, done = [], 0
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            at = feature.mm_position.offset
            dense, kept = feature.data[KEY].data.tolist()[:2]
            columns += range(len(tokens), len(tokens) + at - done)
            tokens += input_tokens[done:at]
            columns += range(len(tokens), len(tokens) + kept)
            whole.append(replace(feature, mm_position=replace(feature.mm_position, offset=len(tokens), length=dense)))
            tokens += [input_tokens[at]] * dense
            done = at + kept
        columns += range(len(tokens), len(tokens) + len(input_tokens) - done)
        tokens += input_tokens[done:]
        positions, delta = super().get_mrope_input_positions(tokens, whole)  # type: ignore[misc]
        return positions[:, columns], delta + len(tokens) - len(input_tokens)

    def vtc_positions(self, prompt: Tensor, digits: Tensor, at: Tensor) -> Tensor:
        prompt[1, at] = prompt[0, at] + digits[:, 0] * BASE + digits[:, 1]
        prompt[2, at] = prompt[0, at] + digits[:, 2] * BASE + digits[:, 3]
        return prompt


def _agreed(token_map: TokenMap) -> TokenMap:
    """What the first rank of tensor parallelism decided: others may have rounded differently."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return token_map
    first = {name: group.broadcast(getattr(token_map, name).contiguous()) for name in ("group", "anchor", "size")}
    return replace(token_map, **first, order=None, closeness=None)


def _digits(places: Tensor, grid: tuple[int, int]) -> Tensor:
    """[k, 4]: row and column of the places in a grid, two digits each."""
    row, column = places // grid[1], places % grid[1]
    return torch.stack([row // BASE, row % BASE, column // BASE, column % BASE], 1)


def _part(kwargs: dict[str, Any], start: int, end: int, tiles: str) -> dict[str, Any]:
    """The arguments of some of the images: the pixels by image, by patch as in `image_grid_thw`, or by tile; all else
    by image, but for what is one for all."""
    grid = kwargs.get("image_grid_thw")
    counts = grid.prod(-1) if grid is not None else kwargs[tiles].flatten() if tiles else None
    edges = None if counts is None else [0, *counts.cumsum(0).tolist()]

    def part(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not value.ndim:
            return value
        return value[edges[start] : edges[end]] if edges and name == "pixel_values" else value[start:end]

    return {name: part(name, value) for name, value in kwargs.items()}


def reduced(own: Any, family: Family, gaps: bool) -> type:
    """The class of vLLM with a method behind its tower. gaps: a model with one axis leaves them."""
    factories = own._processor_factory
    fields = {
        "family": family,
        "_processor_factory": replace(factories, processor=shortened(factories.processor, family)),
        "supports_encoder_cudagraph": False,  # its graphs would go around `embed_multimodal`
        "__module__": "vtc.vllm.models",
    }
    front = OnThreeAxes if family.axes == 3 else OnOneAxis if gaps else Reduced
    return type(own.__name__, (front, own), fields)
