"""The base of every method: its budget, its properties, and its decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtc.budget import Budget, kept_at_once
from vtc.checks import check_flag, check_fraction, is_int
from vtc.errors import OptionError
from vtc.frames import FrameShares
from vtc.frames import read as read_shares
from vtc.layout import Grid
from vtc.positions.ppe import PPE, Positions, read
from vtc.token_map import TokenMap
from vtc.tokens import FIELDS, GIVEN, PLACES, Tokens


@dataclass(frozen=True)
class Method:
    """A way to reduce the number of tokens. Subclasses are frozen dataclasses of options and override `decide`.

    The budget is one of keep, r and flops (what stays, except `r`, which is ToMe's number of tokens to remove):

    Args:
        keep: float in (0, 1], the fraction of the visual tokens that stays (inside a ViT: per layer, at least 0.5);
            int, the number of tokens left at the end.
        r: tokens to remove per layer of a ViT, or a list with one number per layer.
        flops: float in (0, 1], the fraction of the encoder's multiply-adds that remains.
        where: in a multimodal LLM: "llm" (default), once, at the decoder's input; or "tower", layer by layer inside the
            vision tower, as in a plain ViT.
        pooled: in a multimodal LLM: one budget for all images of a prompt instead of one for each.
        positions: the positions of a merged token, if positions are rotary: "original", its anchor's; "ppe", those of
            several members, or vtc.PPE(slots=K).
        cascade: in a multimodal LLM: merge again before decoder layers, {layer: fraction of the tokens there that
            stays}; keep= applies at the decoder's input, 1.0 = no merging there.
        proportional: in a multimodal LLM: merged tokens are weighted by their size in attention, as in ToMe.
        shares: in a multimodal LLM, of a video's tokens: one budget for the video, shared out over its frames by a
            score, "uniform", "uniqueness" or "change", or as vtc.FrameShares(...) says; None = every frame has its own.
        before: in a multimodal LLM: vtc.PixelPrune(), which takes patches out before the vision tower; the budget is
            then of the tokens that are left.
    """

    keep: float | int | None = None
    r: int | tuple[int, ...] | None = None
    flops: float | None = None
    where: str | None = None
    pooled: bool = False
    positions: Positions = "original"
    cascade: tuple[tuple[int, float], ...] = ()
    proportional: bool = False
    shares: FrameShares | None = None
    before: Method | None = None

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    merges: ClassVar[bool] = True  # False: tokens are dropped
    halves: ClassVar[bool] = True  # at most half of the tokens can go in one round (pairwise matching)
    one_shot: ClassVar[bool] = False  # inside a ViT: removes all at the first layer instead of some at every layer
    in_decoder: ClassVar[bool] = False  # drops tokens after a layer of the decoder
    encoder: ClassVar[bool] = True  # works inside a vision encoder; False: only in a multimodal LLM
    rectangle: ClassVar[bool] = False  # or only in an encoder that needs a rectangle of tokens, and leaves it one
    turned: ClassVar[bool] = False  # reads `Tokens.rotary`
    resizes: ClassVar[bool] = False  # shrinks the image itself; a property if it depends on options, like the next
    each_head: ClassVar[bool] = False  # takes `Tokens.layer_keys` of every head
    nested: ClassVar[bool] = False  # a selector whose first picks are the same for every number of picks
    only_videos: ClassVar[bool] = False  # compares frames, and leaves pictures as they are
    budgeted: ClassVar[bool] = True  # False: the image decides how many tokens stay, and keep= takes 1.0 alone
    groups_frames: ClassVar[bool] = False  # merges similar frames of a video once more: `events_of`
    # Fields of Tokens, beyond the features, that `decide` reads. A property if it depends on options.
    needs: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset()  # of those, the fields that `decide` can do without

    def __post_init__(self) -> None:
        if isinstance(self.r, list):
            object.__setattr__(self, "r", tuple(self.r))
        _ = self.budget  # accessing it checks the options
        for name in ("pooled", "proportional"):
            check_flag(name, getattr(self, name))
        if self.where not in (None, "llm", "tower"):
            raise OptionError(f'where={self.where!r} is unknown; choose "llm" or "tower"')
        if self.where == "tower" and (self.pooled or not self.encoder):
            what = "pooled=True says nothing there" if self.pooled else f"{self.name} works at the decoder's input only"
            raise OptionError(f'where="tower": {what}')
        object.__setattr__(self, "positions", read(self.positions))
        object.__setattr__(self, "cascade", _read_cascade(self.cascade))
        object.__setattr__(self, "shares", read_shares(self.shares))
        self._check_merging()
        self._check_shares()
        self._check_where()

    def _check_merging(self) -> None:
        """Raise OptionError if an option for methods that merge, in a decoder, does not fit this method."""
        if self.ppe and not self.merges:
            raise OptionError(f"positions={self.positions!r}: {self.name} drops tokens, so none has members to carry")
        if self.cascade or self.proportional:
            what = f"cascade={dict(self.cascade)!r}" if self.cascade else "proportional=True"
            if not self.merges:
                raise OptionError(f"{what}: {self.name} merges nothing; it is for methods that merge, such as dpc_knn")
            if self.where == "tower":
                raise OptionError(f'{what} is for the decoder, and where="tower" for the layers of the tower')
        missing = self.lacks("decoder") if self.cascade else ""
        if missing:
            raise OptionError(f"cascade: {missing}: use dpc_knn, tome or pitome")

    def _check_shares(self) -> None:
        """Raise OptionError if `shares` does not fit the other options."""
        if self.shares is None:
            return
        not_at_input = self.where == "tower" or self.in_decoder
        clashes = {
            "the budget is shared out at the decoder's input": not_at_input,
            "pooled=True makes one unit of all images": self.pooled,
            "events= has a budget for every event": self.groups_frames,
            "cascade= counts in fractions of every frame": bool(self.cascade),
            f"{self.name} shares a video's budget out by itself": "frames" in self.needs,
            f"least=0 may leave nothing of a frame, and {self.name} halves": self.shares.least == 0 and self.halves,
        }
        why = next((reason for reason, given in clashes.items() if given), "")
        if why:
            raise OptionError(f"shares={self.shares!r}: {why}: leave one of the two out")

    def _check_where(self) -> None:
        """Raise OptionError if something else is to work before the tower, and does not go with this method."""
        if self.before is None:
            return
        if not isinstance(self.before, Method) or self.before.entrance is not self.before:
            raise OptionError(
                f"before={self.before!r}: it takes vtc.PixelPrune(), the one method that works before the tower"
            )
        reason = "works inside the tower" if self.where == "tower" else ""
        if self.in_decoder or self.cascade or self.proportional:
            reason = "works between the decoder's layers"
        if self.groups_frames or self.by_video:
            reason = "is about the frames of videos, which pixelprune leaves whole"
        if "grid" in self.needs - self.optional:
            reason = "reads the rows and columns of an image, and what pixelprune leaves fills no rectangle"
        if reason:
            raise OptionError(
                f"before= (pixelprune): {self.name} as given {reason}: use it alone, or divprune+pixelprune"
            )

    @property
    def entrance(self) -> Any:
        """The method that takes patches out before the vision tower; None = none."""
        return self.before

    @property
    def budget(self) -> Budget:
        """What stays. Raises OptionError."""
        return Budget(self.keep, self.r, self.flops)

    def lacks(self, place: str) -> str:
        """What the method reads that `place`, one of `vtc.tokens.GIVEN`, does not provide, in words; "" = nothing."""
        missing = [FIELDS.get(field, field) for field in sorted(self.needs - self.optional - GIVEN[place])]
        return f"{self.name} reads {' and '.join(missing)}, which {PLACES[place]} does not give" if missing else ""

    @property
    def ppe(self) -> PPE | None:
        """How merged tokens carry their members' positions; None = they carry their anchor's."""
        return None if self.positions == "original" else PPE() if self.positions == "ppe" else self.positions  # type: ignore[return-value]

    @property
    def label(self) -> str:
        """The name with the options that `vtc.methods.make` takes after a +."""
        plus = ("+ppe" if self.ppe else "") + ("+proportional" if self.proportional else "")
        plus += "" if self.shares is None else f"+shares={self.shares.by}"
        given = getattr(self.before, "tolerance", 0)
        return self.name + plus + (f"+pixelprune{f'={given}' if given else ''}" if self.before else "")

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        """Remove `r` tokens behind the prefix: an int, or [B] when there is a mask (a ragged batch)."""
        raise NotImplementedError

    def reached(self, kept: int, grid: Grid | None) -> int:
        """How many tokens of an image stay if at most `kept` may, known before the image is encoded."""
        return kept

    @property
    def by_video(self) -> bool:
        """Whether a video has one budget: the method reads its frames, or it is shared out over them."""
        return self.shares is not None or "frames" in self.needs

    def kept_of_video(self, frames: tuple[int, ...]) -> int:
        """For a method that reads `Tokens.frames`: how many tokens stay of a video whose frames have that many."""
        assert self.keep is not None
        return kept_at_once(self.keep, sum(frames))

    def events_of(self, means: Tensor) -> list[list[int]]:
        """For a method that groups frames: the frames of every event, in order, from the frames' means [F, C]."""
        raise NotImplementedError

    def check(self, width: int) -> None:
        """Raise OptionError if the options do not fit tokens of `width` channels. Called before anything is patched."""

    def notes(self, tokens: Tokens) -> str:
        """What a report should say about how the method decides on `tokens`, if the options leave it open."""
        return ""

    def options(self) -> dict[str, Any]:
        """The options that differ from the defaults, to print."""
        return {k: v for k, v in vars(self).items() if v != type(self).__dataclass_fields__[k].default}


def _read_cascade(value: Any) -> tuple[tuple[int, float], ...]:
    """{layer: keep}, or pairs as read from a file; returns pairs sorted by layer."""
    try:
        pairs = sorted((layer, keep) for layer, keep in (value.items() if isinstance(value, Mapping) else value))
    except (TypeError, ValueError):
        raise OptionError(f"cascade={value!r}: it takes {{layer: fraction that stays}}, such as {{11: 0.45}}") from None
    for layer, keep in pairs:
        if not is_int(layer) or layer < 1:
            raise OptionError(f"cascade: layer {layer!r} is no decoder layer >= 1; for the decoder's input give keep=")
        check_fraction(f"cascade at layer {layer}: keep", keep, or_count=False)
    if len({layer for layer, _ in pairs}) < len(pairs):
        raise OptionError(f"cascade={value!r} names a layer twice")
    return tuple(pairs)
