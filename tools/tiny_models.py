"""The two small multimodal LLMs that tools/train_tiny.py trains: their words, sizes and processors; weights drawn."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from vtc.eval import scenes

SPECIAL = ("<pad>", "<eos>", "<unk>", "<user>", "<bot>")
MARKS = {  # of pictures and clips, with the names that Transformers' processors know
    "qwen": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "llava": ("<vision>", "</vision>", "<image>", "<video>"),
}
WORDS = (
    "what which where when how many is are there the thing things digit digits colour shape "
    "left right top bottom middle of above yes no ? ."
)
LATER = "number in picture ,"  # words that came when the others had their numbers
TEMPLATE = (
    "{% set seen = namespace(all=0, now=0) %}{% for m in messages %}{% if m['content'] is not string %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{% set seen.all = seen.all + 1 %}{% endfor %}"
    "{% endif %}{% endfor %}"  # several pictures are numbered, as Qwen's own template can do it
    "{% for m in messages %}{{ '<bot> ' if m['role'] == 'assistant' else '<user> ' }}"
    "{% if m['content'] is string %}{{ m['content'] }} {% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{% set seen.now = seen.now + 1 %}"
    "{{ 'picture %d ' % seen.now if seen.all > 1 else '' }}IMAGE "
    "{% elif c['type'] == 'video' %}VIDEO {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{{ '<eos> ' if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ '<bot> ' if add_generation_prompt else '' }}"
)
GRID = 16  # image tokens across and down: of DINOv2 always, of the Qwen for a picture of 256 pixels
PICTURE = (128**2, 448**2)  # pixels of a picture, at least and at most; others are resized
FRAME = (96**2, 192**2)  # of a clip's frame
TEXT = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
TEXT |= {"initializer_range": 0.05}


def seal(folder: Path) -> None:
    """Write the checksums that `vtc.checkpoints` checks, of every file that is shipped."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".jinja", ".safetensors")]
    files = [path for path in files if path.stem not in ("state", "SHA256")]
    sums = {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    (folder / "SHA256.json").write_text(json.dumps(sums, indent=1))


def vocabulary(name: str) -> dict[str, int]:
    """The number of every word."""
    known = (
        *SPECIAL,
        *MARKS[name],
        *WORDS.split(),
        *scenes.COLOURS,
        *scenes.SHAPES,
        *scenes.PLURAL.values(),
        *scenes.DIGITS,
        *scenes.TIMES,
        *LATER.split(),
    )
    return {word: i for i, word in enumerate(dict.fromkeys(known))}


def tokenizer(name: str) -> Any:
    """One token per word and per numeral, without regard to case."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inside = Tokenizer(models.WordLevel(vocabulary(name), unk_token="<unk>"))
    inside.normalizer = normalizers.Lowercase()
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)]
    inside.pre_tokenizer = pre_tokenizers.Sequence(parts)
    inside.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *MARKS[name])])
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inside, padding_side="left", **named)


def text_config() -> dict[str, Any]:
    ids = vocabulary("qwen")
    return {**TEXT, "vocab_size": 128, "pad_token_id": ids["<pad>"], "eos_token_id": ids["<eos>"], "bos_token_id": None}


def qwen() -> tuple[nn.Module, Any]:
    """Patches of 8 pixels, 2 x 2 of them a token: a scene of 256 x 256 pixels is 16 x 16 tokens, a larger one more; two
    frames of a clip are one step of time. Sections of 8 pairs: PPE takes K = 8."""
    import transformers

    start, end, image, clip = MARKS["qwen"]
    ids = vocabulary("qwen")
    # The width has the last and slowest third of the rotary pairs: with a theta of 1e4 they turn by 0.03 rad at most
    # from the left of a picture to its right, which nothing can read; with 20 by 2
    rope = {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [8, 8, 8]}
    vision = {"depth": 4, "hidden_size": 96, "num_heads": 3, "intermediate_size": 256, "out_hidden_size": 192}
    vision |= {"patch_size": 8, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 64}
    # Windows alone: with full attention a tower learns where its tokens are, and no question needs positions any more
    vision |= {"fullatt_block_indexes": [], "tokens_per_second": 25}  # steps 2 apart
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text_config(), "rope_parameters": rope},
        vision_config=vision,
        vision_start_token_id=ids[start],
        vision_end_token_id=ids[end],
        image_token_id=ids[image],
        video_token_id=ids[clip],
        tie_word_embeddings=True,
    )
    parts = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    still, moving = ({"shortest_edge": least, "longest_edge": most} for least, most in (PICTURE, FRAME))
    pictures = transformers.Qwen2VLImageProcessor(**parts, size=still)
    video = transformers.Qwen2VLVideoProcessor(**parts, size=moving, cap_pixels_per_frame=False)
    words = tokenizer("qwen")
    template = TEMPLATE.replace("IMAGE", f"{start} {image} {end}").replace("VIDEO", f"{start} {clip} {end}")
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for p in model.model.visual.parameters():
        if p.ndim > 1:  # Transformers draws them so small that a tower this narrow says nothing for a long time
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model, transformers.Qwen2_5_VLProcessor(pictures, words, video, chat_template=template)


def llava() -> tuple[nn.Module, Any]:
    """The first half of the real DINOv2-S at 224 pixels, 16 x 16 tokens of 14; a projector of two layers; a Llama.

    Of small numerals a probe reads .77 in the sixth layer's patches and .37 in the last's; of all else as much.
    """
    import transformers

    from vtc.checkpoints import dinov2_small

    ids = vocabulary("llava")
    weights, whole = (tower := dinov2_small()).state_dict(), tower.config.to_dict()
    whole = {k: v for k, v in whole.items() if k not in ("stage_names", "out_features", "out_indices")}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            **text_config(), head_dim=48, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
        ),
        vision_config=transformers.Dinov2Config(**{**whole, "num_hidden_layers": 6}),
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    eyes = model.model.vision_tower
    eyes.load_state_dict({name: weights[name] for name in eyes.state_dict()})
    eyes.requires_grad_(False)
    pictures = transformers.BitImageProcessor(
        size={"height": 224, "width": 224},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return model, transformers.LlavaProcessor(
        pictures,
        tokenizer("llava"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
