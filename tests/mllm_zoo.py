"""Tiny multimodal LLMs with random weights, one of every family that an adapter covers, and prompts for them.

No processor and no network: the prompts are written as the processors write them (placeholders, wrappers, padding), but
from a small table, so that each case says what is in it. Norms, biases and projections are drawn, not left at 0 or 1,
so that a forgotten part shows, and weights are scaled by fan-in, so that attention is neither uniform nor one-hot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel

VOCAB, PAD, IMAGE, VIDEO, START, END, FAKE = 120, 0, 110, 111, 112, 113, 114
TEXT_IDS = (5, 100)  # where ordinary text is drawn from; from 110 on everything is special
SPECIAL = list(range(110, VOCAB))

# What this transformers calls a cache, as an argument and in outputs (`cache` since 5.24).
CACHE = next(name for name in ("cache", "past_key_values") if name in signature(LlamaModel.forward).parameters)

Spec = tuple[int, ...]  # what a family calls a size: (height, width), (crops,), (frames, height, width)


@dataclass(frozen=True)
class Visual:
    """One image or video of a prompt; `which` picks the size from the family's table."""

    kind: str
    which: int = 0


def _image(which: int = 0) -> Visual:
    return Visual("image", which)


_VIDEO = Visual("video")

# A prompt is a list of text lengths and visuals. Rows differ in text length, and where the family has sizes, in these.
_RAGGED = [[3, _image(0), 4], [4, _image(1), 2, _image(2), 9], [6, _image(2), 5]]
PROMPTS: dict[str, list[list[int | Visual]]] = {
    "single": [[5, _image(0), 7]],
    "ragged": _RAGGED,
    "ragged_right": _RAGGED,
    "pair": [[4, _image(0), 3, _image(1), 6]],
    "text": [[9]],
    "mixed": [[3, _image(0), 5], [7]],
    "video": [[4, _VIDEO, 5]],
    "image_video": [[3, _image(1), 2, _VIDEO, 6]],
}
_IMAGE_CASES = ["single", "ragged", "ragged_right", "pair", "text", "mixed"]


@dataclass
class Item:
    """One visual of a row, drawn."""

    kind: str
    row: int
    spec: Spec
    ids: list[int]  # what stands in the prompt, wrappers included
    pixels: Tensor
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(token in (IMAGE, VIDEO) for token in self.ids)


@dataclass(frozen=True)
class Family:
    config: Callable[[], Any]
    images: list[Spec]
    ids: Callable[[str, Spec, torch.Generator], list[int]]
    pixels: Callable[[str, Spec, torch.Generator], Tensor]
    pack: Callable[[list[Item], int], dict[str, Tensor]]  # items and number of rows -> pixels and what goes with them
    types: str | None = None  # the family's name for token types, and what they mean
    video: Spec | None = None

    def cases(self) -> list[str]:
        return _IMAGE_CASES + (["video", "image_video"] if self.video else [])


# -- configurations -------------------------------------------------------------------------------------------------

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def _rope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}


def _clip(side: int, patch: int = 8) -> dict[str, Any]:
    return {"model_type": "clip_vision_model", **_TOWER, "image_size": side, "patch_size": patch}


def _siglip(side: int, patch: int = 8) -> dict[str, Any]:
    settings = {"image_size": side, "patch_size": patch, "vision_use_head": False}
    return {"model_type": "siglip_vision_model", **_TOWER, **settings}


