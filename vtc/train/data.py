"""Training data: lines of {"image": "a.jpg" or ["a.jpg", "b.jpg"], "prompt": "...", "answer": "..."}."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vtc.errors import OptionError
from vtc.methods.base import Method


class Examples(Dataset[dict[str, Any]]):
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
        from vtc.models.images import load_image
        from vtc.models.llms import build_inputs

        paths, prompt, answer = self.rows[index]
        found: dict[str, Any] = dict(build_inputs(self.processor, [load_image(path) for path in paths], prompt))
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
    """A model that `method` can compress, and the lines of a data file as keyword arguments of the model, with labels.

    Args:
        name: a folder, or an id on the Hub. data: see the top of this file. more: arguments of `vtc.models.llms.load`.
    """
    from vtc.models.llms import load

    found = Examples(data, seed)
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
    """The answer followed by what the chat template puts after it, or by the end-of-sequence token."""
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
