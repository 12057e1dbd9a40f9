"""CDPruner: Beyond Attention or Similarity, Maximizing Conditional Diversity, https://arxiv.org/abs/2506.10967."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.methods.ranked import Ranked
from vtc.methods.selector import Selector
from vtc.tokens import Tokens


@dataclass(frozen=True)
class CDPruner(Ranked, Selector):
    """Picks tokens by a determinantal point process that is conditioned on the prompt: greedily maximises
    `det L_S`, `L_ij = r_i cos(v_i, v_j) r_j`.

    r is the relevance to the prompt, the cosine of a visual token to the prompt's text tokens (as
    `vtc.scores.relevance` takes it), per image `(r - min + 1e-6) / (max - min + 1e-6)`: 1 for the most relevant token,
    nearly 0 for the least, and 1 for all if all are equally relevant (then the prompt has no influence).

    Higher cosine = more relevant, as the paper says. Implementations in circulation take the negative cosine, between
    CLIP's patches and CLIP's caption; here it is between the LLM's image and text inputs, so results differ from
    theirs.

    Args:
        importance: the score that is r; the paper's is the default.
    """

    importance: str = "relevance"

    name: ClassVar[str] = "cdpruner"
    summary: ClassVar[str] = "keeps tokens that are relevant to the prompt, unlike each other (DPP)"
    nested: ClassVar[bool] = True

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        weight = ops.minmax(self.weight(tokens), tokens.mask, eps=1e-6, floor=1e-6)
        return ops.dpp_select(ops.normalize(tokens.features), weight, count, tokens.mask)
