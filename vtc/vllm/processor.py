"""vLLM's processors with shorter runs of image placeholders, so that its scheduler plans with the tokens that stay.

How many these are is told to the model in a field of each image; method and budget are among the keywords that vLLM
hashes an image with, so that no cache ever gives one budget's tokens to another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from prometheus_client import Counter
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing import PromptUpdateDetails

from vtc.budget import kept_of_units
from vtc.errors import OptionError
from vtc.layout import Grid
from vtc.vllm.families import Family
from vtc.vllm.settings import Settings, configured, read

KEY = "vtc"  # the keyword of a request, and the field of an image: [dense, kept, rows, columns], 0 = no grid

# in the metrics of vLLM's server, from where its prompts are made
DENSE = Counter("vtc_image_tokens_dense", "Image tokens of all requests, before vtc.")
KEPT = Counter("vtc_image_tokens_kept", "Image tokens of all requests, as the decoder got them.")


@dataclass
class Shorter(PromptUpdateDetails):
    """An image's placeholders, how many they were and are; vLLM keeps it with what it caches of the image."""

    dense: int = 0
    kept: int = 0


class Shortened:
    """In front of a processor's class."""

    info: Any
    settings: Settings
    family: Family

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        videos = inputs.mm_data_items.get_all_counts().get("video", 0)
        if videos:
            raise OptionError("vtc does not reduce videos in vLLM yet, and the prompt holds one: leave it out")
        given = dict(inputs.hf_processor_mm_kwargs)
        given[KEY] = self.settings.of_request(given.pop(KEY, None)).text()
        return super().apply(replace(inputs, hf_processor_mm_kwargs=given), timing_ctx)  # type: ignore[misc]

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        prompt, places = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        for (update,), place in zip(mm_res.prompt_updates.get("image", ()), places.get("image", ()), strict=True):
            dense, kept = update.content.dense, update.content.kept
            placed = self.settings.positions == "keep"
            if placed and kept < dense and place.start_idx + len(place.tokens) == len(prompt):
                raise OptionError("the prompt ends in an image, and vtc reads off the words behind it where it goes on")
            DENSE.inc(dense)
            KEPT.inc(kept)
        return prompt, places

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Dense: the memory that is measured with them has to suffice for any request's budget."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, KEY: {"keep": 1.0}})

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        return super()._apply_hf_processor_main(mm_items, _without(hf_kwargs))  # type: ignore[misc]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        return super()._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs))  # type: ignore[misc]

    def _get_mm_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Any:
        updates = super()._get_mm_prompt_updates(mm_items, _without(hf_processor_mm_kwargs), out_mm_kwargs)  # type: ignore[misc]
        method = read(hf_processor_mm_kwargs[KEY]).method
        shorter = []
        for item, found in zip(out_mm_kwargs.get("image", ()), updates.get("image", ()), strict=True):
            (update,) = found
            content = update.content
            full = content.full
            whole = torch.ones(len(full)) if content.is_embed is None else content.is_embed(full)
            at = whole.nonzero()[:, 0].tolist()
            if at and at[-1] - at[0] >= len(at):
                raise OptionError("vtc expects an image's placeholders in one piece, and here words stand between them")
            dense = len(at)
            tiles = int(item[self.family.tiles].data) if self.family.tiles else 1
            size = dense // tiles
            grid = self._grid(item, size)
            each = kept_of_units(method.keep, [size] * tiles, [0] * tiles)  # type: ignore[arg-type]
            each = [method.reached(kept, grid) if kept < size else kept for kept in each]
            told = torch.tensor([dense, sum(each), *(grid or (0, 0)), *each])
            item[KEY] = MultiModalFieldElem(told, MultiModalBatchedField(keep_on_cpu=True))
            short = full[: at[0] + sum(each)] + full[at[-1] + 1 :]
            shorter.append([update.with_content(Shorter(short, content.is_embed, dense, sum(each)))])
        return {**updates, "image": shorter} if shorter else updates

    def _grid(self, item: Any, dense: int) -> Grid | None:
        """Rows and columns of the tokens of an image or tile; None = they fill no rectangle, or one of an unknown
        shape."""
        if "image_grid_thw" in item:  # patches, several in a token
            _, rows, columns = item["image_grid_thw"].data.tolist()
            edge = math.isqrt(rows * columns // dense)
            return rows // edge, columns // edge
        if self.family.tiles:  # squares, of which each token is a square
            side = math.isqrt(dense)
            return (side, side) if side * side == dense else None
        patch = getattr(self.info.get_hf_config().vision_config, "patch_size", None)
        if "pixel_values" not in item or not isinstance(patch, int):
            return None
        height, width = item["pixel_values"].data.shape[-2:]
        grid = (height // patch, width // patch)
        return grid if grid[0] * grid[1] == dense else None


def _without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != KEY}


def shortened(make: Callable[[Any, Any], Any], family: Family) -> Callable[[Any, Any], Any]:
    """The same factory of processors, whose class has `Shortened` in front."""

    def made(info: Any, dummy_inputs: Any) -> Any:
        own = make if isinstance(make, type) else type(make(info, dummy_inputs))  # a few families have a function
        fields = {"family": family, "settings": configured()}
        return type(own.__name__, (Shortened, own), fields)(info, dummy_inputs)

    return made
