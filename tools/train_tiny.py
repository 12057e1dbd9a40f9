"""Train the two small multimodal LLMs of `vtc.checkpoints` on `vtc.eval.scenes`, from nothing; the LLaVA's tower is the
real DINOv2-S and stays as it is.

    python tools/train_tiny.py qwen --out out/tiny_qwen            # resumes what it finds there
    python tools/train_tiny.py llava --out out/tiny_llava --cache out/dinov2

A sequence holds one picture and several questions, each of which sees the picture and itself alone: a block mask, and
positions that go on behind the picture for each of them. Two more losses, without which nothing is learned for hours:
the image tokens are asked what they show, the Qwen's tower alone and on crowded scenes at first; a question is to be
answered as soon as it has named its thing. Scenes get harder along the way.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_data import THINGS, Features, Pictures, Text, stage
from tiny_models import CLIP, GRID, MARKS, llava, qwen, seal
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vtc.eval import scenes

THIRDS = (["top", "middle", "bottom"], ["left", "middle", "right"])


# -- the learner ----------------------------------------------------------------------------------------------------


def unseen(prefix: int, block: Tensor) -> Tensor:
    """[B, 1, P + L, P + L], 0 or -inf: a word sees the picture and what its own question says before it; padding
    itself."""
    block = functional.pad(block, (prefix, 0), value=-1)
    total = block.shape[1]
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    seen = (block[:, None, :] == -1) | (block[:, None, :] == block[:, :, None]) & (block[:, None, :] > 0)
    hidden = ~(seen & causal | torch.eye(total, dtype=torch.bool))[:, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)  # of booleans every layer would make this anew


@dataclass
class Front:
    """What stands before the questions: words, which of them are image tokens, positions, the grid of patches."""

    ids: Tensor
    marks: Tensor
    places: Tensor
    grid: Tensor


class Learner(nn.Module):
    """A model and what only its training needs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model, self.processor = {"qwen": qwen, "llava": llava}[name]()
        ids = self.processor.tokenizer.convert_tokens_to_ids
        self.says = [ids([".", *THINGS]), ids([".", *scenes.COLOURS])]
        if name == "llava":  # DINOv2 knows where its patches are; of the Qwen, positions alone are to say it
            self.says += [ids(THIRDS[0]), ids(THIRDS[1])]
        self.sharp = nn.Parameter(torch.tensor(10.0))
        self.before = {0: self.front(name, 0)}
        if name == "qwen":
            self.before |= {steps: self.front(name, steps) for steps in (1, 4)}
        self.mean, self.spread = torch.zeros(()), torch.ones(())  # of DINOv2's features
        self.name = name

    def front(self, name: str, steps: int) -> Front:
        """What stands before the questions: a picture, or a clip of so many steps of time."""
        start, end, image, clip = MARKS[name]
        mark, side = (clip, CLIP // 16) if steps else (image, GRID)
        many = " ".join([mark] * side * side * max(1, steps))
        given = self.processor.tokenizer(f"<user> {start} {many} {end}" if name == "qwen" else f"<user> {many}")
        ids = torch.tensor(given.input_ids)
        marks = ids == self.processor.tokenizer.convert_tokens_to_ids(mark)
        grid = torch.tensor([[max(1, steps), 2 * side, 2 * side]])
        if name == "llava":
            return Front(ids, marks, torch.arange(len(ids))[None], grid)
        kinds, which = (marks * (2 if steps else 1))[None], {f"{'video' if steps else 'image'}_grid_thw": grid}
        seconds = torch.tensor([2 / 24])  # what the processor says of frames without times
        places = self.model.model.get_rope_index(ids[None], kinds, second_per_grid_ts=seconds, **which)[0]
        return Front(ids, marks, places, grid)

    def features(self, pixels: Tensor) -> Tensor:
        """What `see` takes: of the LLaVA the tower's last layer, before its norm, as the model itself takes it."""
        if self.name == "qwen":
            return pixels
        return self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]

    def see(self, pixels: Tensor, steps: int = 0) -> Tensor:
        """Pixels [B, patches, values], or features of DINOv2 [B, tokens, 384] -> image tokens [B, tokens, width]."""
        if self.name == "llava":
            return self.model.model.multi_modal_projector((pixels - self.mean) / self.spread)
        grid = self.before[steps].grid.expand(len(pixels), -1)
        return self.model.model.visual(pixels.flatten(0, 1), grid_thw=grid).pooler_output.unflatten(
            0, (len(pixels), -1)
        )

    def fold(self) -> None:
        """Into the projector's first layer what it is trained without: the features' mean, 43 of their 46 in length,
        and their spread."""
        if self.name == "llava":
            first = self.model.model.multi_modal_projector.linear_1
            with torch.no_grad():
                first.weight.copy_(first.weight / self.spread)
                first.bias.copy_(first.bias - first.weight @ self.mean.expand(first.in_features))
            self.mean, self.spread = torch.zeros(()), torch.ones(())

    def shown(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """How far the image tokens are from saying what they show in the language of the words: by cosine to these.
        labels [B, tokens, 4]: thing, colour (0 = none), third from above, third from the left."""
        words = functional.normalize(self.model.get_input_embeddings().weight, dim=-1)
        near = self.sharp * functional.normalize(tokens, dim=-1) @ words.T
        there, total = (labels[..., 0] > 0).flatten(), tokens.new_zeros(())
        for i, ids in enumerate(self.says):
            each = functional.cross_entropy(near[..., ids].flatten(0, 1), labels[..., i].flatten(), reduction="none")
            total = total + each[there].mean() + 0.5 * each[~there].mean()
        return total

    def read(self, tokens: Tensor, text: Text, steps: int = 0) -> Tensor:
        """The decoder's output for the words behind the pictures: [B, L, width]."""
        embed, front = self.model.get_input_embeddings(), self.before[steps]
        before = embed(front.ids)[None].repeat(len(tokens), 1, 1)
        before[:, front.marks] = tokens
        axes = front.places.shape[:-2]  # (3,) for Qwen's, none for a Llama's
        behind = (int(front.places.max()) + 1 + text.offset).expand(*axes, -1, -1)
        mask = unseen(len(front.ids), text.block)
        return self.model.model.language_model(
            inputs_embeds=torch.cat([before, embed(text.ids)], 1),
            attention_mask={"full_attention": mask} if self.name == "qwen" else mask,
            position_ids=torch.cat([front.places.expand(*axes, len(tokens), -1), behind], -1),
            use_cache=False,
        ).last_hidden_state[:, len(front.ids) :]

    def answers(self, tokens: Tensor, text: Text, steps: int = 0) -> tuple[Tensor, Tensor]:
        """Logits of the words that have a target, and these: [words, vocabulary], [words]."""
        asked = text.target >= 0
        return self.model.lm_head(self.read(tokens, text, steps)[asked]), text.target[asked]

    def loss(self, tokens: Tensor, text: Text, steps: int = 0) -> Tensor:
        """Of the answers, and of saying them as soon as the question names its thing: to find that thing in the picture
        is then one step of attention, not two of which neither learns without the other."""
        out = self.read(tokens, text, steps)
        parts = [
            functional.cross_entropy(self.model.lm_head(out[wanted >= 0]), wanted[wanted >= 0])
            for wanted in (text.target, text.hint)
        ]
        return parts[0] + 0.5 * parts[1]


# -- the run --------------------------------------------------------------------------------------------------------


def check(learner: Learner, count: int, batch: int = 16, level: scenes.Level | None = None) -> dict[str, float]:
    """Accuracy on the validation split, by question kind; an answer is right if all its words are, each after the
    right ones before it."""
    right: dict[str, list[bool]] = {}
    pictures = Pictures(learner, 0, 0, batch, 12)
    learner.eval()
    with torch.inference_mode():
        for at in range(0, count, batch):
            asked = [pictures.make(list(scenes.scenes("validation", batch, level, at)))]
            if learner.name == "qwen":
                numbers, frames = range(at, at + batch), 2 if at // batch % 2 else 8
                asked.append(pictures.film([scenes.clip("validation", n, frames, level) for n in numbers]))
            for values, _, text, steps in asked:
                logits, target = learner.answers(learner.see(learner.features(values), steps), text, steps)
                owner = (torch.arange(len(values))[:, None] * 100 + text.block)[text.target >= 0]
                for number in owner.unique().tolist():
                    words = owner == number
                    kind = text.kinds[number // 100][number % 100 - 1]
                    right.setdefault(kind, []).append(bool((logits[words].argmax(-1) == target[words]).all()))
    learner.train()
    by_kind = {kind: float(np.mean(right[kind])) for kind in (*scenes.KINDS, "when") if kind in right}
    pictures_alone = [x for kind in scenes.KINDS for x in right.get(kind, [])]
    return by_kind | {"all": float(np.mean(pictures_alone))}


def optimizers(learner: Learner, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings and vectors."""
    trained = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
    matrices = [p for n, p in trained if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in trained if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, rate, (0.9, 0.98), weight_decay=0.05)]


def save(
    folder: Path, learner: Learner, optimizers: list[torch.optim.Optimizer], run: dict[str, Any], done: int
) -> None:
    """All that is needed to go on, in one file without pickle."""
    from safetensors.torch import save_file

    names = {p: n for n, p in learner.named_parameters() if p.requires_grad}
    state = {f"weight/{n}": p for p, n in names.items()}
    for optimizer in optimizers:
        for p, entry in optimizer.state.items():  # none yet of what has not learned
            state |= {f"{key}/{names[p]}": value for key, value in entry.items()}
    partial = folder / "state.partial"
    save_file(
        {k: v.detach().contiguous() for k, v in state.items()}, partial, {"run": json.dumps(run), "done": str(done)}
    )
    os.replace(partial, folder / "state.safetensors")


def resume(folder: Path, learner: Learner, optimizers: list[torch.optim.Optimizer], run: dict[str, Any]) -> int:
    """How many pictures were done. Another run's state is refused."""
    from safetensors import safe_open

    path = folder / "state.safetensors"
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
    for optimizer, keys in zip(optimizers, (("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq")), strict=True):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if f"{keys[0]}/{names[p]}" in state:
                optimizer.state[p] = {key: state[f"{key}/{names[p]}"] for key in keys}
    return int(about["done"])


def export(folder: Path, learner: Learner) -> None:
    """The model and its processor as Transformers reads them, in bfloat16, without DINOv2."""
    from safetensors.torch import save_file

    learner.fold()
    learner.processor.save_pretrained(folder)
    learner.model.config.save_pretrained(folder)
    learner.model.generation_config.save_pretrained(folder)
    state = {k: v.bfloat16().contiguous() for k, v in learner.model.state_dict().items() if "vision_tower" not in k}
    state.pop("lm_head.weight")  # the embedding's
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    seal(folder)


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("model", choices=("qwen", "llava"))
    parse.add_argument("--out", type=Path, required=True, help="folder; a run that stopped there goes on")
    parse.add_argument("--pictures", type=int, default=60_000, help="how many to learn from, in all")
    parse.add_argument("--features", type=int, default=10_000, help="llava: how many different ones")
    parse.add_argument("--cache", type=Path, default=Path("out/dinov2"), help="llava: where their features are kept")
    parse.add_argument("--batch", type=int, default=16)
    parse.add_argument("--questions", type=int, default=16, help="per picture, at most")
    parse.add_argument("--rate", type=float, default=2e-3)
    parse.add_argument("--see", type=int, default=16_000, help="qwen: pictures from which only the tower learns")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--threads", type=int, help="of torch")
    args = parse.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    learner = Learner(args.model).train()
    run = {k: v for k, v in vars(args).items() if k in ("model", "questions", "seed")}
    trained = [p for p in learner.parameters() if p.requires_grad]
    both = optimizers(learner, args.rate)
    args.out.mkdir(parents=True, exist_ok=True)
    done = resume(args.out, learner, both, run)
    alone = args.see if args.model == "qwen" else 0
    pictures = Pictures(learner, done, args.pictures, args.batch, args.questions, alone)
    if args.model == "llava":
        data: Any = Features(learner, args.cache, args.features, pictures)
    else:
        data = DataLoader(pictures, batch_size=None, num_workers=1, prefetch_factor=4)
    bar, noted = tqdm(total=args.pictures, initial=done, unit="picture"), time.time()
    for values, shown, text, steps in data:
        for group in (group for optimizer in both for group in optimizer.param_groups):
            left = (args.pictures - done) / (0.2 * args.pictures)  # the rate falls over the last fifth
            group["lr"] = args.rate * min(1.0, (done + args.batch) / (200 * args.batch), max(0.02, left))
        tokens = learner.see(values, steps)
        loss = (1.0 if done < alone else 0.2 if done < 40_000 else 0.05) * learner.shown(tokens, shown)
        if done >= alone:
            loss = loss + learner.loss(tokens, text, steps)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        done += args.batch
        bar.update(args.batch)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if time.time() - noted > 240 or done >= args.pictures:
            noted = time.time()
            save(args.out, learner, both, run, done)
            found = check(learner, 64, level=stage(done))
            with (args.out / "log.jsonl").open("a") as log:
                scores = {kind: round(value, 3) for kind, value in found.items()}
                log.write(json.dumps({"pictures": done, "rate": args.rate, "loss": loss.item(), **scores}) + "\n")
    export(args.out, learner)


if __name__ == "__main__":
    main()
