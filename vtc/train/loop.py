"""A training run, which can be stopped and resumed."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from vtc.adapters.multimodal.find import MultimodalSite
from vtc.adapters.multimodal.find import find as find_llms
from vtc.adapters.patch import Patch
from vtc.errors import InputError, OptionError, UnsupportedModelError
from vtc.scores.scorer import Scorer
from vtc.train.selection import SELECTIONS, Selection, selecting

_FORMAT = "vtc-selector-training-1"


def train_scorer(
    model: nn.Module,
    batches: Iterable[dict[str, Any]] | Dataset[dict[str, Any]],
    *,
    keep: float = 0.2,
    hidden: int | None = None,
    steps: int = 1000,
    lr: float = 1e-4,
    warmup: float = 0.03,
    anneal: float = 0.5,
    accumulate: int = 1,
    selection: str = "soft",
    fill: str = "mean",
    seed: int = 0,
    scorer: Scorer | None = None,
    checkpoint: str | Path | None = None,
    save_every: int = 100,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> Scorer:
    """Train a scorer. After `vtc.scores.save_scorer(scorer, path)`, use it in
    `vtc.compress(model, "idpruner", scorer=path)`.

    The model runs in its current mode (in train mode gradient checkpointing and dropout are active), without a cache;
    its tower runs without gradients. Afterwards the model is as it was, also after an exception.

    Args:
        model: a multimodal LLM that `vtc.explain` knows, not compressed.
        batches: the keyword arguments of `model(...)` with `labels`, one dictionary per forward, all with images. A
            list or a data set is read by index, repeatedly; anything else is iterated, repeatedly if possible.
        keep: the fraction of every image's (crop's, frame's) tokens to train for.
        hidden: width of the two maps; None = half the decoder's width.
        steps, lr: of AdamW without weight decay, gradients clipped at 1; the learning rate falls to 0 along a cosine.
        warmup, anneal: shares of the steps over which the learning rate rises, and over which the budget falls from all
            tokens to `keep`.
        accumulate: batches per step.
        selection: "soft" weights the tokens by DiffTopK of the scores; every token keeps its place. "hard" hides the
            tokens that would be removed, as compressing does, and takes as a token's gradient how the loss would change
            if it were seen a little more (straight-through); it needs sdpa or eager attention.
        fill: of "soft": a token x of weight w becomes `w x + (1 - w) f`, with f the mean token of its image ("mean"),
            or 0 as in VisionSelector ("zero"). A decoder normalises its inputs, so a token that is only scaled down
            keeps all its information; a token that is moved towards the mean loses it.
        seed: seed of the initial weights. The same seed, batches and machine give the same scorer.
        scorer: weights to start from instead; they are copied.
        checkpoint: a safetensors file, written every `save_every` steps and at the end, with the optimizer's state. If
            it exists, training continues from it as if it had not been interrupted.
        progress: show a bar on terminals. on_step: called with the number of finished steps and the last loss.

    Raises:
        OptionError: an option out of range, or a checkpoint of another run.
        UnsupportedModelError: no adapter for the model, or it is compressed.
        InputError: a batch without images or labels, too few batches, a loss that is not finite.
    """
    counts = {"steps": steps, "accumulate": accumulate, "save_every": save_every}
    for name, number in (counts if hidden is None else counts | {"hidden": hidden}).items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise OptionError(f"{name}={number!r}: it takes a whole number of at least 1")
    for name, share in {"keep": keep, "warmup": warmup, "anneal": anneal}.items():
        if isinstance(share, bool) or not 0 <= share <= 1 or (share == 0 and name == "keep"):
            raise OptionError(f"{name}={share!r}: it takes a fraction, at most 1")
    if not 0 < lr < math.inf:
        raise OptionError(f"lr={lr!r}: it takes a number above 0")
    if fill not in ("mean", "zero"):
        raise OptionError(f'fill={fill!r}: it takes "mean" or "zero"')
    if selection not in SELECTIONS:
        raise OptionError(f"selection={selection!r}: it takes one of {', '.join(SELECTIONS)}")
    site = _site(model)
    scorer = _start(model, site, hidden, seed, scorer)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=lr, weight_decay=0.0)
    run: dict[str, Any] = {"keep": keep, "steps": steps, "lr": lr, "warmup": warmup, "anneal": anneal, "seed": seed}
    run |= {"accumulate": accumulate, "selection": selection, "fill": fill}
    run |= {"width": scorer.width, "hidden": scorer.hidden}
    done = 0 if checkpoint is None else _resume(Path(checkpoint), run, scorer, optimizer)
    given, bar = _stream(batches, done * accumulate), _bar(steps, done, progress)
    chosen = Selection(site, scorer, selection, fill)
    with selecting(model, chosen), bar, torch.enable_grad():
        for step in range(done, steps):
            chosen.keep = 1 + (keep - 1) * (min(1.0, step / (anneal * steps)) if anneal else 1.0)
            optimizer.param_groups[0]["lr"] = lr * _rate(step, steps, warmup * steps)
            total = 0.0
            for _ in range(accumulate):
                loss = chosen.loss(model, next(given)) / accumulate
                loss.backward()
                total += float(loss.detach())
            slope = float(nn.utils.clip_grad_norm_(scorer.parameters(), 1.0))
            if not math.isfinite(total) or not math.isfinite(slope):
                raise InputError(
                    f"step {step + 1}: the loss is {total:g} and its gradient {slope:g}: look at that batch, take a "
                    "lower lr=, or load the model in bfloat16 or float32 if it is in float16"
                )
            optimizer.step()
            optimizer.zero_grad()
            if checkpoint is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                _save(Path(checkpoint), run, step + 1, scorer, optimizer)
            bar.set_postfix(loss=f"{total:.4f}", budget=f"{chosen.keep:.2f}", refresh=False)
            bar.update()
            if on_step is not None:
                on_step(step + 1, total)
    return scorer.requires_grad_(False).eval()


# -- a run ----------------------------------------------------------------------------------------------------------


def _site(model: nn.Module) -> MultimodalSite:
    found = list(find_llms(model))
    if len(found) != 1 or not isinstance(found[0], MultimodalSite):
        reason = "; ".join(getattr(item, "reason", item.path) for item in found) or "no multimodal LLM that vtc knows"
        raise UnsupportedModelError(f"{type(model).__name__}: a scorer cannot be trained for it ({reason})")
    if any(isinstance(x, Patch) for x in found[0].inner.__dict__.values()):
        raise UnsupportedModelError("the model is compressed: call vtc.remove(model), then train its scorer")
    return found[0]


def _start(model: Any, site: MultimodalSite, hidden: int | None, seed: int, given: Scorer | None) -> Scorer:
    width = site.inner.config.get_text_config().hidden_size
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if given is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = Scorer(width, width // 2 if hidden is None else hidden, name)
    elif given.width != width or hidden not in (None, given.hidden):
        want = f"{width} wide, hidden {given.hidden if hidden is None else hidden}"
        raise OptionError(f"scorer= is {given.width} wide, hidden {given.hidden}; this run wants {want}")
    else:
        made = copy.deepcopy(given).requires_grad_(True)
    place = site.inner.get_input_embeddings().weight.device
    return made if place.type == "meta" else made.to(place)  # meta: offloaded


def _rate(step: int, steps: int, rise: float) -> float:
    return (step + 1) / (rise + 1) if step < rise else (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def _stream(batches: Any, skip: int) -> Iterator[Any]:
    """The batches from number `skip` on, over and over."""
    if isinstance(batches, (str, dict)) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise OptionError(f"batches is a {type(batches).__name__}: it takes a list of dictionaries, or the like")
    count, more = skip, True
    if hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
        while len(batches):
            yield batches[count % len(batches)]
            count += 1
        more = False
    while more:
        more = False
        for batch in batches:
            more, skip = True, skip - 1
            if skip < 0:
                yield batch
    raise InputError("the batches came to an end before the steps: give a list, a data set or a DataLoader")


def _save(path: Path, run: dict[str, Any], step: int, scorer: Scorer, optimizer: torch.optim.Optimizer) -> None:
    """Save weights and the optimizer's state in one file, which replaces the old one atomically."""
    from safetensors.torch import save_file

    tensors = {name: p.detach() for name, p in scorer.named_parameters()}
    for name, p in scorer.named_parameters():
        tensors |= {f"{name}:{key}": x for key, x in optimizer.state[p].items()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, str(part), {"format": _FORMAT, "step": str(step), "run": json.dumps(run)})
    os.replace(part, path)


