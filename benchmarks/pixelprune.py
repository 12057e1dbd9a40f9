#!/usr/bin/env python3
"""What leaves before the tower of pages, drawings and a photograph; how much faster the tower is; what a small model
still answers. Writes benchmarks/results/pixelprune.md in some minutes: ``.venv/bin/python benchmarks/pixelprune.py``.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers
from PIL import Image

import vtc
from vtc.adapters.multimodal.families.base import IMAGE
from vtc.eval import answers, pages
from vtc.eval.asking import View, questions, replies
from vtc.eval.scenes import SIDE

LEVELS = (0.0, 1.5, 4.5, 8.5)  # in grey levels: between two, since a difference of a level is not exactly 1/255
FOOT = 28  # pixels of a token's side: two patches of 14


def processor() -> Any:
    return transformers.Qwen2VLImageProcessor(min_pixels=FOOT**2, max_pixels=10**8)


def pictures() -> Iterator[tuple[str, list[Image.Image]]]:
    drawn = [pages.page(number, (560, 784)).image for number in range(4)]
    photo = Image.open(Path(vtc.__file__).parent / "assets" / "photo.jpg").convert("RGB")
    yield "pages, 560x784 as drawn", drawn
    yield "the same pages, 550x770: resampled by the processor", [x.resize((550, 770)) for x in drawn]
    big = [pages.page(number, (1120, 1568)).image for number in range(2)]
    yield "pages, 1120x1568 as drawn", big
    yield "the same pages, after JPEG (quality 90)", [jpeg(x) for x in big]
    yield "the bundled photograph, as it is", [photo]
    whole = photo.resize((photo.width // FOOT * FOOT, photo.height // FOOT * FOOT))
    yield "the photograph at multiples of 28", [whole]


def jpeg(image: Image.Image) -> Image.Image:
    from io import BytesIO

    file = BytesIO()
    image.save(file, "JPEG", quality=90)
    return Image.open(file).convert("RGB")


def tower(kind: str) -> Any:
    """A model of random weights with a tower of 8 layers, 640 channels, and a decoder of one small layer."""
    torch.manual_seed(0)
    text = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
    vision = {"depth": 8, "num_heads": 10, "patch_size": 14, "spatial_merge_size": 2}
    if kind == "Qwen2VL":
        vision |= {"embed_dim": 640, "hidden_size": 64, "mlp_ratio": 4}
    else:
        vision |= {"hidden_size": 640, "intermediate_size": 2560, "out_hidden_size": 64}
    if kind == "Qwen2_5_VL":
        vision |= {"window_size": 112, "fullatt_block_indexes": [3, 7]}
    if kind == "Qwen3VL":
        vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [1]}
        text |= {"head_dim": 32}
    ids = {"image_token_id": 110, "video_token_id": 111, "vision_start_token_id": 112, "vision_end_token_id": 113}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **ids)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


def prompt(image: Image.Image) -> dict[str, Any]:
    inputs = dict(processor()(images=[image], return_tensors="pt"))
    ids = [112, *[110] * (len(inputs["pixel_values"]) // 4), 113, 5, 6]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 110).long()
    return inputs


def shares() -> list[str]:
    model, lines = tower("Qwen2VL"), []
    lines += ["| pictures | tokens | " + " | ".join(f"tolerance {t:g}/255" for t in LEVELS) + " |"]
    lines += ["|---|---|" + "---|" * len(LEVELS)]
    for name, images in pictures():
        cells = []
        for level in LEVELS:
            kept = []
            with torch.no_grad(), vtc.compress(model, "pixelprune", tolerance=level / 255) as handle:
                encoders = handle.patches[0].encoders
                for image in images:
                    inputs = prompt(image)
                    encoders.entrance.begin(IMAGE, inputs)
                    kept.append(encoders.entrance.left.kept.float().mean())
            cells.append(f"{float(torch.stack(kept).mean()):.1%}")
        lines.append(f"| {name} | {int((inputs['input_ids'] == 110).sum())} | " + " | ".join(cells) + " |")
    return lines


def speed() -> list[str]:
    inputs = prompt(pages.page(0, (560, 784)).image)
    lines = ["| tower | tokens | MACs | dense | pruned | faster |", "|---|---|---|---|---|---|"]
    for kind in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL"):
        model, other = tower(kind), tower(kind)
        images = {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
        with torch.no_grad(), vtc.compress(other, "pixelprune") as handle:
            other(**inputs)
            report, times = handle.report, {False: [], True: []}
            for _ in range(5):
                for pruned, each in ((False, model), (True, other)):
                    start = time.perf_counter()
                    each.model.get_image_features(**images)
                    times[pruned].append(time.perf_counter() - start)
        dense, fast = median(times[False]), median(times[True])
        ratio = median(a / b for a, b in zip(times[False], times[True], strict=True))
        lines.append(
            f"| {kind} | {report.before[0]} to {report.after[0]} | {report.macs_ratio:.1%} | {dense:.2f} s | "
            f"{fast:.2f} s | {ratio:.1f} times |"
        )
    return lines


def answered(limit: int = 30, seeds: int = 1) -> list[str]:
    model, process = answers.load("tiny_qwen")
    lines = ["| method | tokens | correct |", "|---|---|---|"]
    ways: list[Any] = [None, *(vtc.PixelPrune(tolerance=level / 255) for level in LEVELS)]
    ways += [vtc.DivPrune(keep=0.25), vtc.DivPrune(keep=0.25, before=vtc.PixelPrune())]
    ways += [vtc.DivPrune(keep=0.5, before=vtc.PixelPrune())]
    sets = [questions(seed, limit, View(((SIDE, SIDE),), None, None, 1)) for seed in range(seeds)]
    for method in ways:
        right, tokens, whole = [], [], []
        handle = None if method is None else vtc.compress(model, method)
        for asked in sets:
            for start in range(0, len(asked), 16):
                some = asked[start : start + 16]
                said = list(replies(model, process, some, 16))
                right += [a == q.answer for a, q in zip(said, some, strict=True)]
                if handle is not None:
                    tokens += handle.report.after
                    whole += handle.report.before
        label = "dense" if method is None else method.name if not method.before else f"{method.name}+pixelprune"
        if method is not None:
            handle.remove()
            told = f"tolerance {255 * method.tolerance:g}/255" if method.name == "pixelprune" else f"keep {method.keep}"
            label += f", {told}"
        share = "100%" if method is None else f"{sum(tokens) / sum(whole):.1%}"
        lines.append(f"| {label} | {share} | {mean(right):.3f} |")
    return [f"{len(right)} questions about drawn scenes (no photographs behind them).", "", *lines]


def main() -> None:
    torch.set_num_threads(1)
    out = Path(__file__).parent / "results" / "pixelprune.md"
    where = f"{platform.machine()}, one thread, torch {torch.__version__}, transformers {transformers.__version__}"
    parts = []
    for title, measure in (
        ("Share of the tokens whose patches enter the tower", shares),
        ("Time of the tower on a drawn page of 560x784 (median of 5, random weights, 8 layers of 640)", speed),
        ("Answers of tiny_qwen", answered),
    ):
        parts.append((title, measure()))
        print("\n".join(parts[-1][1]), flush=True)
    text = "# PixelPrune, measured\n\n`benchmarks/pixelprune.py`; " + where + ".\n"
    out.write_text(text + "".join(f"\n## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in parts))


if __name__ == "__main__":
    main()
