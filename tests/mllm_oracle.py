"""What a compressed multimodal LLM must say, computed without any code of `vtc`.

The contract (docs/architecture): the logits of prefill and of decoding are those of the unpatched decoder, fed the kept
rows of the merged embeddings at their original positions, and decoding goes on where the dense prompt ends. Here it is
done literally, one row at a time: the dense run of the plain model is recorded where it enters the decoder, a row is
sliced, and the plain decoder runs on the slice, a batch of one without padding. The attention masks are written from
their definition, in four dimensions: causal; both ways inside an image (Gemma 3) or the prefix (PaliGemma); the sliding
window counted over the tokens that are there. A mask is always given, because positions with gaps and no mask are taken
for packed sequences. The cache keeps every token in every layer, so that windows are the mask's business alone.

`python tests/mllm_oracle.py` checks the oracle against the plain model, every family and case.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mllm_zoo import CACHE, placeholders, text_model
from torch import Tensor, nn

Inputs = dict[str, Tensor]
# New rows of the kept visual columns in row-major order, [kept visual tokens, D]; with DeepStack a dictionary of
# "embeds" (optional) and "deepstack", one such tensor per level.
Replaced = Tensor | dict[str, Any] | None


@dataclass
class Dense:
    """What reaches the decoder in the plain model's first forward of `generate`."""

    embeds: Tensor  # [B, L, D]
    positions: Tensor  # [B, L], or [3, B, L] for M-RoPE
    mask: Tensor  # [B, L] bool
    visual: Tensor  # [B, L] bool
    deepstack: list[Tensor]  # each [B, L, D], zero off the visual columns
    block: Tensor  # [B, L], equal and not -1 where tokens see each other both ways

    def next_position(self, row: int, onward: str) -> Tensor:
        """[1, 1], or [3, 1, 1] for M-RoPE: where the first new token stands."""
        real = self.positions[..., row : row + 1, :][..., self.mask[row]]
        return (real[..., -1:] if onward == "generate" else torch.full_like(real[..., :1], int(real.max()))) + 1


@dataclass
class Result:
    prefill: list[Tensor]  # of each row [kept and not padding, V]
    decode: Tensor  # [B, steps, V]: the logits after tokens[:, :t + 1] were fed
    tokens: Tensor  # [B, steps]: what was fed; the first is chosen (or forced) at the end of prefill


class _Reached(Exception):
    pass


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Qwen models remember the last call's `rope_deltas`."""
    before = getattr(model.model, "rope_deltas", None)
    try:
        with torch.no_grad():
            yield
    finally:
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = before


def _blocks(model: nn.Module, inputs: Inputs) -> Tensor:
    types, none = inputs.get("token_type_ids"), torch.full_like(inputs["input_ids"], -1)
    if types is None:
        return none
    if model.config.model_type == "paligemma":  # one block, the prefix
        return torch.where(types == 0, 0, none)
    starts = (types == 1) & (nn.functional.pad(types, (1, 0))[:, :-1] != 1)
    return torch.where(types == 1, starts.long().cumsum(1), none)


