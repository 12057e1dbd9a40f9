"""Small random models that vLLM can load, with processors, and what they answer in Transformers with vtc."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mllm_processor
import mllm_zoo as zoo
import torch
from mllm_classes import CLASSES
from safetensors.torch import load_file, save_file

import vtc
from vtc.adapters.multimodal.rotary import Positions

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava")  # every method
MORE = ("qwen3_vl_moe", "glm4v", "internvl")  # and one method each
COUNTED = ("llava", "internvl")  # positions on one axis
MARKS = dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "tiny_qwen"), "<|vision_start|> <|image_pad|> <|vision_end|>"
)
MARKS |= {"llava": "<image>", "glm4v": "<|begin_of_image|> <|image|> <|end_of_image|>", "internvl": "<IMG_CONTEXT>"}
AS_ON_THE_HUB = {  # vLLM knows the weights as they are there, and not as Transformers 5 saves them
    "llava": lambda name, x: (name.replace("vision_tower.", "vision_tower.vision_model."), x),
    "qwen3_vl_moe": lambda name, x: (name, x.transpose(1, 2).contiguous() if "mlp.experts." in name else x),
}
SIZES = {"wide": (192, 64), "tall": (64, 192), "square": (128, 128)}  # pixels; a token of a Qwen has 16 x 16
STEPS = 6
SMALL_IMAGES = {"mm_processor_kwargs": {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}}}  # 64 tokens


def processor(name: str) -> Any:
    if name == "llava":
        made = mllm_processor.llava()
        side = {"height": 96, "width": 96}  # 144 tokens
        made.image_processor.size, made.image_processor.crop_size = {"shortest_edge": 96}, side
        return made
    import transformers

    made = mllm_processor.qwen()
    parts = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    if name == "internvl":
        words = mllm_processor.tokenizer(["<IMG_CONTEXT>", "<video>", "<img>", "</img>"])
        named = {"start_image_token": "<img>", "end_image_token": "</img>"}
        named |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
        words._set_model_specific_special_tokens(named)
        return transformers.InternVLProcessor(
            transformers.GotOcr2ImageProcessor(
                size={"height": 48, "width": 48}, crop_to_patches=True, min_patches=1, max_patches=4
            ),
            words,
            transformers.InternVLVideoProcessor(size={"height": 48, "width": 48}),
            image_seq_length=9,
        )
    if name == "glm4v":
        marks = ("image|", "video|", "begin_of_image|", "end_of_image|", "begin_of_video|", "end_of_video|")
        words = mllm_processor.tokenizer([f"<|{mark}>" for mark in marks])
        pictures, video = transformers.Glm4vImageProcessor(**parts), transformers.Glm4vVideoProcessor(**parts)
        made = transformers.Glm4vProcessor(pictures, words, video)
    elif name.startswith("qwen3_vl"):
        video = transformers.Qwen3VLVideoProcessor(**parts)
        made = transformers.Qwen3VLProcessor(made.image_processor, made.tokenizer, video)
    elif name == "qwen2_vl":
        made = transformers.Qwen2VLProcessor(made.image_processor, made.tokenizer, made.video_processor)
    made.image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}
    return made


def save(name: str, folder: Path) -> str:
    """A random model with heads of the width 32, which is the least that vLLM's attention takes."""
    import transformers

    config = (zoo.FAMILIES | CLASSES)[name].config()
    text = config.text_config
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 1, 32
    if name == "glm4v":
        text.hidden_size = config.vision_config.out_hidden_size = 128  # heads of 64, of which half turns
        text.head_dim, text.rope_parameters = 64, zoo._rope(8, 4, 4, partial_rotary_factor=0.5)
        text.attention_bias = True  # which real configurations have
    elif name not in COUNTED:
        more = {"mrope_interleaved": True} if name.startswith("qwen3_vl") else {}
        text.rope_parameters = zoo._rope(8, 4, 4, **more)
    else:
        config.vision_config.image_size, config.image_seq_length = 96, 144
    if name == "internvl":
        config.vision_config.image_size, config.vision_config.patch_size = [48, 48], [8, 8]
    if name == "qwen3_vl_moe":
        text.norm_topk_prob = True  # which real configurations have
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    zoo.randomise(model)
    model.save_pretrained(folder)
    if name in AS_ON_THE_HUB:
        path = folder / "model.safetensors"
        save_file(dict(AS_ON_THE_HUB[name](*each) for each in load_file(path).items()), path, {"format": "pt"})
    processor(name).save_pretrained(folder)
    return str(folder)


def prompt(name: str, images: int) -> str:
    if name == "tiny_qwen":
        return " ".join(["<user>", *[MARKS[name]] * images, "what shape is the yellow thing ? <bot>"])
    return " ".join(["user", *[MARKS[name]] * images, "what is this w7 w9 ? bot"])


def cases(name: str) -> dict[str, tuple[str, list[Any]]]:
    """Prompt and pictures of every case."""
    found = {
        kind: (prompt(name, 1), [mllm_processor.picture(i, *size)]) for i, (kind, size) in enumerate(SIZES.items())
    }
    two = [mllm_processor.picture(5, *SIZES["wide"]), mllm_processor.picture(6, *SIZES["tall"])]
    return {**found, "two images": (prompt(name, 2), two), "text only": (prompt(name, 0), [])}


class Reference:
    """The model in Transformers, with vtc."""

    def __init__(self, folder: str) -> None:
        import transformers

        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)

    def answer(
        self, case: tuple[str, list[Any]], method: Any = None, compact: bool = False, steps: int = STEPS
    ) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and the log-probabilities [steps, vocabulary] of each. compact: at positions without gaps,
        which are the model's own for the shorter prompt."""
        words, pictures = case
        inputs = self.processor(text=words, images=pictures or None, return_tensors="pt")
        if method is None or not pictures:
            return self.generated(inputs, steps)
        gaps = patch.object(Positions, "taken", lambda *args: None) if compact else nullcontext()
        with vtc.compress(self.model, method), gaps:
            return self.generated(inputs, steps)

    def generated(self, inputs: Any, steps: int) -> tuple[list[int], torch.Tensor]:
        with torch.no_grad():
            out = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=steps,
                min_new_tokens=steps,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.sequences[0, -steps:].tolist(), torch.cat(out.logits).log_softmax(-1)


def drawn(seed: int, side: int = 256) -> Any:
    """A picture of four flat shapes on a flat ground, as in `vtc.eval.scenes`: many of its patches are alike."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (side, side), "white")
    pen, draw = ImageDraw.Draw(picture), torch.Generator().manual_seed(seed)
    for i, colour in enumerate(("red", "green", "blue", "yellow")):
        x, y = torch.randint(0, side - 56, (2,), generator=draw).tolist()
        (pen.rectangle if i % 2 else pen.ellipse)((x, y, x + 40, y + 40), fill=colour)
    return picture
