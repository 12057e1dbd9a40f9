"""Multimodal LLMs from a configuration: from a folder or the Hub, and two presets of real size that fit on a laptop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtc.adapters.multimodal.families.prompts import Picture, picture
from vtc.checkpoints import tiny
from vtc.errors import first_line
from vtc.models.encoders import ModelError, quiet

PRESETS = ("llava-0.5b", "qwen2.5-vl-0.5b")
_LARGE = 4_000_000_000  # parameters above which a model is not filled with random weights

_QWEN2_05B = {  # Qwen2-0.5B
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}


def find_config(name: str, *, download: bool = False, trust_remote_code: bool = False) -> Any:
    """The configuration of a multimodal LLM: of a preset, from a folder or from the Hub; None if it is not one.

    Raises:
        ModelError: the name looks like one, but nothing with that name exists.
    """
    if name in PRESETS:
        return preset(name)
    path = str(tiny.folder(name)) if name in tiny.TINY else name.removeprefix("hf:")
    folder = Path(path)
    if not name.startswith("hf:") and not folder.is_dir():
        if path.startswith((".", "/", "~")):
            raise ModelError(f"{path}: no such folder; give a folder with a config.json, or an id such as owner/name")
        if ":" in path or path.count("/") != 1:
            return None
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{path}: this folder has no config.json; give one that `save_pretrained` has written")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=not download, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError, or any error of the Hub's client
        way = "check the name and the network" if download else "give a folder with a config.json, or add --download"
        if "trust_remote_code" in str(error):
            way = "it brings code of its own; --trust-remote-code runs that, if you trust it"
        raise ModelError(f"{path}: no configuration found ({first_line(error)}); {way}") from error
    return config if is_multimodal(config) else None


def is_multimodal(config: Any) -> bool:
    """True if transformers has an image-text-to-text model for it, or if it comes with its own code."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as KNOWN

    return type(config) in KNOWN or "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})


def sketch(config: Any) -> Any:
    """The model without weights (on "meta"), to inspect its structure."""
    with torch.device("meta"):
        return _make(config)


def fill(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model with random weights, in eval mode."""
    count = sum(p.numel() for p in sketch(config).parameters())
    if count > _LARGE:
        raise ModelError(
            f"{config.model_type}: {count / 1e9:.1f} billion parameters are too many to be run with random weights "
            f"here; choose one of {', '.join(PRESETS)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _make(config).eval().to(dtype)


def _make(config: Any) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    with quiet():
        try:
            return AutoModelForImageTextToText.from_config(copy.deepcopy(config))
        except Exception as error:
            raise ModelError(
                f"{config.model_type}: cannot be made from its configuration ({first_line(error)})"
            ) from error


def sample(config: Any, side: int | None = None) -> Picture:
    """A typical image for running a model."""
    if side is None:
        side = 896 if config.model_type.startswith("qwen") else 672  # 1,024 tokens in the presets
    found = picture(config, side)
    if found is None:
        raise ModelError(
            f"{config.model_type}: nobody here knows how its prompts are laid out; try a preset: {PRESETS}"
        )
    return found


def preset(name: str, shrink: int = 1) -> Any:
    """The configuration of a preset. `shrink` divides every size, for tests."""
    from transformers import LlavaConfig, Qwen2_5_VLConfig

    text: dict[str, Any] = dict(_QWEN2_05B)
    if shrink > 1:
        text |= {
            "hidden_size": 64,
            "intermediate_size": 4864 // shrink,
            "num_hidden_layers": max(3, 24 // shrink),
            "num_attention_heads": 4,
            "vocab_size": 151_936 // shrink,
        }
    width = text["hidden_size"]
    if name == "llava-0.5b":  # CLIP-L/14 at 448 x 448: 32 x 32 patches
        tower = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096}
        tower |= {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448, "patch_size": 14}
        if shrink > 1:
            tower |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
            tower |= {"image_size": 112}
        vision = {"vision_config": tower, "image_token_index": text["vocab_size"] - 1}
        return LlavaConfig(text_config={"model_type": "qwen2", **text}, **vision, tie_word_embeddings=True)
    half = width // text["num_attention_heads"] // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # time, rows, columns
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    tower = {"depth": 8, "hidden_size": 640, "intermediate_size": 1708, "num_heads": 8, "fullatt_block_indexes": [3, 7]}
    tower |= {"patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "out_hidden_size": width}
    if shrink > 1:
        tower |= {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "fullatt_block_indexes": [1]}
    last = text["vocab_size"]
    ids = {"image_token_id": last - 1, "video_token_id": last - 2}
    ids |= {"vision_start_token_id": last - 3, "vision_end_token_id": last - 4}
    return Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids, tie_word_embeddings=True)
