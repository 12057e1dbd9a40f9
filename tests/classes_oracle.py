"""What a compressed model of any class must compute, without any code of `vtc`: the plain decoder, one row at a time
and without padding, on the embeddings of the columns that stay, at the positions that the plain model gives them.

Everything is read where `generate` enters the decoder: embeddings, positions (of however many axes), and whatever else
has a place for every column. What comes out of the decoder is compared, so that nothing behind it matters. A part that
reads a word together with those before it (Qwen 4's n-grams) reads those of the whole conversation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mllm_classes as classes
import torch
from mllm_oracle import entered, saying
from mllm_zoo import CACHE
from torch import Tensor, nn
from transformers import DynamicCache

_NOT_HANDED_ON = {"attention_mask", "use_cache", "cache_position", "position_ids", "return_dict", "logits_to_keep"}
# Where it is more than 1e-5, of hidden states of size 1 to 6. Linear attention adds in another order, in float32, when
# its chunks shift (9e-5 measured, and 1.9e-4 behind a router; of glm5_next 1.1e-5, on one make of processor alone); in
# the others 3e-5 was measured, and 0 in float64.
_TOLERANCES = {
    **dict.fromkeys(("qwen3_5", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), 2e-4),
    "qwen3_5_moe": 5e-4,
    "glm5_next": 3e-5,
    **dict.fromkeys(("muse_spark", "muse_glimmer", "gemma4", "gemma4_unified"), 1e-4),
}


def tolerance(name: str) -> float:
    """How far the outputs for a class may be from those expected, in float32."""
    return _TOLERANCES.get(name, 1e-5)


def said(model: nn.Module, inputs: dict[str, Tensor], tokens: Tensor) -> list[Tensor]:
    """The decoder's output in every call of `generate` while it is made to say `tokens` [B, steps]: [B, S, D], then
    [B, 1, D] for every step."""
    outs: list[Tensor] = []
    text = classes.text_model(model)
    hook = text.register_forward_hook(
        lambda module, args, out: outs.append(out[0] if isinstance(out, tuple) else out.last_hidden_state)
    )
    try:
        with torch.no_grad():
            model.generate(**inputs, **saying(tokens))
    finally:
        hook.remove()
    return outs


def expected(
    name: str,
    model: nn.Module,
    inputs: dict[str, Tensor],
    kept: Tensor,
    tokens: Tensor,
    merged: dict[tuple[int, int], list[int]] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Prefill of every row [kept and real, D], and decoding [B, steps, D]. merged: which columns of its row a column
    (row, column) is the mean of, itself included."""
    seen, mask = entered(model, classes.text_model(model), inputs), inputs["attention_mask"].bool()
    visual = classes.placeholders(name, inputs["input_ids"])
    batch, length = mask.shape
    prefill, decode = [], []
    for row in range(batch):
        columns, real = (kept[row] & mask[row]).nonzero().flatten(), mask[row].nonzero().flatten()
        means = {column: of for (prompt, column), of in (merged or {}).items() if prompt == row}
        words = torch.cat([inputs["input_ids"][row, real], tokens[row]])
        with _ngrams(classes.text_model(model), words, torch.searchsorted(real, columns), len(real)):
            first, then = _row(model, seen, row, columns, visual, (batch, length), tokens[row], means, int(real[-1]))
        prefill.append(first)
        decode.append(then)
    return prefill, torch.stack(decode)


@contextmanager
def _ngrams(text: nn.Module, words: Tensor, places: Tensor, prompt: int) -> Iterator[None]:
    """What stands for every word of a conversation together with those before it: all of it is read at once, without a
    cache. places: which words of the prompt, of so many, stay; those behind it are read one a call."""
    parts = [part for part in text.modules() if type(part).__name__.endswith("NGramEmbedding")]

    def standing(part: nn.Module) -> Any:
        whole, calls = part(words[None], None), iter([places, *torch.arange(prompt, len(words))[:, None]])

        def forward(ids: Tensor, cache: Any) -> Tensor:
            here = next(calls)
            assert torch.equal(words[here], ids[0]), "these are other words"
            return whole[:, here]

        return forward

    try:
        with torch.no_grad():
            for part in parts:
                part.forward = standing(part)
        yield
    finally:
        for part in parts:
            part.__dict__.pop("forward", None)


