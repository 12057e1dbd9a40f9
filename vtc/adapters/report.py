"""What the user is told about a model: what would be reduced in it, and what a call did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Encoder:
    """One encoder that was found: where, what, how deep, where tokens would be removed; or why not."""

    path: str
    kind: str
    adapter: str
    layers: int = 0
    prefix_tokens: int | None = 0  # None: a multimodal LLM, whose layers are the decoder's
    reduces: str = ""
    refusal: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        if self.refusal:
            return f"{where}{self.kind} is left alone: {self.refusal}"
        at = f", reduced at {self.reduces}" if self.reduces else ""
        prefix = f", {self.prefix_tokens} prefix token{'s' * (self.prefix_tokens != 1)}"
        if self.prefix_tokens is None:
            prefix = ""
        return f"{where}{self.kind} ({self.adapter}), {self.layers} layers{prefix}{at}"


@dataclass(frozen=True)
class Report:
    """What happened in the last call.

    Attributes:
        tokens: per layer (tokens into attention, tokens into the MLP), prefix included; per image if the images differ.
        before, after: image tokens at the encoder's entry and end, one per image.
        macs_before, macs_after: multiply-adds of the encoder for the whole call; in a multimodal LLM those of the
            decoder's prefill, without the language head, and of the tower if tokens leave before or inside it.
        notes: what the method chose by itself; which call or encoder this describes, if that is not obvious.
        prompts: in a multimodal LLM, the original length of every prompt, without padding; `tokens` has the reduced
            lengths.
        layers: if the decoder's layers differ, the fraction of the image tokens that each of them sees.
        frames: of every video the tokens that stay of each frame.
    """

    method: str
    images: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    tokens: tuple[tuple[Any, Any], ...]
    macs_before: int
    macs_after: int
    path: str = ""
    notes: str = ""
    prompts: tuple[int, ...] = ()
    layers: tuple[float, ...] = ()
    frames: tuple[tuple[int, ...], ...] = ()

    @property
    def kept(self) -> float:
        """The fraction of the image tokens that stayed; if tokens are removed between a decoder's layers, the mean over
        the layers."""
        if self.layers:
            return sum(self.layers) / len(self.layers)
        return sum(self.after) / sum(self.before) if any(self.before) else 1.0

    @property
    def macs_ratio(self) -> float:
        """The fraction of multiply-adds that remained."""
        return self.macs_after / self.macs_before if self.macs_before else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kept": self.kept, "macs_ratio": self.macs_ratio}

    def __str__(self) -> str:
        def span(values: tuple[int, ...]) -> str:
            return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}" if values else "no"

        over = " on average over the layers" if self.layers else ""
        by_frame = "".join(f", {span(frames)} a frame" for frames in self.frames)
        where = f"{self.images} image{'s' * (self.images != 1)}"
        if self.prompts:
            where = f"{self.images} image{'s, crops or frames' * (self.images != 1)}"
            last = self.tokens[-1][0]
            where += f", prompt {span(self.prompts)} -> {span(last if isinstance(last, tuple) else (last,))}"
        return (
            f"{self.method}: {span(self.before)} -> {span(self.after)} image tokens ({self.kept:.1%} kept, "
            f"{1 - self.kept:.1%} removed{over}{by_frame}), {where}, {self.macs_before / 1e9:.2f} -> "
            f"{self.macs_after / 1e9:.2f} GMACs ({self.macs_ratio:.1%} remain)"
            f"{'; ' if self.notes else ''}{self.notes}"
        )


def plain(counts: list[int]) -> Any:
    return counts[0] if len(set(counts)) == 1 else tuple(counts)
