#!/usr/bin/env python3
"""What leaves before the tower of pages, drawings and a photograph; how much faster the tower is; what a small model
still answers. Writes benchmarks/results/pixelprune.md in half an hour: ``.venv/bin/python benchmarks/pixelprune.py``.
"""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

import vtc
from vtc.adapters.multimodal.families.base import IMAGE
from vtc.checkpoints.tiny import tiny_colqwen
from vtc.eval import answers, corpus, pages, retrieval, scenes
from vtc.eval.asking import View, questions, shared_replies

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


def encoders() -> list[str]:
    """Plain encoders of random weights, on drawn pages of 512 x 512."""
    import timm

    small = timm.create_model("vit_small_patch16_224", img_size=512, num_classes=0).eval()
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=512, patch_size=16)
    sheets = [np.asarray(pages.page(number).image.convert("RGB"), np.float32) / 127.5 - 1 for number in range(8)]
    images = torch.tensor(np.stack(sheets)).permute(0, 3, 1, 2)
    lines = ["| encoder | pages | patches | MACs | dense | pruned | faster |", "|---|---|---|---|---|---|---|"]
    for name, model in (
        ("ViT-S/16 (timm)", small),
        ("DINOv2-S/16 (transformers)", transformers.Dinov2Model(config).eval()),
    ):
        other = copy.deepcopy(model)
        with torch.no_grad(), vtc.compress(other, "pixelprune") as handle:
            for some in (images[:1], images):
                other(some)
                report, times = handle.report, []
                for _ in range(5):
                    times.append(tuple(clocked(net, some) for net in (model, other)))
                dense, fast = (median(each) for each in zip(*times, strict=True))
                ratio = median(a / b for a, b in times)
                fewest, most = min(report.after), max(report.after)
                left = f"{fewest}" if fewest == most else f"{fewest} to {most}"
                lines.append(
                    f"| {name} | {len(some)} | {report.before[0]}, then {left} | {report.macs_ratio:.1%} "
                    f"| {dense:.2f} s | {fast:.2f} s | {ratio:.1f} times |"
                )
    return lines


def found(sheets: int = 160, queries: int = 500) -> list[str]:
    """Pages found again by three to five neighbouring words of theirs: a page's words must have been read."""
    model, process = tiny_colqwen()
    drawn = [pages.page(number) for number in range(sheets)]
    asked = pages.queries(drawn, queries)
    relevant, words = torch.tensor([query.page for query in asked]), retrieval.ask(model, process, asked)
    whole, seconds = retrieval.encode(model, process, drawn)
    dense = corpus.Corpus(whole, words, relevant)
    lines = ["| method | vectors a page | seconds | nDCG@5 | Spearman | top-5 overlap |", "|---|---|---|---|---|---|"]

    def row(name: str, vectors: Any, seconds: float) -> None:
        scores = corpus.maxsim(words, vectors)
        ranked = (
            corpus.ndcg(scores, relevant),
            corpus.spearman(dense.scores, scores),
            corpus.overlap(dense.scores, scores),
        )
        count = sum(map(len, vectors)) / len(vectors)
        lines.append(f"| {name} | {count:.0f} | {seconds:.1f} | " + " | ".join(f"{x:.3f}" for x in ranked) + " |")

    row("dense", whole, seconds)
    share = 0.5
    for level in LEVELS:
        with vtc.compress(model, "pixelprune", tolerance=level / 255):
            vectors, seconds = retrieval.encode(model, process, drawn)
        share = sum(map(len, vectors)) / sum(map(len, whole)) if not level else share
        row(f"pixelprune, tolerance {level:g}/255", vectors, seconds)
    for name in ("divprune", "random"):
        with vtc.compress(model, name, keep=round(share, 3)):
            row(f"{name}, keep {share:.3f}", *retrieval.encode(model, process, drawn))
    side = round(512 * share**0.5 / 16) * 16
    small = [replace(sheet, image=sheet.image.resize((side, side), Image.Resampling.BICUBIC)) for sheet in drawn]
    row(f"the page in {side}x{side}", *retrieval.encode(model, process, small))
    return [f"{sheets} drawn pages of 512x512, {len(asked)} queries of three to five neighbouring words.", "", *lines]


