"""Train IDPruner's scorer of visual tokens, VisionSelector's two linear maps, for a multimodal LLM that stays as it is.

Its image tokens are weighed by what DiffTopK makes of the scores, under a budget that shrinks from all of them to
`keep`; the loss of the answers goes back into the scorer alone.

    python -m vtc.train --model FOLDER --data data.jsonl --out selector.safetensors --keep 0.2 --steps 1000

Every line of the data is {"image": "a.jpg" or ["a.jpg", "b.jpg"], "prompt": "...", "answer": "..."}.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vtc.adapters import multimodal
from vtc.adapters.multimodal import Gate
from vtc.adapters.multimodal.family import Kind
from vtc.adapters.multimodal.standins import StandIn
from vtc.errors import InputError, OptionError, UnsupportedModelError, VTCError
from vtc.methods.base import Method
from vtc.scores.selector import Selector, diff_top_k, save_selector

_FORMAT = "vtc-selector-training-1"


def train_selector(
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
    fill: str = "mean",
    seed: int = 0,
    selector: Selector | None = None,
    checkpoint: str | Path | None = None,
    save_every: int = 100,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> Selector:
    """A scorer for `vtc.compress(model, "idpruner", scorer=path)`, once `vtc.scores.save_selector` has written it.

    The model runs in the mode it is in (in train mode gradient checkpointing works, and dropout too), without a cache;
    its tower runs without gradients. Afterwards it is as it was, also after an exception.

    Args:
        model: a multimodal LLM that `vtc.explain` knows, not compressed.
        batches: the keyword arguments of `model(...)` with `labels`, one dictionary per forward, all with images. A
            list or a data set is read by index, over and over; anything else is iterated, again if it can be.
        keep: the fraction of every image's (crop's, frame's) tokens to train for.
        hidden: width of the two maps; None = half the decoder's width.
        steps, lr: of AdamW without weight decay, gradients clipped at 1; the rate falls to 0 along a cosine.
        warmup, anneal: shares of the steps over which the rate rises, and the budget falls from all tokens to `keep`.
        accumulate: batches per step.
        fill: a token x of weight w becomes `w x + (1 - w) f`, with f the mean token of its image ("mean"), or 0 as in
            VisionSelector ("zero"). A decoder normalises what it takes in, so that a token which is only made smaller
            still says all that it has to say; one that is made like all others does not.
        seed: of the first weights. The same seed, batches and machine give the same scorer.
        selector: weights to start from instead; they are copied.
        checkpoint: a safetensors file, written every `save_every` steps and at the end, with the optimizer's state. If
            it is there, training goes on from it as if there had been no break.
        progress: a bar, on terminals. on_step: called with the number of steps done and the last one's loss.

    Raises:
        OptionError: an option out of range, or a checkpoint of another run.
        UnsupportedModelError: no adapter for the model, or it is compressed.
        InputError: a batch without images or labels, too few batches, a loss that is no number.
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
    gate = _gate(model)
    selector = _start(model, gate, hidden, seed, selector)
    optimizer = torch.optim.AdamW(selector.parameters(), lr=lr, weight_decay=0.0)
    run: dict[str, Any] = {"keep": keep, "steps": steps, "lr": lr, "warmup": warmup, "anneal": anneal, "seed": seed}
    run |= {"accumulate": accumulate, "fill": fill, "width": selector.width, "hidden": selector.hidden}
    done = 0 if checkpoint is None else _resume(Path(checkpoint), run, selector, optimizer)
    given, bar = _stream(batches, done * accumulate), _bar(steps, done, progress)
    with _softly(model, _Soft(gate, selector, fill)) as soft, bar, torch.enable_grad():
        for step in range(done, steps):
            soft.keep = 1 + (keep - 1) * (min(1.0, step / (anneal * steps)) if anneal else 1.0)
            optimizer.param_groups[0]["lr"] = lr * _rate(step, steps, warmup * steps)
            total = 0.0
            for _ in range(accumulate):
                loss = soft.loss(model, next(given)) / accumulate
                loss.backward()
                total += float(loss.detach())
            slope = float(nn.utils.clip_grad_norm_(selector.parameters(), 1.0))
            if not math.isfinite(total) or not math.isfinite(slope):
                raise InputError(
                    f"step {step + 1}: the loss is {total:g} and its gradient {slope:g}: look at that batch, take a "
                    "lower lr=, or load the model in bfloat16 or float32 if it is in float16"
                )
            optimizer.step()
            optimizer.zero_grad()
            if checkpoint is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                _save(Path(checkpoint), run, step + 1, selector, optimizer)
            bar.set_postfix(loss=f"{total:.4f}", budget=f"{soft.keep:.2f}", refresh=False)
            bar.update()
            if on_step is not None:
                on_step(step + 1, total)
    return selector.requires_grad_(False).eval()


