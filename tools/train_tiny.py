"""Train the two small multimodal LLMs of `vtc.checkpoints` on `vtc.eval.scenes`, from nothing; the LLaVA's tower is the
real DINOv2-S and stays as it is.

    python tools/train_tiny.py qwen --out out/tiny_qwen            # goes on with what it finds there
    python tools/train_tiny.py llava --out out/tiny_llava
    torchrun --nproc-per-node 2 tools/train_tiny.py qwen --out out/tiny_qwen         # on two cores
    python tools/train_tiny.py qwen --out out/tiny_qwen --device cuda --workers 14   # in minutes

A sequence holds a picture, several, or a clip, of any size, and several questions, each of which sees the pictures and
itself alone: a mask, and positions that go on behind the pictures for each of them. Two more losses, without which
nothing is learned for hours: the image tokens are asked what they show, the Qwen's tower alone and on crowded scenes at
first; a question is to be answered as soon as it has named its thing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from tiny_data import Batch, Pictures, tokens
from tiny_learner import MODELS, Learner
from tiny_models import seal
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vtc.eval import scenes
from vtc.eval.asking import View

CELLS = {
    name: replace(view, level=scenes.FULL)
    for name, view in {
        "192": View(((192, 192),)),
        "256": View(),
        "320": View(((320, 320),)),
        "448": View(((448, 448),)),
        "448x224": View(((448, 224),)),
        "padded": View(((288, 192),), canvas=(320, 320)),
        "two": View(((256, 256), (192, 256))),
        "three": View(((192, 192), (256, 192), (192, 192))),
        "clip8": View(frames=8),
        "clip4": View(((192, 128),), frames=4),
    }.items()
}


def check(learner: Learner, count: int, cells: dict[str, View] | None = None) -> dict[str, dict[str, float]]:
    """Accuracy on the validation split, by cell and kind; an answer is right if all its words are, each after the right
    ones before it."""
    right: dict[str, dict[str, list[bool]]] = {}
    pictures = Pictures(learner.name, learner.processor)
    learner.eval()
    with torch.no_grad():  # what the learner keeps of a prompt is trained with later
        for name, chosen in (cells or CELLS).items():
            if chosen.frames > 1 and learner.name == "llava":
                continue  # it sees no clips
            rows = max(2, min(count, 8192 // tokens(chosen)))
            for at in range(0, count, rows):
                values, _, text, prompt = pictures.of(chosen, "validation", range(at, at + rows), 12)
                values, text = values.to(learner.device), text.to(learner.device)
                logits, target = learner.answers(learner.see(learner.features(values), prompt), text, prompt)
                row = torch.arange(len(text.kinds), device=learner.device)[:, None]
                owner = (row * 100 + text.block)[text.target >= 0]
                for number in owner.unique().tolist():
                    words = owner == number
                    kind = text.kinds[number // 100][number % 100 - 1]
                    hit = bool((logits[words].argmax(-1) == target[words]).all())
                    for key in (kind, "all"):
                        right.setdefault(name, {}).setdefault(key, []).append(hit)
                        right.setdefault("all", {}).setdefault(key, []).append(hit)
    learner.train()
    order = (*scenes.EVERY, "all")
    return {cell: {k: round(float(np.mean(of[k])), 3) for k in order if k in of} for cell, of in right.items()}


# -- what a run leaves ----------------------------------------------------------------------------------------------


def optimizers(learner: Learner, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings, vectors, and what is trained only to be asked."""
    trained = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
    first = [n for n, p in trained if p.ndim == 2 and "embed" not in n and "halves" not in n]
    muon = torch.optim.Muon(
        [p for n, p in trained if n in first], rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    rest = [p for n, p in trained if n not in first]
    return [muon, torch.optim.AdamW(rest, rate, (0.9, 0.98), weight_decay=0.05)]


def save(
    folder: Path, learner: Learner, optimizers: list[torch.optim.Optimizer], run: dict[str, Any], done: int
) -> None:
    """All that is needed to go on, in one file without pickle."""
    from safetensors.torch import save_file

    names = {p: n for n, p in learner.named_parameters() if p.requires_grad}
    state = {f"weight/{n}": p for p, n in names.items()} | {"mean": learner.mean, "spread": learner.spread}
    for optimizer in optimizers:
        for p, entry in optimizer.state.items():  # none yet of what has not learned
            state |= {f"{key}/{names[p]}": value for key, value in entry.items()}
    partial = folder / "state.partial"
    save_file(
        {k: v.detach().contiguous() for k, v in state.items()}, partial, {"run": json.dumps(run), "done": str(done)}
    )
    os.replace(partial, folder / "state.safetensors")


def resume(path: Path, learner: Learner, optimizers: list[torch.optim.Optimizer], run: dict[str, Any]) -> int:
    """How many batches were done. Another run's state is refused; of one without optimizers' state these start anew."""
    from safetensors import safe_open

    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        about = file.metadata()
        if json.loads(about["run"]) != run:
            raise SystemExit(f"{path} is of another run: {about['run']}, not {json.dumps(run)}; choose another --out")
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    names = {p: n for n, p in learner.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p, name in names.items():
            p.copy_(state[f"weight/{name}"])
    learner.mean, learner.spread = (state[name].float().to(learner.device) for name in ("mean", "spread"))
    for optimizer, keys in zip(optimizers, (("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq")), strict=True):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if f"{keys[0]}/{names[p]}" in state:
                entry = {key: state[f"{key}/{names[p]}"] for key in keys}
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in entry.items()}
    return int(about["done"])


def pack(state: Path, target: Path) -> None:
    """A state's weights alone, in bfloat16: small enough for the repository, and `resume` takes them."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(state, "pt") as file:
        names = [key for key in file.keys() if key.startswith("weight/") or key in ("mean", "spread")]  # noqa: SIM118
        save_file({name: file.get_tensor(name).bfloat16() for name in names}, target, file.metadata())


def export(folder: Path, learner: Learner) -> None:
    """The model and its processor as Transformers reads them, in bfloat16, without DINOv2."""
    from safetensors.torch import save_file

    learner.cpu().fold()
    model, processor = MODELS[learner.name]()  # whose layers are Transformers' own
    processor.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]  # what vLLM goes by
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    state = {k: v.bfloat16().contiguous() for k, v in learner.model.state_dict().items() if "vision_tower" not in k}
    state.pop("lm_head.weight")  # the embedding's
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    seal(folder)


# -- the run --------------------------------------------------------------------------------------------------------


def step(
    learner: Learner, optimizers: list[torch.optim.Optimizer], batch: Batch, rate: float, alone: bool
) -> list[float]:
    """Learn from a batch, of the tower alone or of everything: the loss, and the share of tokens that say the right
    thing, colour, and numerals."""
    values, shown, text, prompt = batch
    values, shown, text = (x.to(learner.device) for x in (values, shown, text))
    seen = learner.see(learner.features(values), prompt)
    loss, right = learner.shown(seen, shown)
    if not alone:
        loss = 0.2 * loss + learner.loss(seen, text, prompt)
    loss.backward()
    average(learner)
    nn.utils.clip_grad_norm_([p for p in learner.parameters() if p.requires_grad], 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item(), *right]


def average(learner: Learner) -> None:
    """The mean of the gradients over all processes, each of which has seen its rows of the batch."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if world == 1:
        return
    every = [p for p in learner.parameters() if p.requires_grad]
    asked = torch.tensor([p.grad is not None for p in every]).float()
    distributed.all_reduce(asked)  # what one process has not asked, another may have
    own = [p for p, n in zip(every, asked.tolist(), strict=True) if n]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own])
    distributed.all_reduce(flat)
    for p, grad in zip(own, flat.div_(world).split([p.numel() for p in own]), strict=True):
        p.grad = grad.view_as(p)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("model", choices=tuple(MODELS))
    parse.add_argument("--out", type=Path, required=True, help="folder; a run that stopped there goes on")
    parse.add_argument("--from", dest="start", type=Path, help="a state to start from where there is none in --out")
    parse.add_argument("--batches", type=int, default=9_500, help="how many to learn from, in all: 4,096 tokens each")
    parse.add_argument("--see", type=int, default=1_100, help="qwen: batches from which only the tower learns")
    parse.add_argument("--young", type=int, default=1_200, help="batches after these with smaller pictures")
    parse.add_argument("--padded", type=int, default=1_500, help="the last batches, with more that is padded")
    parse.add_argument("--fall", type=float, default=0.25, help="share of the batches, the last, with a falling rate")
    parse.add_argument("--rate", type=float, default=2e-3)
    parse.add_argument("--every", type=int, default=50, help="batches between two states")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--threads", type=int, default=1, help="of torch")
    parse.add_argument("--workers", type=int, default=1, help="processes that draw")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--pack", type=Path, metavar="FILE", help="only write the weights of the state in --out there")
    args = parse.parse_args()
    if args.pack:
        pack(args.out / "state.safetensors", args.pack)
        return
    lead, part = True, (0, 1)
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
        part = distributed.get_rank(), distributed.get_world_size()
        lead = part[0] == 0
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    learner = Learner(args.model, torch.bfloat16).to(args.device).train()
    run = {k: v for k, v in vars(args).items() if k in ("model", "seed")}
    both = optimizers(learner, args.rate)
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / "state.safetensors"
    done = resume(state if state.exists() or not args.start else args.start, learner, both, run)
    alone = args.see if args.model == "qwen" else 0
    ages = alone, alone + args.young, args.batches - args.padded
    pictures = Pictures(args.model, learner.processor, done, args.batches, ages, part)
    if args.model == "llava" and not done:
        learner.centre(learner.features(pictures.of(View(), "train", range(64), 1)[0].to(args.device)))
    data = DataLoader(pictures, batch_size=None, num_workers=args.workers, prefetch_factor=3)
    bar = tqdm(total=args.batches, initial=done, unit="batch", mininterval=20, disable=not lead)
    before, began, lines = done, time.time(), []
    warm = 0 if both[0].state else done  # where the optimizers began
    for batch in data:
        left = (args.batches - done) / (args.fall * args.batches)
        rate = args.rate * min(1.0, (done - warm + 1) / 60, max(0.02, left))
        lines.append(step(learner, both, batch, rate, done < alone))
        done += 1
        bar.update()
        if not lead:
            continue
        about = {"batches": done, "of these": done - before, "minutes": round((time.time() - began) / 60, 1)}
        if done % 20 == 0:
            whole = [line for line in lines if len(line) == max(map(len, lines))]
            note(args.out, about | {"loss, shown": [round(float(np.mean(x)), 3) for x in zip(*whole, strict=True)]})
            lines.clear()
        if done % args.every == 0 or done >= args.batches:
            save(args.out, learner, both, run, done)
        if (done % (10 * args.every) == 0 and done > alone) or done >= args.batches:
            note(args.out, about | check(learner, 16))
    if lead:
        export(args.out, learner)


def note(folder: Path, line: dict[str, Any]) -> None:
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
