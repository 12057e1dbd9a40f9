"""What a method is given at the place where it decides, and which place provides what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Projector = Callable[[Tensor], Tensor]

# Fields of `Tokens` that a method may name in `needs`, by where it decides.
GIVEN = {
    "encoder": frozenset({"layer_keys", "grid"}),
    "input": frozenset({"attention", "middle", "keys", "inputs", "pixels", "projector", "text", "grid", "frames"}),
    "decoder": frozenset({"prompt_attention", "decoder_keys", "decoder_text", "grid"}),
    "served": frozenset({"attention", "middle", "keys", "grid"}),
}
PLACES = {
    "encoder": "a layer of a vision encoder",
    "input": "the input of a multimodal LLM's decoder",
    "decoder": "a layer of a multimodal LLM's decoder",
    "served": "vLLM",
}
# Their names in messages.
FIELDS = {
    "attention": "the attention that each token received near the end of the vision tower",
    "middle": "the attention that each token received in the middle of the vision tower",
    "layer_keys": "the layer's attention keys",
    "keys": "the vision tower's attention keys",
    "inputs": "what the projector made the tokens from",
    "pixels": "the pixels that each token covers",
    "projector": "the projector",
    "text": "the embeddings of the prompt's text",
    "grid": "the rows and columns of each image's tokens",
    "frames": "the frames of each video",
    "prompt_attention": "the attention that each token receives from the prompt's last word",
    "decoder_keys": "the decoder's attention keys",
    "decoder_text": "the hidden states of the prompt's text",
}


@dataclass(frozen=True)
class Tokens:
    """What a method is given at the place where it decides.

    Attributes:
        features: [B, N, C], the tokens themselves.
        size: [B, N] float32, how many tokens each token already stands for; None = all 1.
        mask: [B, N] bool, True = real; None = all real.
        prefix: how many leading tokens (CLS, distillation, registers) are kept unmerged.
        grid: (rows, columns) of each image's patches, one per image, None for an image whose patches do not fill a
            rectangle; None = unknown.
        frames: only if `needs` names it: a unit is a whole video then, and this says how many tokens each of its frames
            has, in order; a picture is one frame.
        layer, depth: the layer at which the method decides, and the number of layers.
        said: a list that receives a sentence for everything that `decide` did differently from its options; None = not
            collected.

    All other fields are set only if the method's `needs` name them. In a layer of a vision encoder:

    Attributes:
        layer_keys: [B, N, D] that layer's attention keys, mean over heads; None if it has no attention. For a method
            with `each_head` it may be [B, N, H, D], all heads' keys as they lie in memory.

    At the input of a multimodal LLM's decoder, where `features` are the projected image tokens:

    Attributes:
        attention: [B, N] float32, the attention that each token received near the end of the vision tower: from the CLS
            token if there is one, else summed over all queries. Mean over heads.
        middle: [B, N] float32, the same in the middle of the tower.
        keys: [B, N, D] attention keys of the tower, near its end, the mean over heads.
        inputs: [B, N, P, V] float32, the projector's input for each token: P patches of width V.
        pixels: [B, N, V] float32, the values of the pixels that each token covers.
        hidden: [B, N, H], output of the projector's first linear map; None = not available.
        projector: [B, N, P, V] -> [B, N, C], the model's projector in float32.
        text: [B, T, C] embeddings of the prompt's text tokens; text_mask: [B, T] bool, True = real.
        rotary: [B, N, 2] float32, the mean cosine and the mean sine of the decoder's rotary table at each token; only
            if the method is `turned`.

    Between the decoder's layers, where `features` are hidden states:

    Attributes:
        prompt_attention: [B, N] float32, the attention that each image token receives from the prompt's last word.
        decoder_keys: [B, N, heads * width], attention keys, all heads side by side.
        decoder_text: [B, T, H] hidden states of the prompt's text tokens, by falling L1 norm of their keys; `text_mask`
            says which are real.
    """

    features: Tensor
    layer_keys: Tensor | None = None
    size: Tensor | None = None
    mask: Tensor | None = None
    prefix: int = 0
    grid: tuple[tuple[int, int] | None, ...] | None = None
    frames: tuple[tuple[int, ...], ...] | None = None
    layer: int = 0
    depth: int = 1
    attention: Tensor | None = None
    middle: Tensor | None = None
    keys: Tensor | None = None
    inputs: Tensor | None = None
    pixels: Tensor | None = None
    hidden: Tensor | None = None
    projector: Projector | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    rotary: Tensor | None = None
    prompt_attention: Tensor | None = None
    decoder_keys: Tensor | None = None
    decoder_text: Tensor | None = None
    said: list[str] | None = None

    @classmethod
    def of(cls, **given: Any) -> Tokens:
        """The same as calling the class, which sets its two dozen fields one by one, in every layer."""
        if torch.compiler.is_compiling():
            return cls(**given)
        self = object.__new__(cls)
        self.__dict__.update(given)  # what is not given is an attribute of the class: the default
        return self