def averaged(plane: Tensor, at: list[Tensor]) -> Tensor:
    """The mean of some rows of a plane for each token; a row of words alone has no tokens."""
    return torch.stack([plane[rows].mean(0) for rows in at]) if at else plane[:0]


@torch.no_grad()
def _row(
    model: nn.Module,
    seen: dict[str, Any],
    row: int,
    columns: Tensor,
    visual: Tensor,
    shape: tuple[int, int],
    tokens: Tensor,
    means: dict[int, list[int]],
    last: int,
) -> tuple[Tensor, Tensor]:
    text = classes.text_model(model)
    given: dict[str, Any] = {}
    for key, value in seen.items():
        if key in _NOT_HANDED_ON or key == CACHE:
            continue
        if key in ("deepstack_visual_embeds", "deepstack_features") and value is not None:
            number = (visual.flatten().long().cumsum(0) - 1).view(shape)[row]
            at = [number[means.get(c, [c])] for c in columns[visual[row, columns]].tolist()]
            by_layer = isinstance(value, dict)
            planes = {layer: averaged(plane, at) for layer, plane in (value.items() if by_layer else enumerate(value))}
            given[key] = planes if by_layer else list(planes.values())
        elif key == "inputs_embeds":
            whole = value[row]
            given[key] = torch.stack([whole[means.get(c, [c])].mean(0) for c in columns.tolist()])[None]
        elif isinstance(value, Tensor) and tuple(value.shape[:2]) == shape:
            given[key] = value[row : row + 1, columns]
        elif value is None or isinstance(value, (bool, int, float, str)):
            given[key] = value
        else:
            raise NotImplementedError(f"{key} of {type(value).__name__} {getattr(value, 'shape', '')}")
    positions = seen.get("position_ids")
    if positions is None:  # then the decoder counts columns
        positions = torch.arange(shape[1])[None]
    positions = positions.expand(*positions.shape[:-2], shape[0], -1)[..., row : row + 1, :]
    positions, behind = positions[..., columns], positions[..., [last]] + 1
    cache, count = DynamicCache(config=text.config), len(columns)

    def run(**more: Any) -> Tensor:
        out = text(use_cache=True, **{CACHE: cache}, **more)
        return out.last_hidden_state[0]

    def mask(rows: int) -> Tensor:
        return torch.ones(1, rows, dtype=torch.long)

    handed = _short(seen.get("attention_mask"), row, columns, text.config)
    first = run(attention_mask=mask(count) if handed is None else handed, position_ids=positions, **given)
    then = []
    for step, token in enumerate(tokens):
        after, ids = behind + step, token.view(1, 1)  # a word: the model around embeds it
        out = model.model(
            input_ids=ids, attention_mask=mask(count + 1 + step), position_ids=after, use_cache=True, **{CACHE: cache}
        )
        then.append(out.last_hidden_state[0, -1])
    return first, torch.stack(then)


def _short(mask: Any, row: int, columns: Tensor, config: Any) -> Any:
    """A mask that the model makes in front of its decoder, [B, 1, L, L] or one for every type of layer, for the columns
    that stay: which pairs see each other both ways is kept, a window counts the tokens that are there."""
    if isinstance(mask, dict):
        cut = {kind: _short(one, row, columns, config if "sliding" in kind else None) for kind, one in mask.items()}
        return None if all(one is None for one in cut.values()) else cut
    if mask is None or mask.ndim < 4:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen[row, 0][columns][:, columns]
    place = torch.arange(len(columns))
    allowed = place[None] <= place[:, None]
    if config is not None and getattr(config, "sliding_window", None):
        allowed &= place[None] > place[:, None] - config.sliding_window
    ahead = seen & (place[None] > place[:, None])  # inside an image, whatever the window
    allowed = allowed | ahead | ahead.T
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
