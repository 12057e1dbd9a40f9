"""The other classes that transformers lists for images and text, whole and without weights. All of them are refused."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

_OWN = "vtc finds no single list of layers"
_ENCODER = "this is a vision encoder alone"  # in front of layers that attend to it, or of queries
# What is said of each when a multimodal method is asked of it.
REFUSED = {
    "blip": "attend past transformers' interface",
    "blip-2": "holds its decoder in another model with a head of its own",
    "diffusion_gemma": "does not know what DiffusionGemmaModel does",
    "evolla": "holds no vision encoder",
    "florence2": "has an encoder of words in front of its decoder",
    "git": _ENCODER,
    "idefics": _ENCODER,
    "instructblip": "holds its decoder in another model with a head of its own",
    "instructblipvideo": _ENCODER,
    "kosmos-2": _ENCODER,
    "kosmos-2.5": _OWN,
    "llama4": "holds its decoder in another model with a head of its own",
    "mistral4": "holds no vision encoder",  # with a Pixtral tower it is a Mistral 3
    "mllama": _OWN,
    "pi0": "puts the image features into the embeddings itself",
    "pix2struct": _OWN,
    "pp_formulanet": "windows of a fixed grid",
    "t5gemma2": "has no decoder of layers",
    "udop": _OWN,
    "vision-encoder-decoder": _ENCODER,
}


def sketch(name: str) -> nn.Module:
    """The class of a model type by its default configuration, on "meta"."""
    if name == "vision-encoder-decoder":
        words = transformers.GPT2Config(add_cross_attention=True, is_decoder=True)
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(transformers.ViTConfig(), words)
    else:
        config = transformers.AutoConfig.for_model(name)
    if name == "diffusion_gemma":  # whose default has none
        config.get_text_config().update({"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64})
    with torch.device("meta"):
        return getattr(transformers, CLASSES[name])(config)