def _config(kind: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import copy

        import transformers

        # Configurations write into the dictionaries they are given.
        return getattr(transformers, kind)(**copy.deepcopy(options))

    return make


_LLAVA = {"image_token_index": IMAGE, "text_config": {"model_type": "llama", **_TEXT}}
_PINPOINTS = [[32, 64], [64, 32], [64, 64]]
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_QWEN_TOWER = {"depth": 4, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _gemma3(window: int) -> Callable[[], Any]:
    text = {
        **_TEXT,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": window,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    return _config(
        "Gemma3Config",
        text_config=text,
        vision_config=_siglip(48, 4),
        mm_tokens_per_image=36,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _idefics(kind: str) -> Callable[[], Any]:
    return _config(
        kind,
        text_config={"model_type": "llama", **_TEXT},
        vision_config={**_TOWER, "image_size": 64, "patch_size": 8},
        image_token_id=IMAGE,
        scale_factor=2,
    )


# -- placeholders and pixels ----------------------------------------------------------------------------------------


def _count(number: int) -> Callable[[str, Spec, torch.Generator], list[int]]:
    return lambda kind, spec, generator: [IMAGE] * number


def _square(side: int) -> Callable[[str, Spec, torch.Generator], Tensor]:
    return lambda kind, spec, generator: torch.randn(3, side, side, generator=generator)


def _wrapped(number: int) -> Callable[[str, Spec, torch.Generator], list[int]]:
    return lambda kind, spec, generator: [START, *[IMAGE] * number, END]


def _resolution(spec: Spec) -> tuple[int, int]:
    from transformers.image_processing_utils import select_best_resolution

    return select_best_resolution(spec, _PINPOINTS)


def _anyres(limit: int | None) -> Callable[[str, Spec, torch.Generator], list[int]]:
    """The base crop, and the grid of the others without its padding, a newline at the end of each line.

    `limit` is LLaVA-OneVision's largest number of crops; above, the grid is scaled down.
    """

    def ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
        if kind == "video":  # 2x2 pooling, one newline at the end
            return [VIDEO] * (spec[0] * 4 + 1)
        if spec[0] == 1:  # one of several images of a prompt: no crops, one newline
            return [IMAGE] * 17
        (high, wide), (rows, columns) = spec, (side // 8 for side in _resolution(spec))
        if wide / high > columns / rows:
            rows -= (rows - int(round(high * columns / wide, 7))) // 2 * 2
        else:
            columns -= (columns - int(round(wide * rows / high, 7))) // 2 * 2
        ratio = (rows * columns / (limit * 16)) ** 0.5 if limit else 0
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return [IMAGE] * (16 + rows * (columns + 1))

    return ids


def _crops(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    if kind == "video":
        return torch.randn(spec[0], 3, 32, 32, generator=generator)
    high, wide = (0, 0) if spec[0] == 1 else _resolution(spec)
    return torch.randn(1 + high * wide // 32**2, 3, 32, 32, generator=generator)


def _qwen_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    frames, high, wide = spec
    return [START, *[VIDEO if kind == "video" else IMAGE] * (frames * high * wide // 4), END]


def _qwen3_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    """A video is a timestamp and a wrapped frame for each temporal slice."""
    if kind == "image":
        return _qwen_ids(kind, spec, generator)
    frame = [START, *[VIDEO] * (spec[1] * spec[2] // 4), END]
    stamp = torch.randint(*TEXT_IDS, (spec[0], 3), generator=generator).tolist()
    return [token for i in range(spec[0]) for token in [*stamp[i][: 2 + i % 2], *frame]]


def _patches(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    frames, high, wide = spec
    return torch.randn(frames * high * wide, 3 * 2 * 8 * 8, generator=generator)


def _tiles_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    """Idefics3 splits an image: each crop is wrapped, and the whole image comes last."""
    return [token for _ in range(spec[0]) for token in [FAKE, START, *[IMAGE] * 16]] + [FAKE]


def _tiles(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    return torch.randn(spec[0], 3, 64, 64, generator=generator)


def _internvl_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    """All crops of an image in one run, as the processor writes them."""
    return [START, *[IMAGE] * (9 * spec[0]), END]


def _internvl_tiles(kind: str, spec: Spec, generator: torch.Generator) -> Tensor:
    return torch.randn(spec[0], 3, 48, 48, generator=generator)


# -- what goes beside input_ids -------------------------------------------------------------------------------------


def _of(items: list[Item], kind: str) -> list[Item]:
    return [item for item in items if item.kind == kind]


def _stacked(items: list[Item], rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([item.pixels for item in items])} if items else {}


def _concatenated(items: list[Item], rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat([item.pixels for item in items])} if items else {}


def _padded(items: list[Tensor]) -> Tensor:
    most = max(len(item) for item in items)
    return torch.stack([torch.cat([item, item.new_zeros(most - len(item), *item.shape[1:])]) for item in items])


def _anyres_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    if images := _of(items, "image"):
        out["pixel_values"] = _padded([item.pixels for item in images])
        out["image_sizes"] = torch.tensor([item.spec[-2:] for item in images])
    return out


def _onevision_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    out = _anyres_pack(items, rows)
    if images := _of(items, "image"):
        out["batch_num_images"] = torch.tensor([sum(item.row == row for item in images) for row in range(rows)])
    if videos := _of(items, "video"):
        out["pixel_values_videos"] = torch.stack([item.pixels for item in videos])
    return out


def _qwen_pack(seconds: bool = False) -> Callable[[list[Item], int], dict[str, Tensor]]:
    def pack(items: list[Item], rows: int) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if chosen := _of(items, kind):
                out[pixels] = torch.cat([item.pixels for item in chosen])
                out[f"{kind}_grid_thw"] = torch.tensor([item.spec for item in chosen])
        if seconds and (videos := _of(items, "video")):
            # Not 1, which is the default; whole, because 5.17 truncates it and later versions do not.
            out["second_per_grid_ts"] = torch.full((len(videos),), 2.0)
        return out

    return pack


def _idefics_pack(items: list[Item], rows: int) -> dict[str, Tensor]:
    """Crops of a row in one dimension; rows with fewer get images of zeros, which the model leaves out."""
    if not items:
        return {}
    empty = torch.zeros(0, 3, 64, 64)
    crops = [torch.cat([empty, *(item.pixels for item in items if item.row == row)]) for row in range(rows)]
    mask = torch.zeros(rows, max(len(row) for row in crops), 64, 64, dtype=torch.long)
    for row, tensors in enumerate(crops):
        mask[row, : len(tensors)] = 1
        # The border of an image that did not fill its crop: masked in the tower, still placeholders in the prompt.
        mask[row, : min(1, len(tensors)), :, 56:] = 0
    return {"pixel_values": _padded(crops), "pixel_attention_mask": mask}


# -- the families ---------------------------------------------------------------------------------------------------

_QWEN_IMAGES: list[Spec] = [(1, 10, 8), (1, 6, 12), (1, 8, 8)]
_ANYRES_IMAGES: list[Spec] = [(30, 60), (60, 15), (64, 60)]

FAMILIES: dict[str, Family] = {
    "llava": Family(
        _config("LlavaConfig", **_LLAVA, vision_config=_clip(40), vision_feature_layer=-2, image_seq_length=25),
        [()],
        _count(25),
        _square(40),
        _stacked,
    ),
    "llava_siglip": Family(
        _config(
            "LlavaConfig",
            **_LLAVA,
            vision_config=_siglip(40),
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            image_seq_length=25,
        ),
        [()],
        _count(25),
        _square(40),
        _stacked,
    ),
    "llava_next": Family(
        _config(
            "LlavaNextConfig",
            image_token_index=IMAGE,
            text_config={"model_type": "mistral", **_TEXT, "head_dim": 16, "sliding_window": None},
            vision_config=_clip(32),
            image_grid_pinpoints=_PINPOINTS,
            image_seq_length=16,
        ),
        [(30, 60), (60, 15), (48, 31)],
        _anyres(None),
        _crops,
        _anyres_pack,
    ),
    "llava_onevision": Family(
        _config(
            "LlavaOnevisionConfig",
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            text_config={"model_type": "qwen2", **_TEXT},
            vision_config=_siglip(32),
            image_grid_pinpoints=_PINPOINTS,
            vision_aspect_ratio="anyres_max_2",
        ),
        [(30, 60), (60, 15), (64, 60)],  # the last is scaled down to two crops' worth
        _anyres(2),
        _crops,
        _onevision_pack,
        video=(4, 32, 32),
    ),
    "qwen2_vl": Family(
        _config(
            "Qwen2VLConfig",
            text_config={**_TEXT, "rope_parameters": _rope(4, 2, 2)},
            vision_config={**_QWEN_TOWER, "embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2},
            **_QWEN_IDS,
        ),
        _QWEN_IMAGES,
        _qwen_ids,
        _patches,
        _qwen_pack(),
        "mm_token_type_ids",
        video=(3, 6, 8),
    ),
    "qwen2_5_vl": Family(
        _config(
            "Qwen2_5_VLConfig",
            text_config={**_TEXT, "rope_parameters": _rope(4, 2, 2)},
            vision_config={
                **_QWEN_TOWER,
                "hidden_size": 48,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "window_size": 32,  # two by two tokens; the images have three to six a side
                "fullatt_block_indexes": [1, 3],
            },
            **_QWEN_IDS,
        ),
        _QWEN_IMAGES,
        _qwen_ids,
        _patches,
        _qwen_pack(seconds=True),
        "mm_token_type_ids",
        video=(3, 6, 8),
    ),
    "qwen3_vl": Family(
        _config(
            "Qwen3VLConfig",
            text_config={**_TEXT, "head_dim": 32, "rope_parameters": _rope(8, 4, 4, mrope_interleaved=True)},
            vision_config={
                **_QWEN_TOWER,
                "hidden_size": 48,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 2],
            },
            **_QWEN_IDS,
        ),
        _QWEN_IMAGES,
        _qwen3_ids,
        _patches,
        _qwen_pack(),
        "mm_token_type_ids",
        video=(3, 6, 8),
    ),
    "internvl": Family(
        _config(
            "InternVLConfig",
            text_config={"model_type": "qwen2", **_TEXT},
            vision_config={**_TOWER, "image_size": 48, "patch_size": 8, "use_qk_norm": True},
            image_token_id=IMAGE,
            image_seq_length=9,
            tie_word_embeddings=False,
        ),
        [(4,), (2,), (3,)],  # crops
        _internvl_ids,
        _internvl_tiles,
        _concatenated,
    ),
    "idefics3": Family(_idefics("Idefics3Config"), [(3,), (1,), (2,)], _tiles_ids, _tiles, _idefics_pack),
    "smolvlm": Family(_idefics("SmolVLMConfig"), [(1,), (3,), (2,)], _tiles_ids, _tiles, _idefics_pack),
    "gemma3": Family(_gemma3(256), [()], _wrapped(36), _square(48), _stacked, "token_type_ids"),
    "gemma3_sliding": Family(_gemma3(16), [()], _wrapped(36), _square(48), _stacked, "token_type_ids"),
    "paligemma": Family(
        _config(
            "PaliGemmaConfig",
            text_config={"model_type": "gemma", **_TEXT, "head_dim": 16},
            vision_config=_siglip(40),
            image_token_index=IMAGE,
            projection_dim=64,
            hidden_size=64,
            vocab_size=VOCAB,
        ),
        [()],
        _count(25),
        _square(40),
        _stacked,
        "token_type_ids",
    ),
}
CASES: dict[str, list[str]] = {name: family.cases() for name, family in FAMILIES.items()}

# -- models ---------------------------------------------------------------------------------------------------------


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights by fan-in, and everything that starts at 0 or 1 moved off it."""
    generator, tied = torch.Generator().manual_seed(seed), getattr(model.config, "tie_word_embeddings", False)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:  # norms start at 1 (Gemma's at 0), biases at 0
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            elif "pos" in name and "proj" not in name:
                parameter.normal_(std=0.5, generator=generator)
            elif "embed_tokens" in name:  # where it is tied, it is the head too, and Gemma scales it up at the input
                parameter.normal_(std=1.4 * parameter.shape[1] ** -0.5 if tied else 0.5, generator=generator)
            elif "lm_head" in name:
                parameter.normal_(std=1.4 * parameter.shape[1] ** -0.5, generator=generator)
            elif "mm_input_projection" in name:  # [in, out], unlike nn.Linear, and it starts at zeros
                parameter.normal_(std=parameter.shape[0] ** -0.5, generator=generator)
            else:
                parameter.normal_(std=(parameter.numel() / parameter.shape[0]) ** -0.5, generator=generator)
    return model.eval()


def _build(name: str, attn: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = FAMILIES[name].config()
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attn)
    randomise(model)
    # Lengths are fixed, and no placeholder is ever generated: a model would have no image for it.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = SPECIAL
    return model


_cached = cache(_build)


def build(name: str, attn: str = "sdpa", fresh: bool = False) -> nn.Module:
    """One model per process, name and attention; tests that change it ask for a fresh one or give it back as it was."""
    return _build(name, attn) if fresh else _cached(name, attn)


RETRIEVERS = {"colpali": ("ColPali", "paligemma"), "colqwen2": ("ColQwen2", "qwen2_vl")}  # around which family


def retriever(name: str, around: str = "") -> nn.Module:
    """A retrieval model of transformers, around the named family or its own."""
    import transformers

    torch.manual_seed(0)
    kind, family = RETRIEVERS[name]
    inner = FAMILIES[around or family].config()
    config = getattr(transformers, f"{kind}Config")(vlm_config=inner, embedding_dim=8)
    return randomise(getattr(transformers, f"{kind}ForRetrieval")(config))


def text_model(model: nn.Module) -> nn.Module:
    inner = model.model
    return inner.language_model if hasattr(inner, "language_model") else inner.text_model


# -- prompts --------------------------------------------------------------------------------------------------------


def _draw(name: str, prompt: list[int | Visual], row: int, seed: int) -> tuple[list[int], list[Item]]:
    """A row draws from its own generators, so that it is the same alone and in a batch."""
    family, ids, items = FAMILIES[name], [1], []
    several = sum(isinstance(part, Visual) and part.kind == "image" for part in prompt) > 1
    for place, part in enumerate(prompt):
        generator = torch.Generator().manual_seed(10_000 * seed + 100 * row + place)
        if isinstance(part, int):
            ids += torch.randint(*TEXT_IDS, (part,), generator=generator).tolist()
            continue
        spec = family.video if part.kind == "video" else family.images[part.which % len(family.images)]
        assert spec is not None, f"{name} has no {part.kind}"
        if name == "llava_onevision" and several:
            spec = (1, *spec)  # several images in a prompt: no crops
        visual = family.ids(part.kind, spec, generator)
        items.append(Item(part.kind, row, spec, visual, family.pixels(part.kind, spec, generator)))
        ids += visual
    return ids, items


def _assemble(name: str, rows: list[tuple[list[int], list[Item]]], right: bool = False) -> dict[str, Tensor]:
    family, longest = FAMILIES[name], max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(input_ids)
    items: list[Item] = []
    for row, (ids, row_items) in enumerate(rows):
        where = slice(0, len(ids)) if right else slice(longest - len(ids), longest)
        input_ids[row, where], mask[row, where] = torch.tensor(ids), 1
        for item in row_items:
            item.row = row
            items.append(item)
    out = {"input_ids": input_ids, "attention_mask": mask}
    if family.types == "mm_token_type_ids":
        out[family.types] = (input_ids == IMAGE) + 2 * (input_ids == VIDEO)
    elif family.types == "token_type_ids":  # Gemma 3: 1 on images. PaliGemma: 1 on the suffix, and a prompt has none
        out[family.types] = torch.zeros_like(input_ids) if name == "paligemma" else (input_ids == IMAGE).long()
    return {**out, **family.pack(items, len(rows))}


def inputs(name: str, case: str, seed: int = 0) -> dict[str, Tensor]:
    """The keyword arguments of `model(...)` and `model.generate(...)`."""
    rows = [_draw(name, prompt, row, seed) for row, prompt in enumerate(PROMPTS[case])]
    return _assemble(name, rows, right=case == "ragged_right")


def alone(name: str, case: str, row: int, seed: int = 0) -> dict[str, Tensor]:
    """One row of `inputs(name, case, seed)` as a batch of one, without padding."""
    return _assemble(name, [_draw(name, PROMPTS[case][row], row, seed)])


@cache
def _counts(name: str) -> dict[tuple[int, ...], list[int]]:
    """Tokens of each item of a row, by the row's special tokens."""
    out = {}
    for case in CASES[name]:
        for row, prompt in enumerate(PROMPTS[case]):
            ids, items = _draw(name, prompt, row, 0)
            out[_signature(ids)] = [item.tokens for item in items]
    return out


def _signature(ids: list[int]) -> tuple[int, ...]:
    return tuple(token if token in SPECIAL else -1 for token in ids)


def tokens_per_item(name: str, inputs: dict[str, Tensor]) -> list[int]:
    """Placeholders of each image and video in prompt order, crops and frames of one item together.

    Looked up by row: any case, any seed, in a batch or alone. It must not come from the code under test.
    """
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return [count for ids, mask in rows for count in _counts(name)[_signature(ids[mask].tolist())]]


def placeholders(model: nn.Module, input_ids: Tensor) -> Tensor:
    video = getattr(model.config, "video_token_id", None)
    image = input_ids == model.config.image_token_id
    return image if video is None else image | (input_ids == video)


def runs(model: nn.Module, input_ids: Tensor) -> list[tuple[int, int, int]]:
    """(row, start, stop) of each unbroken run of placeholders: an image, or a crop or frame of it."""
    marks = nn.functional.pad(placeholders(model, input_ids).int(), (1, 1)).diff(dim=1)
    starts, stops = (marks == 1).nonzero().tolist(), (marks == -1).nonzero().tolist()
    return [(row, start, stop) for (row, start), (_, stop) in zip(starts, stops, strict=True)]


def fingerprint(model):
    """Everything that a patch could leave behind."""
    found = []
    for path, module in model.named_modules():
        hooks = [len(getattr(module, name)) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        state = {k: id(v) for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}
        state.pop("rope_deltas", None)  # Qwen models remember the last prompt's
        found.append((path, type(module), sorted(state.items()), hooks, [id(p) for p in module.parameters(False)]))
    return found