def entered(model: nn.Module, text: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """What `generate` hands to the decoder, `text`, in its first call; it is stopped there."""
    seen: dict[str, Any] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise _Reached

    hook = text.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with _undisturbed(model):
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen


def capture(model: nn.Module, inputs: Inputs) -> Dense:
    """The plain dense run as `generate` starts it."""
    seen = entered(model, text_model(model), inputs)
    embeds, positions = seen["inputs_embeds"], seen["position_ids"]
    visual = placeholders(model, inputs["input_ids"])
    if positions.ndim == 3:
        positions = positions[-3:]  # the fourth row, where there is one, counts tokens for the mask builder
    planes = []
    for rows in seen.get("deepstack_visual_embeds") or []:
        assert torch.equal(seen["visual_pos_masks"], visual)
        plane = torch.zeros_like(embeds)
        plane[visual] = rows
        planes.append(plane)
    mask = inputs["attention_mask"].bool()
    positions = positions.expand(*positions.shape[:-2], len(embeds), -1)
    return Dense(embeds, positions, mask, visual, planes, _blocks(model, inputs))


def dense_generate_positions(name: str, model: nn.Module, inputs: Inputs) -> Tensor:
    """The positions `generate` gives the dense prompt: [B, L], or [3, B, L] for M-RoPE; meaningless on padding."""
    return capture(model, inputs).positions


def dense_features(model: nn.Module, inputs: Inputs) -> Tensor:
    """The decoder's input at the visual columns, row-major: [visual tokens, D]."""
    dense = capture(model, inputs)
    return dense.embeds[dense.visual]


def dense_deepstack(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Qwen3-VL: what is added at the visual columns after each of the first layers, row-major: [visual tokens, D]."""
    dense = capture(model, inputs)
    return [plane[dense.visual] for plane in dense.deepstack]


def _masks(text: nn.Module, block: Tensor, dtype: torch.dtype) -> Any:
    """Additive masks [1, 1, N, N], one, or one per kind of layer."""
    place = torch.arange(len(block), device=block.device)
    query, key = place[:, None], place[None]
    full = (key <= query) | ((block[:, None] == block[None]) & (block[None] >= 0))

    def additive(allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[None, None]

    if "sliding_attention" not in (getattr(text.config, "layer_types", None) or []):
        return additive(full)
    # A window is the query itself and the tokens before it; it takes nothing from what lies ahead inside an image.
    return {
        "full_attention": additive(full),
        "sliding_attention": additive(full & (key > query - text.config.sliding_window)),
    }


def _part(masks: Any, start: int, stop: int) -> Any:
    if isinstance(masks, dict):
        return {kind: _part(mask, start, stop) for kind, mask in masks.items()}
    return masks[:, :, start:stop, :stop]


def _choose(model: nn.Module, logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., model.generation_config.suppress_tokens or []] = -torch.inf
    return logits.argmax(-1)


def oracle(
    name: str,
    model: nn.Module,
    inputs: Inputs,
    kept: Tensor | None = None,
    replaced: Replaced = None,
    steps: int = 10,
    forced: Tensor | None = None,
    onward: str = "generate",
) -> Result:
    """The logits of a plain `model` that is given only the columns `kept` [B, L] of the prompt.

    `forced` [B, steps] is what is fed while decoding; without it, what the model itself finds most likely.

    `onward`: `generate` goes on at the last token's position plus one, axis by axis; a bare `forward` of Qwen models
    goes on at the largest position of the row plus one ("max"). The two differ where a video's last frame lies later
    than the text behind it (Qwen2.5-VL), and where a prompt ends with an image.
    """
    dense = capture(model, inputs)
    kept = torch.ones_like(dense.mask) if kept is None else kept
    assert kept.dtype == torch.bool and kept.shape == dense.mask.shape, "kept is a bool for each column of the prompt"
    assert kept[~dense.visual].all(), "text is never dropped"
    embeds, planes = dense.embeds.clone(), [plane.clone() for plane in dense.deepstack]
    new = replaced if isinstance(replaced, dict) else {} if replaced is None else {"embeds": replaced}
    assert onward in ("generate", "max")
    assert set(new) <= {"embeds", "deepstack"}
    if "embeds" in new:
        embeds[kept & dense.visual] = new["embeds"].to(embeds)
    if "deepstack" in new:
        for plane, rows in zip(planes, new["deepstack"], strict=True):
            plane[kept & dense.visual] = rows.to(plane)

    prefill, decode, tokens = [], [], []
    with _undisturbed(model):
        for row in range(len(embeds)):
            first, following, fed = _row(model, dense, row, kept, embeds, planes, steps, forced, onward)
            prefill.append(first)
            decode.append(following)
            tokens.append(fed)
    return Result(prefill, torch.stack(decode), torch.stack(tokens))


def _row(
    model: nn.Module,
    dense: Dense,
    row: int,
    kept: Tensor,
    embeds: Tensor,
    planes: list[Tensor],
    steps: int,
    forced: Tensor | None,
    onward: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from transformers import DynamicCache

    text, head, embed = text_model(model), model.get_output_embeddings(), model.get_input_embeddings()
    columns = kept[row] & dense.mask[row]
    number = int(columns.sum())
    block = torch.cat([dense.block[row, columns], dense.block.new_full((steps,), -1)])  # generated text is causal
    masks = _masks(text, block, embeds.dtype)
    more: dict[str, Any] = {}
    if planes and bool(dense.visual[row, columns].any()):
        visual = dense.visual[row, columns][None]
        more["visual_pos_masks"] = visual
        more["deepstack_visual_embeds"] = [plane[row, columns][visual[0]] for plane in planes]
    cache = DynamicCache()

    def run(rows: Tensor, positions: Tensor, start: int, **more: Any) -> Tensor:
        out = text(
            inputs_embeds=rows,
            attention_mask=_part(masks, start, start + rows.shape[1]),
            position_ids=positions,
            use_cache=True,
            **{CACHE: cache},
            **more,
        )
        assert out[CACHE].get_seq_length() == start + rows.shape[1]
        return head(out.last_hidden_state)[0]

    positions = dense.positions[..., row : row + 1, :][..., columns]
    first = run(embeds[row, columns][None], positions, 0, **more)
    logits, following, fed, after = first[-1], [], [], dense.next_position(row, onward)
    for step in range(steps):
        token = _choose(model, logits) if forced is None else forced[row, step]
        logits = run(embed(token[None, None]), after + step, number + step)[-1]
        following.append(logits)
        fed.append(token)
    if not steps:
        return first, first.new_zeros(0, first.shape[-1]), torch.zeros(0, dtype=torch.long)
    return first, torch.stack(following), torch.stack(fed)


# -- the other side: what a model, plain or patched, says of itself --------------------------------------------------


def saying(tokens: Tensor) -> dict[str, Any]:
    """Options of `generate` by which it says `tokens` [B, steps], and one more."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Force(LogitsProcessor):
        step = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            wanted = tokens[:, min(self.step, tokens.shape[1] - 1)].to(scores.device)
            self.step += 1
            return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)

    processors = LogitsProcessorList([Force()])
    return {"max_new_tokens": tokens.shape[1] + 1, "do_sample": False, "logits_processor": processors}


def generate_logits(model: nn.Module, inputs: Inputs, tokens: Tensor, **options: Any) -> Tensor:
    """[B, steps + 1, V]: the logits of `model.generate` while it is made to say `tokens` [B, steps].

    The first are those at the end of prefill; the others compare with `Result.decode`. For prompts without padding on
    the right: there transformers itself reads the last column, and goes on counting from it.
    """
    with torch.no_grad():
        out = model.generate(**inputs, **saying(tokens), output_logits=True, return_dict_in_generate=True, **options)
    return torch.stack(out.logits, dim=1)


def forward_logits(
    model: nn.Module, inputs: Inputs, tokens: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prefill [B, L', V] and decode [B, steps, V] by calling the model itself with its own cache, `tokens` fed.

    The mask grows as `generate` lets it grow. `positions` are those of the dense prompt (`dense_generate_positions`):
    with them each row goes on behind its own last token, on whichever side its padding is. Without them the model
    chooses, as in a loop without `generate` (`onward="max"`).
    """
    mask = inputs["attention_mask"]
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    given = {} if positions is None else {"position_ids": positions}
    following = []
    with torch.no_grad():
        out = model(**inputs, **given, use_cache=True)
        prefill = out.logits
        for step in range(tokens.shape[1]):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if positions is not None:
                ends = last[:, None].expand(*positions.shape[:-1], 1)
                given = {"position_ids": positions.gather(-1, ends) + 1 + step}
            elif mask.all():
                # As in `generate`; given one, the Qwen models make positions for all of it, and fail.
                given = {"attention_mask": None}
            out = model(
                input_ids=tokens[:, step : step + 1],
                **{"attention_mask": mask, **given, CACHE: out[CACHE]},
                use_cache=True,
            )
            following.append(out.logits[:, -1])
    return prefill, torch.stack(following, dim=1)


# -- the oracle's own check -------------------------------------------------------------------------------------------


def expected_positions(name: str, model: nn.Module, inputs: Inputs) -> Tensor:
    """`dense_generate_positions` written from the definition, 0 on padding."""
    mask = inputs["attention_mask"].bool()
    if "mm_token_type_ids" not in inputs:
        start = 1 if model.config.model_type == "paligemma" else 0
        return (mask.long().cumsum(1) - 1 + start) * mask
    out = torch.zeros(3, *mask.shape, dtype=torch.long)
    grids = {kind: iter(inputs.get(f"{kind}_grid_thw", torch.zeros(0, 3)).tolist()) for kind in ("image", "video")}
    seconds = inputs.get("second_per_grid_ts", torch.ones(1))[0]  # the zoo's videos all run at one pace
    pace = float(seconds) * getattr(model.config.vision_config, "tokens_per_second", 1)
    for row, columns in enumerate(mask):
        types, places, now, here, frames = inputs["mm_token_type_ids"][row, columns].tolist(), [], 0, 0, []
        while here < len(types):
            if types[here] == 0:
                places.append([now] * 3)
                now, here = now + 1, here + 1
                continue
            if types[here] == 1:
                time, high, wide = next(grids["image"])
            elif "qwen3" in name:  # each frame stands for itself
                if not frames:
                    time, high, wide = next(grids["video"])
                    frames = [(1, high, wide)] * time
                time, high, wide = frames.pop()
            else:
                time, high, wide = next(grids["video"])
            step, high, wide = pace if types[here] == 2 else 1, high // 2, wide // 2
            places += [
                [now + int(t * step), now + y, now + x] for t in range(time) for y in range(high) for x in range(wide)
            ]
            here, now = here + time * high * wide, now + max(high, wide)
        out[:, row, columns] = torch.tensor(places).T
    return out


def _worst(*pairs: tuple[Tensor, Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in pairs)


def check(name: str, attn: str = "sdpa", steps: int = 10) -> dict[str, float]:
    """The worst difference of the oracle to the plain model with nothing dropped, by what is compared."""
    import mllm_zoo

    model, worst = (
        mllm_zoo.build(name, attn),
        dict.fromkeys(("prefill", "forward", "bare", "generate", "alone", "short"), 0.0),
    )

    def note(what: str, *pairs: tuple[Tensor, Tensor]) -> None:
        worst[what] = max(worst[what], _worst(*pairs))

    for case in mllm_zoo.CASES[name]:
        inputs = mllm_zoo.inputs(name, case)
        mask, right = inputs["attention_mask"].bool(), case == "ragged_right"
        positions = dense_generate_positions(name, model, inputs)
        assert torch.equal(positions * mask, expected_positions(name, model, inputs)), (name, case)
        said = oracle(name, model, inputs, steps=steps)
        prefill, decode = forward_logits(model, inputs, said.tokens, positions)
        note("prefill", *((prefill[row, mask[row]], said.prefill[row]) for row in range(len(mask))))
        # Padding on the right stays in the plain model's sliding windows; alone, a row has none.
        if not (right and name == "gemma3_sliding"):
            note("forward", (decode, said.decode))
        if mask.all():
            if hasattr(model.model, "rope_deltas"):
                model.model.rope_deltas = None  # a prompt without images goes on with those of the call before
            prefill, decode = forward_logits(model, inputs, said.tokens)
            said_bare = oracle(name, model, inputs, steps=steps, forced=said.tokens, onward="max")
            note("bare", *((prefill[row, mask[row]], said.prefill[row]) for row in range(len(mask))))
            note("bare", (decode, said_bare.decode))
        if not right:
            logits = generate_logits(model, inputs, said.tokens)
            note("generate", (logits[:, 1:], said.decode), (logits[:, 0], torch.stack([p[-1] for p in said.prefill])))
        for row in range(len(mask) if len(mask) > 1 else 0):
            single = mllm_zoo.alone(name, case, row)
            logits = generate_logits(model, single, said.tokens[row : row + 1])
            note("alone", (logits[:, 1:], said.decode[row : row + 1]), (logits[0, 0], said.prefill[row][-1]))
        if len(mask) == 1 and case != "text":
            note("short", _short(name, model, inputs, steps))
    return worst


def _short(name: str, model: nn.Module, inputs: Inputs, steps: int) -> tuple[Tensor, Tensor]:
    """A reduced prompt without the oracle's masks and cache: the plain model's own `generate`, at given positions.

    Not every family's `generate` takes embeddings, so they are put in where the first call enters the decoder.
    """
    dense = capture(model, inputs)
    keep = torch.rand(dense.visual.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    kept = keep | ~dense.visual
    said = oracle(name, model, inputs, kept, steps=steps)
    assert len(said.prefill[0]) == int(kept.sum())
    columns = kept[0]
    short = {key: inputs[key][:, columns] for key in ("input_ids", "attention_mask")}
    short["position_ids"] = dense.positions[..., columns]
    if "token_type_ids" in inputs:
        short["token_type_ids"] = inputs["token_type_ids"][:, columns]
    if short["position_ids"].ndim == 3:
        short["position_ids"] = torch.cat([torch.arange(int(kept.sum())).expand(1, 1, -1), short["position_ids"]])
    if name == "paligemma":  # which adds its 1 itself
        short["position_ids"] = short["position_ids"] - 1

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs["inputs_embeds"].shape[1] > 1:
            kwargs["inputs_embeds"] = dense.embeds[:, columns]
            if dense.deepstack:
                kwargs["visual_pos_masks"] = dense.visual[:, columns]
                kwargs["deepstack_visual_embeds"] = [plane[kept & dense.visual] for plane in dense.deepstack]
        return args, kwargs

    hook = text_model(model).register_forward_pre_hook(add, with_kwargs=True)
    try:
        with _undisturbed(model):
            logits = generate_logits(model, short, said.tokens)
    finally:
        hook.remove()
    return logits[0], torch.cat([said.prefill[0][-1:], said.decode[0]])


if __name__ == "__main__":
    import mllm_zoo
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, largest difference of the logits")
    for family in mllm_zoo.FAMILIES:
        for kind in ("sdpa", "eager"):
            found = check(family, kind)
            print(f"{family:16} {kind:6}", *(f"{what} {value:.1e}" for what, value in found.items()))
