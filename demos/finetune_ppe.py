"""Fine-tune a multimodal LLM with LoRA while its image tokens are merged and carry their members' positions (PPE).

    python demos/finetune_ppe.py                      # a tiny Qwen2.5-VL, random weights, a task of its own: a minute
    python demos/finetune_ppe.py --model FOLDER --data data.jsonl --out adapter      # yours; the data of `vtc.train`

The task of the tiny model: a quadrant of a noisy picture is bright; which? Merging says what was in the
picture, and PPE where. Nothing of vtc is special about training: the model is compressed, and trained as ever.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import vtc

_logger = logging.getLogger("finetune_ppe")
IMAGE, START, END, ASK, ANSWERS = 90, 92, 93, 10, 20  # token ids; ANSWERS + quadrant is the answer
SIDE, PATCH = 16, 8  # patches along a side, pixels along a patch; 2 x 2 patches make a token


def tiny_model() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
    text = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.12, "rope_parameters": rope}
    tower = {"depth": 2, "hidden_size": 48, "intermediate_size": 96, "num_heads": 4, "patch_size": PATCH}
    tower |= {"out_hidden_size": 64, "window_size": 64, "fullatt_block_indexes": [1], "initializer_range": 0.12}
    ids = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": START, "vision_end_token_id": END}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids))


def pictures(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A batch of the task: pixels as the processor packs them, the prompt, and labels on the answer alone."""
    half, width = SIDE // 4, 3 * 2 * PATCH * PATCH
    quadrant = torch.randint(4, (batch,), generator=generator)
    rows, columns = (torch.arange(SIDE // 2) // half == at[:, None] for at in (quadrant // 2, quadrant % 2))
    bright = (rows[:, :, None] & columns[:, None])[..., None, None]
    noise = torch.randn(batch, SIDE // 2, SIDE // 2, 4, width, generator=generator) + 2.0 * bright
    prompt = torch.tensor([1, START, *[IMAGE] * (SIDE * SIDE // 4), END, ASK]).expand(batch, -1)
    ids = torch.cat([prompt, (ANSWERS + quadrant)[:, None]], 1)
    labels = torch.cat([torch.full_like(prompt, -100), ids[:, -1:]], 1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    found |= {"mm_token_type_ids": (ids == IMAGE).long(), "pixel_values": noise.flatten(0, 3)}
    return found | {"image_grid_thw": torch.tensor([[1, SIDE, SIDE]]).expand(batch, -1)}


def finetune(
    model: Any, batches: Iterator[dict[str, Any]], method: vtc.methods.Method, steps: int, lr: float, progress: bool
) -> tuple[Any, list[float]]:
    """LoRA on every linear map, with `method` in place. Returns the adapted model and the loss of every step."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=lr)
    losses = []
    with vtc.compress(adapted, method), tqdm(batches, total=steps, disable=not progress, desc="LoRA") as bar:
        for batch in bar:
            loss = adapted(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return adapted, losses


@torch.no_grad()
def accuracy(model: Any, method: vtc.methods.Method, batch: dict[str, Tensor]) -> float:
    with vtc.compress(model, method):
        said = model(**batch).logits[:, -2].argmax(-1)
    return float((said == batch["input_ids"][:, -1]).float().mean())


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", help="a folder with a multimodal LLM (default: a tiny one with random weights)")
    add("--data", help="lines of JSON, as `python -m vtc.train` reads them")
    add("--out", help="where to save the adapter")
    add("--keep", type=float, default=0.25)
    add("--positions", choices=("ppe", "original"), default="ppe")
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=32)
    add("--lr", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    method = vtc.DPCKNN(keep=args.keep, positions=args.positions)
    if args.model:
        from vtc.train import open_examples

        model, found = open_examples(args.model, Path(args.data), method, args.seed)
        batches = (found[i % len(found)] for i in range(args.steps))
    else:
        generator = torch.Generator().manual_seed(args.seed)
        model, batches = tiny_model(), (pictures(args.batch, generator) for _ in range(args.steps))
    adapted, losses = finetune(model.train(), batches, method, args.steps, args.lr, progress=True)
    result: dict[str, Any] = {"first": losses[0], "last": sum(losses[-10:]) / len(losses[-10:])}
    if not args.model:
        result["accuracy"] = accuracy(adapted.eval(), method, pictures(256, generator))
    if args.out:
        adapted.save_pretrained(args.out)
    _logger.info("; ".join(f"{name} {value:.3f}" for name, value in result.items()))
    return result


if __name__ == "__main__":
    main()
