"""Small random models that vLLM can load, with processors, and what they answer in Transformers with vtc."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mllm_processor
import mllm_zoo as zoo
import torch

import vtc

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava")
IMAGES = {"qwen2_vl": "qwen", "qwen2_5_vl": "qwen", "qwen3_vl": "qwen", "llava": "llava"}
SIZES = {"wide": (192, 64), "tall": (64, 192), "square": (128, 128)}  # pixels; a token of a Qwen has 16 x 16
STEPS = 6


def processor(name: str) -> Any:
    if name == "llava":
        made = mllm_processor.llava()
        side = {"height": 96, "width": 96}  # 144 tokens
        made.image_processor.size, made.image_processor.crop_size = {"shortest_edge": 96}, side
        return made
    made = mllm_processor.qwen()
    if name != "qwen2_5_vl":
        import transformers

        kind = transformers.Qwen3VLProcessor if name == "qwen3_vl" else transformers.Qwen2VLProcessor
        video = made.video_processor
        if name == "qwen3_vl":
            video = transformers.Qwen3VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2)
        made = kind(made.image_processor, made.tokenizer, video, chat_template=made.chat_template)
    made.image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}
    return made


def save(name: str, folder: Path) -> str:
    """A random model with heads of the width 32, which is the least that vLLM's attention takes."""
    import transformers

    config = zoo.FAMILIES[name].config()
    text = config.text_config
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 1, 32
    if IMAGES[name] == "qwen":
        more = {"mrope_interleaved": True} if name == "qwen3_vl" else {}
        text.rope_parameters = zoo._rope(8, 4, 4, **more)
    else:
        config.vision_config.image_size, config.image_seq_length = 96, 144
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    zoo.randomise(model)
    model.save_pretrained(folder)
    processor(name).save_pretrained(folder)
    return str(folder)


def prompt(name: str, images: int, words: str = "what is this w7 w9 ?") -> str:
    mark = {"qwen": "<|vision_start|> <|image_pad|> <|vision_end|>", "llava": "<image>"}[IMAGES[name]]
    return " ".join(["user", *[mark] * images, words, "bot"])


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

    def answer(self, case: tuple[str, list[Any]], method: Any = None) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and the log-probabilities [steps, vocabulary] of each."""
        words, pictures = case
        inputs = self.processor(text=words, images=pictures or None, return_tensors="pt")
        handle = None if method is None else vtc.compress(self.model, method)
        try:
            with torch.no_grad():
                out = self.model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=STEPS,
                    min_new_tokens=STEPS,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
        finally:
            if handle is not None:
                handle.remove()
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens, torch.cat(out.logits).log_softmax(-1)
