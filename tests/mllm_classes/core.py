"""What the tiny classes share: how a class is described, its weights, its prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mllm_zoo as zoo
import torch
from mllm_zoo import PAD, SPECIAL, TEXT_IDS, Family, Item, Visual
from torch import Tensor, nn


@dataclass(frozen=True)
class Class(Family):
    """A `Family`, and what the many classes need besides."""

    model: str | None = None  # the class to build, where the auto class would take another
    marks: tuple[int, ...] = (zoo.IMAGE, zoo.VIDEO)  # placeholders: each stands for one row of features
    lacks: tuple[str, ...] = ()  # cases that the class itself refuses
    more: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]] | None = None  # from ids, mask and types
    eager: bool = True  # runs with plain attention
    sdpa: bool = True

    def cases(self) -> list[str]:
        return [case for case in super().cases() if case not in self.lacks]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights by fan-in, tables at a half, and everything that starts at 0 or 1 moved off it."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tied = id(head.weight) if head is not None and id(head.weight) in tables else None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
                continue
            if id(parameter) == tied or (head is not None and parameter is head.weight):
                std = 1.4 * parameter.shape[1] ** -0.5
            elif id(parameter) in tables or ("pos" in name and "proj" not in name):
                std = 0.5
            elif parameter.ndim == 3 and "expert" in name:
                std = parameter.shape[2] ** -0.5
            elif "mm_input_projection" in name:  # [in, out], unlike nn.Linear
                std = parameter.shape[0] ** -0.5
            else:
                std = (parameter.numel() / parameter.shape[0]) ** -0.5
            parameter.normal_(std=std, generator=generator)
    return model.eval()


def make(family: Class, attn: str | None) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = family.config()
    if not family.sdpa and attn == "sdpa":  # refused for the whole, then left to each part
        attn = None
    if family.model is None:
        model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attn)
    else:
        model = getattr(transformers, family.model)._from_config(config, attn_implementation=attn)
    randomise(model)
    # Lengths are fixed, and no placeholder is ever generated: a model would have no image for it.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = SPECIAL
    return model


# -- prompts --------------------------------------------------------------------------------------------------------

Row = tuple[list[int], list[int], list[Item]]  # ids, types, visuals


def draw(family: Class, prompt: list[int | Visual], row: int, seed: int) -> Row:
    """A row draws from its own generators, so that it is the same alone and in a batch."""
    ids, types, items = [1], [0], []
    for place, part in enumerate(prompt):
        generator = torch.Generator().manual_seed(10_000 * seed + 100 * row + place)
        if isinstance(part, int):
            new, kind = torch.randint(*TEXT_IDS, (part,), generator=generator).tolist(), 0
        else:
            spec = family.video if part.kind == "video" else family.images[part.which % len(family.images)]
            assert spec is not None, f"no {part.kind}"
            new, kind = family.ids(part.kind, spec, generator), 2 if part.kind == "video" else 1
            items.append(Item(part.kind, row, spec, new, family.pixels(part.kind, spec, generator)))
            items[-1].tokens = sum(token in family.marks for token in new)
        ids += new
        types += [kind * (token in family.marks) for token in new]
    return ids, types, items


def assemble(family: Class, rows: list[Row], right: bool = False) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _, _ in rows)
    input_ids = torch.full((len(rows), longest), PAD)
    mask, types = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    items: list[Item] = []
    for row, (ids, kinds, row_items) in enumerate(rows):
        where = slice(0, len(ids)) if right else slice(longest - len(ids), longest)
        input_ids[row, where], mask[row, where], types[row, where] = torch.tensor(ids), 1, torch.tensor(kinds)
        for item in row_items:
            item.row = row
            items.append(item)
    out = {"input_ids": input_ids, "attention_mask": mask}
    if family.types:
        out[family.types] = types
    if family.more:
        out.update(family.more(input_ids, mask, types))
    return {**out, **family.pack(items, len(rows))}