# -- the soft budget ------------------------------------------------------------------------------------------------


class _Soft:
    """Weighs the image tokens of the model that a scorer is trained for."""

    keep = 1.0
    busy = False  # one encoder may call the other
    seen = False  # there were image tokens in this call

    def __init__(self, gate: Gate, selector: Selector, fill: str) -> None:
        self.gate, self.selector, self.fill = gate, selector, fill

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if not hasattr(batch, "items"):
            raise InputError(f"a batch is a {type(batch).__name__}: it takes the keyword arguments of model(...)")
        self.seen = False
        place = self.selector.query.weight.device
        ready = {name: x.to(place) if isinstance(x, Tensor) else x for name, x in batch.items()}
        loss = model(**{"use_cache": False} | ready).loss
        if loss is None or not self.seen:
            missing = "labels" if loss is None else "images"
            raise InputError(f"a batch has no {missing}; it holds {', '.join(batch)}")
        return loss

    def encode(self, encode: _Encode, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.busy:
            return encode.original(*args, **kwargs)
        self.busy = True
        try:
            with torch.no_grad():
                output = encode.original(*args, **kwargs)
        finally:
            self.busy = False
        self.seen = True
        call = {**dict(zip(encode.names, args, strict=False)), **kwargs}
        call[encode.kind.pixels] = call[encode.names[0]]
        lengths = [x.numel() // x.shape[-1] for x in output.pooler_output]
        units = self.gate.family.layout(self.gate.inner, encode.kind, lengths, call).units
        index = nn.utils.rnn.pad_sequence([unit.rows for unit in units], True, -1)
        index = index.to(output.pooler_output[0].device)
        mask, at = index >= 0, index.clamp(min=0)
        soft = diff_top_k(self.selector.score(_rows(output.pooler_output)[at], mask), self.keep, mask)[..., None]

        def weigh(x: Any) -> Any:
            """Features as a model hands them out, one tensor or one per item. What is in no unit (newlines) stays."""
            rows = _rows(x)
            token = rows[at].float().masked_fill(~mask[..., None], 0)
            new = soft * token
            if self.fill == "mean":
                new = new + (1 - soft) * token.sum(1, keepdim=True) / mask.sum(1).view(-1, 1, 1)
            rows = rows.index_copy(0, index[mask], new[mask].to(rows))
            return rows.view(x.shape) if isinstance(x, Tensor) else rows.split([part.shape[:-1].numel() for part in x])

        output.pooler_output = weigh(output.pooler_output)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [weigh(plane) for plane in output.deepstack_features]
        return output


class _Encode(StandIn):
    """For `get_image_features` and `get_video_features`."""

    def __init__(self, soft: _Soft, kind: Kind) -> None:
        super().__init__(soft.gate.inner, kind.encode)
        self.soft, self.kind, self.names = soft, kind, list(self.__signature__.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.soft.encode(self, args, kwargs)


def _rows(x: Any) -> Tensor:
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in x])


@contextmanager
def _softly(model: nn.Module, soft: _Soft) -> Iterator[_Soft]:
    """The model frozen and its encoders replaced, for a while."""
    inner = soft.gate.inner
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = {k: v for k, v in inner.__dict__.items() if k == "rope_deltas"}  # Qwen models remember the last prompt's
    patches = [_Encode(soft, kind) for kind in soft.gate.family.kinds]
    try:
        for p in trained:
            p.requires_grad_(False)
        for patch in patches:
            patch.install()
        yield soft
    finally:
        for patch in patches:
            patch.remove()
        for p in trained:
            p.requires_grad_(True)
        inner.__dict__.update(kept)


# -- a run ----------------------------------------------------------------------------------------------------------


def _gate(model: nn.Module) -> Gate:
    found = list(multimodal.find(model))
    if len(found) != 1 or not isinstance(found[0], Gate):
        reason = "; ".join(getattr(item, "reason", item.path) for item in found) or "no multimodal LLM that vtc knows"
        raise UnsupportedModelError(f"{type(model).__name__}: a scorer cannot be trained for it ({reason})")
    if any(isinstance(x, StandIn) for x in found[0].inner.__dict__.values()):
        raise UnsupportedModelError("the model is compressed: call vtc.remove(model), then train its scorer")
    return found[0]


def _start(model: Any, gate: Gate, hidden: int | None, seed: int, given: Selector | None) -> Selector:
    width = gate.inner.config.get_text_config().hidden_size
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if given is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = Selector(width, width // 2 if hidden is None else hidden, name)
    elif given.width != width or hidden not in (None, given.hidden):
        want = f"{width} wide, hidden {given.hidden if hidden is None else hidden}"
        raise OptionError(f"selector= is {given.width} wide, hidden {given.hidden}; this run wants {want}")
    else:
        made = copy.deepcopy(given).requires_grad_(True)
    place = gate.inner.get_input_embeddings().weight.device
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


def _save(path: Path, run: dict[str, Any], step: int, selector: Selector, optimizer: torch.optim.Optimizer) -> None:
    """Weights and the optimizer's state, in one file that takes the old one's place at once."""
    from safetensors.torch import save_file

    tensors = {name: p.detach() for name, p in selector.named_parameters()}
    for name, p in selector.named_parameters():
        tensors |= {f"{name}:{key}": x for key, x in optimizer.state[p].items()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, str(part), {"format": _FORMAT, "step": str(step), "run": json.dumps(run)})
    os.replace(part, path)


def _resume(path: Path, run: dict[str, Any], selector: Selector, optimizer: torch.optim.Optimizer) -> int:
    """How many steps are done, with weights and state as they were then. No file: none."""
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
        for name, p in selector.named_parameters():
            p.copy_(tensors[name])
            state = {key.partition(":")[2]: x for key, x in tensors.items() if key.startswith(f"{name}:")}
            optimizer.state[p] = {key: x if key == "step" else x.to(p.device) for key, x in state.items()}
    return int(metadata["step"])


def _bar(total: int, done: int, shown: bool) -> Any:
    from tqdm import tqdm  # comes with transformers

    return tqdm(total=total, initial=done, desc="training", unit="step", disable=None if shown else True)


# -- the command ----------------------------------------------------------------------------------------------------


class _Examples(Dataset[dict[str, Any]]):
    """The lines of a data file as batches of one, in an order drawn from the seed."""

    processor: Any = None
    dtype: torch.dtype | None = None  # of the pixels
    suffix = 0  # token type of the answer

    def __init__(self, path: Path, seed: int) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise OptionError(f"{path} is no text file in UTF-8") from None
        self.rows = [_example(path, f"{path}:{i + 1}", line) for i, line in enumerate(lines) if line.strip()]
        if not self.rows:
            raise OptionError(f"{path} is empty: it takes a line for every example")
        random.Random(seed).shuffle(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from vtc.chat import question
        from vtc.images import load_image

        paths, prompt, answer = self.rows[index]
        found: dict[str, Any] = dict(question(self.processor, [load_image(path) for path in paths], prompt))
        asked = found["input_ids"]
        text = _closed(self.processor, len(paths), prompt, answer)
        ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        behind = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        behind["token_type_ids"] = torch.full_like(ids, self.suffix)
        for name, x in found.items():
            if isinstance(x, Tensor) and x.shape == asked.shape:
                found[name] = torch.cat([x, behind.get(name, torch.zeros_like(ids)).to(x.dtype)], dim=1)
            elif name.startswith("pixel_values"):
                found[name] = x.to(self.dtype)
        return found | {"labels": torch.cat([torch.full_like(asked, -100), ids], dim=1)}


def open_examples(
    name: str, data: Path, method: Method, seed: int = 0, **more: Any
) -> tuple[Any, Dataset[dict[str, Any]]]:
    """A model that `method` can compress, and the lines of a data file as its keyword arguments with labels.

    Args:
        name: a folder, or an id on the Hub. data: see the top of this file. more: of `vtc.chat.load`.
    """
    from vtc.chat import load

    found = _Examples(data, seed)
    found.processor, make = load(name, method, **more)
    model = make()
    found.dtype = model.dtype
    found.suffix = int(model.config.model_type.startswith("paligemma"))
    return model, found


def _example(path: Path, where: str, line: str) -> tuple[list[Path], str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise OptionError(f"{where}: no JSON ({error})") from None
    row = row if isinstance(row, dict) else {}
    images = [row["image"]] if isinstance(row.get("image"), str) else row.get("image")
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise OptionError(f'{where}: "image" takes the path of a picture, or a list of them')
    for name in ("prompt", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise OptionError(f'{where}: "{name}" takes a text')
    paths = [path.parent / image for image in images]
    for image in paths:
        if not image.is_file():
            raise OptionError(f"{where}: {image}: no such file; paths are relative to the data file's folder")
    return paths, row["prompt"], row["answer"]


def _closed(processor: Any, images: int, prompt: str, answer: str) -> str:
    """The answer with what the chat template puts behind it, else with the end of the sequence."""
    end = str(processor.tokenizer.eos_token or "")
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
        turn = {"role": "user", "content": content}
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        asked = processor.apply_chat_template([turn], add_generation_prompt=True)
        whole = processor.apply_chat_template([turn, reply])
        said = whole.removeprefix(asked)
        if said != whole and said.strip().startswith(answer.strip()):
            return said if said.strip() != answer.strip() else said.rstrip() + end
    return answer + end


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m vtc.train`. Returns the exit code: 2 = bad input."""
    from vtc.arguments import _Parser, count, fail, fraction

    parser = _Parser(prog="python -m vtc.train", description="Train IDPruner's scorer for a multimodal LLM.")
    add = parser.add_argument
    lines = '{"image": path or paths, "prompt": text, "answer": text}'
    add("--model", required=True, metavar="PATH_OR_ID", help="a multimodal LLM: a folder, or an id on the Hub")
    add("--data", required=True, type=Path, metavar="JSONL", help=f"lines of {lines}; paths as seen from its folder")
    add("--out", required=True, type=Path, metavar="SAFETENSORS", help="where the scorer goes")
    add("--keep", type=fraction, default=0.2, metavar="Q", help="fraction of the tokens to train for (default: 0.2)")
    add("--steps", type=count, default=1000, metavar="N", help="default: 1000")
    add("--accumulate", type=count, default=8, metavar="N", help="examples per step (default: 8)")
    add("--lr", type=float, default=1e-4, metavar="RATE", help="default: 1e-4")
    add("--hidden", type=count, metavar="N", help="width of the scorer's maps (default: half the decoder's)")
    add("--seed", type=int, default=0, metavar="N", help="of the first weights and the order of the data")
    add("--checkpoint", type=Path, metavar="SAFETENSORS", help="saved now and then; training goes on from it")
    add("--save-every", type=count, default=100, metavar="N", help="steps between checkpoints (default: 100)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: as the weights were saved")
    add("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, ...")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    try:
        return _command(parser.parse_args(argv))
    except SystemExit as end:  # --help, and arguments that make no sense
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except (VTCError, ImportError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return 2


def _command(args: argparse.Namespace) -> int:
    from vtc.methods import IDPruner

    for path in (args.out, args.checkpoint):
        if path is not None and not path.absolute().parent.is_dir():
            raise OptionError(f"{path.parent}: no such folder to write {path.name} to")
    more = {name: getattr(args, name) for name in ("dtype", "device", "trust_remote_code")}
    model, data = open_examples(args.model, args.data, IDPruner(keep=args.keep, importance="norm"), args.seed, **more)
    losses = list[float]()
    options = ("keep", "steps", "accumulate", "lr", "hidden", "seed", "checkpoint", "save_every")
    given = {name: getattr(args, name) for name in options}
    save_selector(train_selector(model, data, on_step=lambda _, loss: losses.append(loss), **given), args.out)
    part = max(1, len(losses) // 10)
    trend = f"loss {sum(losses[:part]) / part:.4f} -> {sum(losses[-part:]) / part:.4f}, " if losses else ""
    sys.stdout.write(f"{len(losses)} step{'s' * (len(losses) != 1)}, {trend}written to {args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
