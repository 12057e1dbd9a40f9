"""FastV: An Image is Worth 1/2 Tokens After Layer 2, Chen et al., ECCV 2024, https://arxiv.org/abs/2403.06764."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.checks import check_number
from vtc.errors import OptionError
from vtc.methods.ranked import Ranked
from vtc.methods.selector import Selector
from vtc.tokens import Tokens


@dataclass(frozen=True)
class FastV(Ranked, Selector):
    """Inside the LLM: keeps the K image tokens to which the prompt's last token attends the most after `layer` layers.

    The adapter provides that attention as `Tokens.prompt_attention`: query of the last token that is not an image
    token, softmax over the image's keys, mean over the heads. (The paper's softmax is over all keys.)

    Args:
        layer: how many decoder layers see all tokens.
        importance: a score to use instead of that attention; it must be available inside the decoder.
    """

    importance: str = "prompt_attention"
    layer: int = 2

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "keeps the tokens the prompt attends to, inside the LLM"
    in_decoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("layer", self.layer, 0, whole=True)
        if self.scorer is not None:
            raise OptionError(
                f"scorer={self.scorer!r} reads what a decoder takes in, and fastv ranks hidden states inside it: use "
                "norm"
            )

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        return ops.top_select(self.weight(tokens), count, tokens.mask)