def answered(limit: int = 350, side: int = 384) -> list[str]:
    """Numbers read, places told and the rest, on one colour, on a drawn screen, and on uneven grounds."""
    model, process = answers.load("tiny_qwen")
    lines = [f"Drawn scenes of {side}x{side}, {side**2 // 256} tokens; {limit} pictures a ground."]
    for ground in (*scenes.FLAT, "plain"):
        level = scenes.Level(numbers=2, backgrounds=(ground,), kinds=scenes.EVERY)
        view = View(((side, side),), level=level)
        rows, (_, every) = [], measured(model, process, view, limit, None)
        rows.append(("dense", 1.0, every))
        for tolerance in LEVELS:
            answers_at = measured(model, process, view, limit, vtc.PixelPrune(tolerance=tolerance / 255))
            rows.append((f"pixelprune, tolerance {tolerance:g}/255", *answers_at))
        share = rows[1][1]  # at tolerance 0
        if share < 0.9:  # the same number of tokens in other ways
            for method in (vtc.DivPrune(keep=round(share, 3)), vtc.Random(keep=round(share, 3))):
                rows.append((f"{method.name}, keep {method.keep}", *measured(model, process, view, limit, method)))
            smaller = round(side * share**0.5 / 16) * 16
            shown = replace(view, resized=(smaller, smaller))
            _, right = measured(model, process, shown, limit, None)
            rows.append((f"the picture in {smaller}x{smaller}", (smaller / side) ** 2, right))
        for method in (vtc.DivPrune(keep=0.25), vtc.DivPrune(keep=0.25, before=vtc.PixelPrune())):
            behind = "+pixelprune" if method.before else ""
            share, right = measured(model, process, view, limit, method)
            rows.append((f"divprune{behind}, keep {method.keep}", share, right))
        kinds = {kind: [ok for k, ok in every if k == kind] for kind in ("reading", "digit", "position", "count")}
        lines += [
            "",
            f"**{ground}**: {len(every)} questions, " + ", ".join(f"{len(v)} {k}" for k, v in kinds.items()),
            "",
        ]
        lines += ["| method | tokens | all | " + " | ".join(kinds) + " |", "|---|---|---|" + "---|" * len(kinds)]
        for name, share, right in rows:
            each = [mean(ok for _, ok in right), *(mean(ok for k, ok in right if k == kind) for kind in kinds)]
            lines.append(f"| {name} | {share:.1%} | " + " | ".join(f"{x:.3f}" for x in each) + " |")
            print(lines[-1], flush=True)
    return lines


def measured(model: Any, process: Any, view: View, limit: int, method: Any) -> tuple[float, list[tuple[str, bool]]]:
    """The share of the tokens that the decoder got, and of every question its kind and whether the answer was right."""
    handle = None if method is None else vtc.compress(model, method)
    asked, right, tokens, whole = questions(0, limit, view), [], 0, 0
    groups = [list(group) for _, group in groupby(asked, key=lambda question: id(question.about))]
    for start in range(0, len(groups), 8):
        some = [question for group in groups[start : start + 8] for question in group]
        said = shared_replies(model, process, some, 8)
        right += [(q.kind, a == q.answer) for a, q in zip(said, some, strict=True)]
        if handle is not None:
            tokens, whole = tokens + sum(handle.report.after), whole + sum(handle.report.before)
        for group in groups[start : start + 8]:
            vars(group[0].about).pop("image", None)  # drawn again if it is asked again
    if handle is not None:
        handle.remove()
    return tokens / whole if whole else 1.0, right


def clocked(net: Any, images: Any) -> float:
    start = time.perf_counter()
    net(images)
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    out = Path(__file__).parent / "results" / "pixelprune.md"
    where = f"{platform.machine()}, one thread, torch {torch.__version__}, transformers {transformers.__version__}"
    parts = []
    for title, measure in (
        ("Share of the tokens whose patches enter the tower", shares),
        ("Time of the tower on a drawn page of 560x784 (median of 5, random weights, 8 layers of 640)", speed),
        ("Time of plain encoders on drawn pages (median of 5, random weights)", encoders),
        ("Pages found by their words, by the small ColQwen2", found),
        ("Answers of tiny_qwen", answered),
    ):
        parts.append((title, measure()))
        print("\n".join(parts[-1][1]), flush=True)
    text = "# PixelPrune, measured\n\n`benchmarks/pixelprune.py`; " + where + ".\n"
    out.write_text(text + "".join(f"\n## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in parts))


if __name__ == "__main__":
    main()
