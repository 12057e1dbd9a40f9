"""A long video that comes in pieces of frames, under one budget for all that has come so far."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.multimodal.encode import packed
from vtc.adapters.multimodal.entrance import Left
from vtc.adapters.multimodal.families.base import IMAGE, VIDEO
from vtc.adapters.multimodal.token_batch import EncodedFeatures
from vtc.budget import share_out
from vtc.checks import check_finite, check_number
from vtc.decide import Units
from vtc.errors import InputError, UnsupportedModelError
from vtc.layout import Grid, Layout, Unit


@dataclass
class Frame:
    """What is left of a frame (of a pair, with Qwen models): its tokens in the order in which the method picked them.

    Attributes:
        places: [k] long, where in the frame; rows: [k, C], behind each other the tower's features and DeepStack's.
    """

    places: Tensor
    rows: Tensor

    def cut(self, count: int) -> None:
        """Keep the first `count` picks; what goes is freed."""
        if count < len(self.places):
            self.places, self.rows = self.places[:count].clone(), self.rows[:count].clone()


class VideoStream:
    """A video fed in pieces: `feed` encodes some frames and keeps what the budget leaves of them, `generate` asks about
    everything that has come. See `vtc.Handle.stream`.

    Every frame has the same share of the budget, which becomes less with every piece; the tokens that a method picked
    first stay. Of a method whose picks do not depend on their number that is what it keeps of the whole video at once,
    with `shares="uniform"` and the budget as a number.

    Attributes:
        tokens: the budget. frames: what is left of every frame so far.
    """

    def __init__(self, patch: Any, model: Any, tokens: int) -> None:
        check_number("tokens", tokens, 1, whole=True)
        method, name = patch.method, type(patch.inner).__name__
        if not patch.family.streams(patch.inner):
            raise UnsupportedModelError(
                f"{name}: a stream needs a tower that sees a frame (a pair of frames) alone, as in Qwen2-VL, "
                "Qwen2.5-VL and Qwen3-VL: give the video in one call"
            )
        fits = method.nested and method.where != "tower" and method.entrance is None and method.shares is None
        if not fits or getattr(method, "frame", None):
            raise UnsupportedModelError(
                f"{method.name} as given cannot follow a stream, whose frames have even shares and give up what was "
                "picked last: use divprune, idpruner, scope, zoo_prune or norm, without frame=, shares= and before="
            )
        if "text" in method.needs:
            raise UnsupportedModelError(
                f"{method.name} as given reads the question, which comes after the frames: use divprune or idpruner"
            )
        self.patch, self.model, self.tokens = patch, model, tokens
        self.frames: list[Frame] = []
        self.grid: Grid | None = None  # rows and columns of a frame's patches
        self.cells: Grid = (0, 0)  # and of its tokens
        self.output: Any = None
        self.widths: list[int] = []  # of what `Frame.rows` has behind each other

    @property
    def seen(self) -> int:
        """How many tokens all frames had."""
        return len(self.frames) * self._places

    @property
    def kept(self) -> int:
        """How many of them are left."""
        return sum(len(frame.places) for frame in self.frames)

    def feed(self, pixel_values_videos: Tensor, video_grid_thw: Tensor) -> None:
        """Encode a piece of the video, as its processor gives it.

        Raises:
            InputError: several videos at once; a piece whose frames have another size than those before; more frames
                than there are tokens in the budget.
        """
        grid = torch.as_tensor(video_grid_thw)
        if grid.shape != (1, 3):
            raise InputError(f"video_grid_thw is {list(grid.shape)}: a stream takes the pieces of one video, [1, 3]")
        time, *size = grid[0].tolist()
        if self.grid not in (None, tuple(size)):
            raise InputError(f"this piece has frames of {size[0]}x{size[1]} patches, those before {self.grid}: resize")
        if len(self.frames) + time > self.tokens:
            raise InputError(f"{len(self.frames) + time} frames are more than the budget of {self.tokens} tokens")
        patch, encode = self.patch, self.patch.encoders.by[VIDEO.name]
        with torch.no_grad():
            output = encode(pixel_values_videos, video_grid_thw=grid, return_dict=True)
            encoded = output.vtc_encoded
            planes = getattr(output, "deepstack_features", None) or ()
            levels = [packed(level) for level in planes]
            rows = packed(patch.family.pooled(output))
            units, held = Units(rows, encoded.layout.units), torch.cat([rows, *levels], 1)
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            check_finite(rows, "image tokens")
            fields = {name: units.packed(x) for name, x in encoded.evidence.items()}
            if "projector" in patch.method.needs & patch.family.evidence:
                fields["projector"] = patch.family.projection(patch.inner)
            lengths = [units.lengths[0]] * (len(self.frames) + time)
            total = min(self.tokens, sum(lengths))
            shares = share_out(total, [total / len(lengths)] * len(lengths), lengths)
            before, new = shares[: len(self.frames)], shares[len(self.frames) :]
            order = patch.method.pick(units.tokens(patch.method, **fields), max(new))
        for frame, share in zip(self.frames, before, strict=True):
            frame.cut(share)
        for i, share in enumerate(new):
            places = order[i][:share].clone()
            self.frames.append(Frame(places, held[units.index[i][places]]))
        assert units.grids[0] is not None
        self.grid, self.cells = (size[0], size[1]), units.grids[0]
        output = copy.copy(output)  # an empty one of the same kind, for `generate`
        output.pooler_output = output.last_hidden_state = None
        output.__dict__.pop("vtc_encoded", None)
        if levels:  # one tensor each, or one for each item, as the version of transformers has it
            output.deepstack_features = [None if isinstance(plane, Tensor) else () for plane in planes]
        self.output, self.widths = output, [x.shape[1] for x in (rows, *levels)]

    @property
    def _places(self) -> int:
        """How many tokens a frame has."""
        return self.cells[0] * self.cells[1]

    def generate(self, input_ids: Tensor, **more: Any) -> Tensor:
        """The model's `generate` about the frames so far.

        Args:
            input_ids: [1, L], with one placeholder for the video; of Qwen3-VL, which tells the time of every pair of
                frames, one for each pair. more: other arguments of `generate`, such as second_per_grid_ts.

        Returns:
            As the model; the prompt in front holds a placeholder for every token that the frames had.

        Raises:
            InputError: nothing has been fed; another number of placeholders.
        """
        if not self.frames:
            raise InputError("no frame has been fed to this stream")
        inner, family, device = self.patch.inner, self.patch.family, input_ids.device
        token = family.token(inner, VIDEO, input_ids)
        here, runs = input_ids == token, len(self.frames) if family.streams(inner) == "frame" else 1
        if len(input_ids) != 1 or int(here.sum()) != runs:
            raise InputError(
                f"the prompt holds {int(here.sum())} video placeholders (id {token}) in {len(input_ids)} rows: this "
                f"stream is asked with one prompt, and {runs} of them"
            )
        times = torch.where(here[0], self.seen // runs, 1)
        columns = torch.arange(len(times), device=device).repeat_interleave(times)
        ids = input_ids[:, columns]
        if "mm_token_type_ids" in inspect.signature(type(inner).forward).parameters:
            kinds = more.get("mm_token_type_ids")
            if kinds is None:
                kinds = 2 * here.long() + (input_ids == family.token(inner, IMAGE, input_ids))
            more["mm_token_type_ids"] = kinds[:, columns]
        mask = more.pop("attention_mask", None)
        if mask is not None and not bool(mask.all()):
            raise InputError("attention_mask hides columns of a stream's prompt: leave it out")
        grid = torch.tensor([[len(self.frames), *self.grid]], device=device)  # type: ignore[misc]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "video_grid_thw": grid}
        encode = self.patch.encoders.by[VIDEO.name]
        encode.output = self._whole()
        try:
            return self.model.generate(**given, pixel_values_videos=torch.empty(1, 0, device=device), **more)
        finally:
            encode.output = None

    def _whole(self) -> Any:
        """An encoder's output for the whole video, 0 where a token is gone, which says what is left."""
        index = torch.cat([frame.places.sort().values + i * self._places for i, frame in enumerate(self.frames)])
        kept = torch.zeros(self.seen, dtype=torch.bool)
        kept[index.cpu()] = True
        left, output = Left(kept, None), copy.copy(self.output)
        rows = left.spread(torch.cat([frame.rows[frame.places.argsort()] for frame in self.frames]))
        features, *levels = rows.split(self.widths, 1)
        output.pooler_output = (features,)
        if levels:
            forms = zip(output.deepstack_features, levels, strict=True)
            output.deepstack_features = [level if form is None else (level,) for form, level in forms]
        places = torch.arange(self.seen).split(self._places)
        layout = Layout(tuple(Unit(each, 0, self.cells) for each in places))
        output.vtc_encoded = EncodedFeatures(self.patch.encoders, (self.seen,), layout, {}, left=left, decided=True)
        return output
