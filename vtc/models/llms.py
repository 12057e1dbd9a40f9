"""Multimodal LLMs by name, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vtc import checkpoints
from vtc.checkpoints import tiny
from vtc.errors import OptionError, UnsupportedModelError, VTCError, first_line
from vtc.methods import Method
from vtc.models.configs import find_config, sketch
from vtc.models.encoders import quiet
from vtc.plan import explain


class ChatError(VTCError, ValueError):
    """A model that cannot answer questions, or a question that it does not accept."""


def load(
    name: str, method: Method, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Any, Callable[[], Any]]:
    """The processor of tiny_qwen, tiny_llava, a folder or a model of the Hub, and a function that loads the model
    (which takes long).

    Raises:
        UnsupportedModelError: `method` cannot reduce this model, according to its configuration.
        ChatError: there is no such model, it is not a multimodal LLM, or part of it is missing.
    """
    place = _device(device)
    config = find_config(name, download=True, trust_remote_code=trust_remote_code)
    if config is None:
        raise ChatError(
            f"{name}: no multimodal LLM, so it answers no prompt; give the folder or the id of one, such as LLaVA or "
            "Qwen2.5-VL"
        )
    if not trust_remote_code:  # otherwise only its own code knows
        plan = explain(sketch(config), method)
        if not plan.ok:
            raise UnsupportedModelError(f"{name}: {plan}")
    if name in tiny.TINY:
        small, processor = getattr(checkpoints, name)()
        small = small if dtype == "auto" else small.to(getattr(torch, dtype))
        return processor, lambda: small.to(place)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = name.removeprefix("hf:")
    with _says(f"{path}: its processor cannot be loaded"), _silent():
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    for part, file in (("image_processor", "preprocessor_config.json"), ("tokenizer", "tokenizer.json")):
        if getattr(processor, part, None) is None:
            raise ChatError(
                f"{path}: its processor ({type(processor).__name__}) has no {part.replace('_', ' ')}; the folder needs "
                f"processor_config.json or {file}, as `processor.save_pretrained` writes them"
            )

    def model() -> Any:
        with _says(f"{path}: its weights cannot be loaded"), _silent():
            found = AutoModelForImageTextToText.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
            )
        return found.eval().to(place)

    return processor, model


def build_inputs(processor: Any, images: Sequence[Image.Image], prompt: str) -> dict[str, Tensor]:
    """The model's inputs for a prompt about images, in the processor's format: by its chat template if it has one,
    otherwise with a placeholder for every image at the start.

    Raises:
        ChatError: the placeholders in the prompt do not match the images, or the processor fails.
    """
    token = next((t for name in ("boi_token", "image_token") if (t := getattr(processor, name, None))), None)
    token = getattr(token, "content", token)
    marks = "" if token is None else token * len(images) + "\n"
    if token is not None and token in prompt:  # the user has placed the images
        marks = ""
    tokenizer = processor.tokenizer
    with _says("the processor's chat template fails"):
        if getattr(processor, "chat_template", None):
            content: Any = [{"type": "image"} for _ in images if marks or token is None]
            content = [*content, {"type": "text", "text": prompt}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        elif token is None:
            raise ChatError(
                "the processor has no chat template and names no image token, so nobody knows how it wants its "
                "prompts: save it with a chat template (processor.chat_template = ...)"
            )
        elif getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": marks + prompt}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        else:
            text = marks + prompt
    if token is not None and text.count(token) != len(images):
        raise ChatError(
            f"the prompt has {text.count(token)} image placeholder{'s' * (text.count(token) != 1)} ({token}), but "
            f"{len(images)} image{'s are' if len(images) != 1 else ' is'} given: leave the placeholders out of the "
            "prompt, or write one for each image"
        )
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    with _says("the processor cannot turn the prompt and the images into tokens"):
        return dict(processor(images=list(images), text=text, return_tensors="pt", add_special_tokens=not begins))


def prepared(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs on the model's device, pixels in its dtype."""
    weights = next(model.parameters())
    return {k: v.to(weights.device, weights.dtype if v.is_floating_point() else None) for k, v in inputs.items()}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # unknown device names, missing drivers
        raise OptionError(f"device {name!r} cannot be used here ({first_line(error)}); cpu always can") from error
    return device


@contextmanager
def _silent() -> Iterator[None]:
    """Silences warnings and the progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _says(what: str) -> Iterator[None]:
    """Turns other libraries' errors into one sentence."""
    try:
        yield
    except (VTCError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise ChatError(f"{what} ({first_line(error)})") from error
