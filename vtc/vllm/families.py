"""The models of vLLM whose images are reduced: what of them is not the same for all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Architectures of vLLM that lay out image tokens alike.

    Attributes:
        name: as users know it.
        architectures: the names in a model's config.json.
        axes: of positions: 3 = M-RoPE, whose tokens keep their places; 1 = they are counted.
        tower: the attribute that encodes images. middle: depth of its "middle" layer, as in Transformers. prefix: its
            class tokens in front of the patches of an image. attends: whether that tower's attention is read.
        token: the number of its image token in its configuration.
        tiles: the field of an image that counts its tiles, each with a budget of its own; "" = it is one.
    """

    name: str
    architectures: tuple[str, ...]
    axes: int
    tower: str = "visual"
    middle: float = 0.5
    prefix: int = 0
    attends: bool = True
    token: str = "image_token_id"
    tiles: str = ""


FAMILIES = (
    Family("Qwen2-VL", ("Qwen2VLForConditionalGeneration",), 3),
    Family("Qwen2.5-VL", ("Qwen2_5_VLForConditionalGeneration",), 3),
    Family("Qwen3-VL", ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"), 3),
    Family("GLM-4.1V", ("Glm4vForConditionalGeneration",), 3),
    Family("LLaVA-1.5", ("LlavaForConditionalGeneration",), 1, "vision_tower", 0.375, 1, token="image_token_index"),
    Family(
        "InternVL",
        ("InternVLForConditionalGeneration",),
        1,
        "vision_tower",
        attends=False,
        tiles="image_num_patches",
    ),
)


SECTION = "mrope_section"  # what a configuration of three axes has
GAPS = "WithGaps"  # behind an architecture's name: at positions with gaps, where vLLM counts them on one axis
_LINEAR = "its linear attention runs in bfloat16 alone on processors, where vtc is checked"
_ROWS = "a word stands between the rows of its image tokens, and how many of a row stay is not known in time"
_CROPS = "its crops and the newlines between their rows are not laid out for vLLM yet"
NOT_SERVED = {  # and why, of those that one may look for
    "Gemma3ForConditionalGeneration": "its image tokens see each other, which vLLM does not let them on processors, "
    "where vtc is checked",
    "Qwen3_5ForConditionalGeneration": _LINEAR,
    "Qwen3_5MoeForConditionalGeneration": _LINEAR,
    "Mistral3ForConditionalGeneration": _ROWS,
    "PixtralForConditionalGeneration": _ROWS,
    "LlavaNextForConditionalGeneration": _CROPS,
    "LlavaOnevisionForConditionalGeneration": _CROPS,
    "InternVLChatModel": "it is checked in Transformers' own format, InternVLForConditionalGeneration",
}


def family(architecture: str) -> Family | None:
    """The family of an architecture; None = vtc does not serve it."""
    return next((each for each in FAMILIES if architecture in each.architectures), None)
