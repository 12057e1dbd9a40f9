"""What every method shares: its budget, and what it sees when it decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtc.budget import Budget
from vtc.checks import check_fraction, is_int
from vtc.errors import OptionError
from vtc.positions.ppe import PPE, Positions, read
from vtc.token_map import TokenMap

Projector = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tokens:
    """What a method sees at the place where it decides.

    Attributes:
        features: [B, N, C], the tokens themselves.
        keys: [B, N, D] attention keys, the mean over heads; None where there is no attention.
        size: [B, N] float32, what each token already stands for; None = all 1.
        mask: [B, N] bool, True = real; None = all real.
        prefix: how many leading tokens (CLS, distillation, registers) are kept alone.
        grid: (rows, columns) of each image's patches, B of them, None where they fill no rectangle; None = unknown.
        layer, depth: the layer that decides, of how many.

    At the input of a multimodal LLM, where `features` are the projected image tokens, and only as far as the method's
    `needs` ask for it and the model has it:

    Attributes:
        attention: [B, N] float32, what each token received in the vision tower, near its end: from the CLS token where
            there is one, else summed over all queries. The mean over heads.
        middle: [B, N] float32, the same in the middle of the tower.
        inputs: [B, N, P, V] float32, what the projector made each token from: P patches of width V.
        hidden: [B, N, H], what the projector's first linear map gave; None = not at hand.
        projector: [B, N, P, V] -> [B, N, C], the model's projector in float32.
        text: [B, T, C] embeddings of the prompt's text tokens; text_mask: [B, T] bool, True = real.
        rotary: [B, N, 2] float32, the mean cosine and the mean sine of the decoder's rotary table at each token; only
            where the method is `turned`.
        said: takes a sentence for all that `decide` did in place of what its options ask for; None = nobody asks.
    """

    features: Tensor
    keys: Tensor | None = None
    size: Tensor | None = None
    mask: Tensor | None = None
    prefix: int = 0
    grid: tuple[tuple[int, int] | None, ...] | None = None
    layer: int = 0
    depth: int = 1
    attention: Tensor | None = None
    middle: Tensor | None = None
    inputs: Tensor | None = None
    hidden: Tensor | None = None
    projector: Projector | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    rotary: Tensor | None = None
    said: list[str] | None = None


@dataclass(frozen=True)
class Method:
    """A way to make tokens fewer. Subclasses are frozen dataclasses of options and override `decide`.

    The budget is one of (all say what stays, except `r`, which is ToMe's own count of tokens to remove):

    Args:
        keep: float in (0, 1], the fraction of the visual tokens that stays (inside a ViT: per layer, at least 0.5);
            int, the number of tokens left at the end.
        r: tokens to remove per layer of a ViT, or a list with one number per layer.
        flops: float in (0, 1], the fraction of the encoder's multiply-adds that remains.
        where: in a multimodal LLM: "llm" (default), once, where the decoder takes the image tokens in; or "tower",
            layer by layer inside the vision tower, as in a ViT alone.
        pooled: in a multimodal LLM: one budget for all images of a prompt instead of one for each.
        positions: what a merged token carries where positions are rotary: "original", its anchor's; "ppe", those of
            several members, or vtc.PPE(slots=K).
        cascade: in a multimodal LLM: merge again before decoder layers, {layer: fraction of the tokens there that
            stays}; keep= is what happens at the decoder's input, 1.0 = nothing.
        proportional: in a multimodal LLM: merged tokens weigh in attention by their size, as in ToMe.
    """

    keep: float | int | None = None
    r: int | tuple[int, ...] | None = None
    flops: float | None = None
    where: str | None = None
    pooled: bool = False
    positions: Positions = "original"
    cascade: tuple[tuple[int, float], ...] = ()
    proportional: bool = False

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    merges: ClassVar[bool] = True  # False: tokens are dropped
    halves: ClassVar[bool] = True  # at most half of the tokens can go in one round (pairwise matching)
    one_shot: ClassVar[bool] = False  # inside a ViT: all at the first layer instead of some at every layer
    in_decoder: ClassVar[bool] = False  # drops tokens behind a layer of the decoder
    encoder: ClassVar[bool] = True  # works inside a vision encoder; False: only where a multimodal LLM takes its tokens
    turned: ClassVar[bool] = False  # reads `Tokens.rotary`
    resizes: ClassVar[bool] = False  # shrinks the image itself; a property where it depends on options, as the next
    groups_frames: ClassVar[bool] = False  # merges once more what is alike in a video's frames: `events_of`
    # Fields of Tokens beyond the features that `decide` reads. A property where it depends on options.
    needs: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset()  # of those, what `decide` can do without

    def __post_init__(self) -> None:
        if isinstance(self.r, list):
            object.__setattr__(self, "r", tuple(self.r))
        _ = self.budget  # which checks them
        for name in ("pooled", "proportional"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r}: it takes True or False")
        if self.where not in (None, "llm", "tower"):
            raise OptionError(f'where={self.where!r} is unknown; choose "llm" or "tower"')
        if self.where == "tower" and (self.pooled or not self.encoder):
            what = "pooled=True says nothing there" if self.pooled else f"{self.name} works at the decoder's input only"
            raise OptionError(f'where="tower": {what}')
        object.__setattr__(self, "positions", read(self.positions))
        object.__setattr__(self, "cascade", _read_cascade(self.cascade))
        self._check_merging()

    def _check_merging(self) -> None:
        """Raise OptionError where an option for methods that merge, in a decoder, does not fit this one."""
        if self.ppe and not self.merges:
            raise OptionError(f"positions={self.positions!r}: {self.name} drops tokens, so none has members to carry")
        if self.cascade or self.proportional:
            what = f"cascade={dict(self.cascade)!r}" if self.cascade else "proportional=True"
            if not self.merges:
                raise OptionError(f"{what}: {self.name} merges nothing; it is for methods that merge, such as dpc_knn")
            if self.where == "tower":
                raise OptionError(f'{what} is for the decoder, and where="tower" for the layers of the tower')
        unknown = self.needs - self.optional - ({"keys"} if self.encoder else set()) if self.cascade else set()
        if unknown:
            raise OptionError(
                f"cascade: {self.name} reads the {' and '.join(sorted(unknown))} of the image, which the decoder's "
                "layers do not have: use dpc_knn, tome or pitome"
            )

    @property
    def budget(self) -> Budget:
        """What stays. Raises OptionError."""
        return Budget(self.keep, self.r, self.flops)

    @property
    def ppe(self) -> PPE | None:
        """How merged tokens carry their members' positions; None = they carry their anchor's."""
        return None if self.positions == "original" else PPE() if self.positions == "ppe" else self.positions  # type: ignore[return-value]

    @property
    def label(self) -> str:
        """The name with the options that `vtc.methods.make` takes after a +."""
        return self.name + ("+ppe" if self.ppe else "") + ("+proportional" if self.proportional else "")

    def decide(self, tokens: Tokens, r: int | Tensor) -> TokenMap:
        """Remove `r` tokens behind the prefix: an int, or [B] when there is a mask (a ragged batch)."""
        raise NotImplementedError

    def events_of(self, means: Tensor) -> list[list[int]]:
        """Of a method that groups frames: the frames of every event, in order, from the frames' means [F, C]."""
        raise NotImplementedError

    def check(self, width: int) -> None:
        """Raise OptionError if the options do not fit tokens of `width` channels. Called before anything is patched."""

    def notes(self, tokens: Tokens) -> str:
        """What a report should say of how `tokens` will be decided on, where the options leave it open."""
        return ""

    def options(self) -> dict[str, Any]:
        """The options that differ from the defaults, to print."""
        return {k: v for k, v in vars(self).items() if v != type(self).__dataclass_fields__[k].default}


def _read_cascade(value: Any) -> tuple[tuple[int, float], ...]:
    """{layer: keep}, or pairs as a file has them, by layer."""
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