def _resume(path: Path, run: dict[str, Any], scorer: Scorer, optimizer: torch.optim.Optimizer) -> int:
    """Restore weights and state, and return the number of finished steps; 0 if there is no file."""
    from safetensors import SafetensorError, safe_open

    if not path.absolute().parent.is_dir():
        raise OptionError(f"{path}: there is no such folder to write the checkpoint to")
    if not path.exists():
        return 0
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise OptionError(f"{path} is no safetensors file ({error}): delete it, or name another") from None
    if metadata.get("format") != _FORMAT:
        raise OptionError(f"{path} is no checkpoint of a training; weights to start from are given as selector=")
    before = json.loads(metadata["run"])
    if other := [f"{name}={before.get(name)!r}" for name in run if before.get(name) != run[name]]:
        raise OptionError(f"{path} is of a run with {', '.join(other)}: give the same again, or delete it")
    with torch.no_grad():
        for name, p in scorer.named_parameters():
            p.copy_(tensors[name])
            state = {key.partition(":")[2]: x for key, x in tensors.items() if key.startswith(f"{name}:")}
            optimizer.state[p] = {key: x if key == "step" else x.to(p.device) for key, x in state.items()}
    return int(metadata["step"])


def _bar(total: int, done: int, shown: bool) -> Any:
    from tqdm import tqdm  # installed with transformers

    return tqdm(total=total, initial=done, desc="training", unit="step", disable=None if shown else True)
