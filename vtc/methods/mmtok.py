"""MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs, ICLR 2026, https://arxiv.org/abs/2508.18264."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.checks import check_finite, check_number
from vtc.errors import OptionError
from vtc.methods.ranked import checked, require
from vtc.methods.selector import Selector
from vtc.scores.simple import TILE
from vtc.tokens import Tokens


@dataclass(frozen=True)
class MMTok(Selector):
    """Picks, one after the other, the token that adds most to what the picked ones cover of the prompt's M text tokens
    and of the image's N tokens: `argmax_j sum_i max(0, A_ij - b_i)`, b_i the highest A_ij of a picked token, initially
    0.

    A has a row for each text token q, `softmax_j(cos(q_i, z_j) / t_text) / M`, z the tokens at the LLM's input, and a
    row for each token of the image, `alpha softmax_j(cos(v_i, v_j) / t_vision) / N`, v its feature in the vision tower:
    what the projector makes the token from, the mean over its patches. The sum is submodular: picked so, the tokens
    cover at least 1 - 1/e of what the best choice would.

    Where a prompt holds no text, the image alone decides. The text is the whole prompt, in the LLM's embeddings. (Of
    the authors' code, the one for LLaVA leaves out stop words and the usual endings, the one for Qwen does not.) Memory
    grows with N^2.

    Args:
        t_text: temperature of the text's softmax; 0.01 in the authors' code for Qwen.
        t_vision: temperature of the image's softmax.
        alpha: weight of the image, the text's is 1; 0 = text alone, where there is any.
    """

    t_text: float = 0.02
    t_vision: float = 0.2
    alpha: float = 0.5

    name: ClassVar[str] = "mmtok"
    summary: ClassVar[str] = "keeps tokens that together cover the prompt's words and the image"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "inputs"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("t_text", "t_vision", "alpha"):
            check_number(name, getattr(self, name), 0)
        if not (self.t_text and self.t_vision):
            raise OptionError(f"t_text={self.t_text!r}, t_vision={self.t_vision!r}: a temperature is a number > 0")

    def pick(self, tokens: Tokens, count: int | Tensor) -> Tensor:
        features, text = tokens.features, require(tokens, "text", self.name)
        tower = require(tokens, "inputs", self.name).float().mean(2)
        device = features.device
        real = torch.ones(features.shape[:2], dtype=torch.bool, device=device) if tokens.mask is None else tokens.mask
        words = torch.ones(text.shape[:2], dtype=torch.bool, device=device)
        words = words if tokens.text_mask is None else tokens.text_mask
        for what, x in (("features", features), ("projector's inputs", tower)):
            checked(x.float().sum(-1), what, tokens)
        check_finite(text.masked_fill(~words[..., None], 0.0), "embeddings of the prompt's text")
        if tokens.said is not None and not bool(words.any(1).all()):
            tokens.said.append("a prompt holds no text: there, the image alone decides")
        counts = torch.as_tensor(count, device=device).expand(len(real))
        step = max(1, TILE // max(1, real.shape[1] * (words.shape[1] + real.shape[1])))
        parts = (x.split(step) for x in (features, text, tower, real, words, counts))
        orders = [
            ops.cover_select(self.cover(z, q, v, there, said), k, there, torch.cat([said, there], 1))
            for z, q, v, there, said, k in zip(*parts, strict=True)
        ]
        most = max(order.shape[1] for order in orders)
        return torch.cat([torch.nn.functional.pad(order, (0, most - order.shape[1]), value=-1) for order in orders])

    def cover(self, features: Tensor, text: Tensor, tower: Tensor, real: Tensor, words: Tensor) -> Tensor:
        """A's columns [B, N, M + N]: how much every token covers of every token of the text, and of the image."""
        near = torch.empty(*features.shape[:2], text.shape[1], device=features.device)
        for out, z, q in zip(near, ops.normalize(features), ops.normalize(text), strict=True):
            out.copy_(z.double() @ q.double().mT)  # divided by 0.02, rounding would tell copies of a token apart
        alike = ops.cosines(ops.normalize(tower), real)
        table = torch.cat([near.div_(self.t_text), alike.div_(self.t_vision)], 2)
        del near, alike
        spoken = words.sum(1, keepdim=True)
        alpha = torch.where(spoken > 0, self.alpha, 1.0)
        share = torch.cat([words / spoken.clamp(min=1), alpha * real / real.sum(1, keepdim=True).clamp(min=1)], 1)
        return table.masked_fill_(~real[..., None], float("-inf")).softmax(1).mul_(share[:, None])
