"""Processors for the zoo's models, made by hand: a word-level tokenizer whose placeholders have the zoo's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mllm_zoo as zoo
import torch
from PIL import Image

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 100)), "what", "is", "this", "?", "user", "bot"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].replace('assistant', 'bot') }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}MARK\n{% else %}{{ c['text'] }}\n{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}bot\n{% endif %}"
)


def tokenizer(special: list[str]) -> Any:
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate([*WORDS, *(f"x{i}" for i in range(len(WORDS), zoo.IMAGE))])}
    inside = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inside.add_special_tokens([AddedToken(token, special=True) for token in special])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inside, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.padding_side = "left"
    assert made.convert_tokens_to_ids(special[0]) == zoo.IMAGE
    return made


def llava() -> Any:
    import transformers

    side = {"height": 40, "width": 40}
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=side, do_center_crop=True)
    return transformers.LlavaProcessor(
        pictures,
        tokenizer(["<image>"]),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("MARK", "<image>"),
    )


def qwen() -> Any:
    import transformers

    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    pictures = transformers.Qwen2VLImageProcessor(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)
    video = transformers.Qwen2VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2)
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    template = TEMPLATE.replace("MARK", "<|vision_start|> <|image_pad|> <|vision_end|>")
    return transformers.Qwen2_5_VLProcessor(pictures, tokenizer(marks), video, chat_template=template)


PROCESSORS = {"llava": llava, "qwen2_5_vl": qwen}


def save(name: str, folder: Path) -> str:
    """A model of the zoo with its processor, as a folder that commands take."""
    zoo.build(name).save_pretrained(folder)
    PROCESSORS[name]().save_pretrained(folder)
    return str(folder)


def picture(seed: int, width: int = 60, height: int = 48) -> Image.Image:
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed)).mul(255).byte()
    return Image.fromarray(noise.numpy())
