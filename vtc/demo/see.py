"""The tab *See*: a photograph through a real encoder, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import gradio as gr
import torch
from PIL import Image, ImageOps
from torch import Tensor

import vtc
from vtc import ops, scores
from vtc.bench import photo
from vtc.bench.timing import Tick, shared_copy
from vtc.checkpoints import SaliencyModel, dinov2_saliency
from vtc.demo import look
from vtc.errors import OptionError
from vtc.methods import Method, budgeted, make
from vtc.models.images import example_photo, load_image, preprocess
from vtc.token_map import TokenMap
from vtc.viz import heatmap, overlay

GRID = 16  # patches per side
REPEATS = 3
SCHEDULES = {  # name: (option, label, what the slider takes)
    "Each layer": ("keep", "Kept by each layer", (0.5, 1.0, 0.9, 0.01)),
    "Tokens": ("tokens", "Image tokens at the end", (8, GRID * GRID, 64, 1)),
    "Arithmetic": ("flops", "Arithmetic that remains", (0.1, 1.0, 0.5, 0.01)),
}
HEATS = ("Energy", "Norm")  # computed for every patch, in the dense encoder


@dataclass(frozen=True, eq=False)
class PlacedTokens:
    """The results for one photograph, on the CPU. `maps[l]`: from image tokens to those after l layers;
    `heats[name][l]`: heat map [rows, columns] of the dense encoder there."""

    crop: Image.Image
    found: photo.PhotoComparison
    maps: tuple[TokenMap, ...]
    heats: dict[str, Tensor]


@cache
def encoder() -> SaliencyModel:
    return dinov2_saliency()


@cache
def methods() -> tuple[str, ...]:
    """The methods that work in the encoder according to `vtc.explain`."""
    return tuple(name for name in vtc.list_methods() if vtc.explain(encoder(), name).ok)


def budget(name: str, schedule: str, value: float) -> Method:
    """A method from the values of the controls; one without a budget (pixelprune) leaves them aside.

    Raises:
        OptionError: an unknown method or schedule, or a value that fits neither.
    """
    if schedule not in SCHEDULES:
        raise OptionError(f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    option = SCHEDULES[schedule][0]
    if not budgeted(name):
        return make(name)
    return make(name, **({"keep": int(value)} if option == "tokens" else {option: float(value)}))


def run(image: Image.Image, method: Method, repeats: int = REPEATS, *, tick: Tick | None = None) -> PlacedTokens:
    """One photograph, dense and compressed: groups and heat after every layer, both saliency maps, tokens and times.

    Raises:
        UnsupportedModelError, OptionError: the method or its budget does not fit the encoder.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = encoder().to(device)
    pixels = preprocess(image, 14 * GRID).to(device)
    found = photo.compare(model, pixels, method, repeats, tick=tick)
    small = shared_copy(model.backbone)
    with vtc.compress(small, method) as handle, torch.inference_mode():
        small(pixels)
        after = [TokenMap.identity(1, GRID * GRID), *map(_cpu, handle.layer_maps)]
        states = model.backbone(pixels, output_hidden_states=True).hidden_states
        prefix = states[0].shape[1] - GRID * GRID
        patches = torch.cat(states)[:, prefix:].cpu()
    counts = [found.report.before[0], *(int(tokens) - prefix for _, tokens in found.report.tokens)]
    maps = tuple(next(m for m in after if m.slots == count) for count in counts)
    heats = {"Energy": ops.energy(ops.normalize(patches), "nearest", 0.0), "Norm": scores.norm(patches)}
    crop = ImageOps.fit(image, (32 * GRID, 32 * GRID))
    dense, less = (each.cpu() for each in found.saliency)
    found = replace(found, token_map=maps[-1], saliency=(dense, less))
    return PlacedTokens(crop, found, maps, {name: heat.view(-1, GRID, GRID) for name, heat in heats.items()})


def layer(seen: PlacedTokens, number: int, heat: str) -> tuple[Image.Image, Image.Image]:
    """The groups after `number` layers, and the heat map there."""
    values = seen.heats[heat][number]
    low, high = values.min(), values.max()
    return overlay(seen.crop, seen.maps[number], (GRID, GRID)), heatmap(seen.crop, (values - low) / (high - low + 1e-9))


def figures(seen: PlacedTokens) -> str:
    """The numbers, as HTML."""
    found, report = seen.found, seen.found.report
    before, after, giga = report.before[0], report.after[0], 1e9
    dense, less = found.seconds
    return look.tiles(
        [
            ("Image tokens", f"{before} → {after}", f"{report.kept:.0%} at the encoder's end"),
            (
                "Multiply-adds",
                f"{report.macs_before / giga:.2f} → {report.macs_after / giga:.2f} bn",
                f"{report.macs_ratio:.0%} remain",
            ),
            (
                "Encoder, wall time",
                f"{1e3 * dense:.0f} → {1e3 * less:.0f} ms",
                f"{found.speedup:.2f} × as fast, median of {REPEATS}",
            ),
            (
                "Near the dense features",
                f"{found.cosine_cls:.3f}",
                f"cosine of CLS; patches {found.cosine_patches:.3f}",
            ),
        ]
    )


def tokens_chart(seen: PlacedTokens) -> str:
    """Tokens after every layer, as HTML."""
    name = type(seen.found.method).__name__
    rows = [
        {"layer": number, "tokens": tokens, "by": by}
        for by, counts in (("dense", [GRID * GRID] * len(seen.maps)), (name, [m.slots for m in seen.maps]))
        for number, tokens in enumerate(counts)
    ]
    return look.chart("Image tokens after each layer", rows, "layer", "tokens", "by", {"tokens": "image tokens"})


def _cpu(token_map: TokenMap) -> TokenMap:
    return TokenMap(token_map.group.cpu(), token_map.anchor.cpu(), token_map.size.cpu())


# -- the tab --------------------------------------------------------------------------------------------------------


def build(gpu: Callable[..., Any]) -> dict[str, Any]:
    """Put the tab on the page; returns what to run when the page is opened."""
    example, about = load_image(example_photo()), look.summaries()
    image, kept = gr.State(example, time_to_live=3600), gr.State(time_to_live=3600)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            shown = gr.Image(example, label="Photograph", interactive=False, buttons=[], height=250, format="jpeg")
            with gr.Row():
                upload = gr.UploadButton("Upload", file_types=["image"], size="sm", min_width=100, elem_id="see-upload")
                again = gr.Button("Example", size="sm", min_width=100)
            name = gr.Dropdown(
                list(methods()), value="pitome", label="Method", info=about["pitome"], elem_id="see-method"
            )
            schedule = gr.Radio(
                list(SCHEDULES), value="Arithmetic", label="Budget", info="Whatever it counts is what stays."
            )
            sliders = [
                gr.Slider(
                    low, high, value, step=step, label=label, visible=key == "Arithmetic", elem_id=f"see-{option}"
                )
                for key, (option, label, (low, high, value, step)) in SCHEDULES.items()
            ]
            start = gr.Button("Run", variant="primary", elem_id="see-run")
        with gr.Column(scale=5, min_width=300):
            numbers = gr.HTML(look.hint("One moment: the encoder is being loaded."), elem_id="see-numbers")
            with gr.Row():
                depth = encoder().backbone.config.num_hidden_layers
                number = gr.Slider(
                    0, depth, depth, step=1, label="Layer", info="0 is the input.", min_width=260, elem_id="see-layer"
                )
                heat = gr.Radio(
                    list(HEATS),
                    value="Energy",
                    label="Heat map",
                    info="Energy: how like the nearest other patch. Norm: how strong.",
                    min_width=260,
                )
            pictures: dict[str, Any] = {
                "format": "png",
                "interactive": False,
                "buttons": ["fullscreen"],
                "min_width": 260,
            }
            with gr.Row():
                groups = gr.Image(label="Groups", elem_id="see-groups", **pictures)
                warmth = gr.Image(label="Heat map", elem_id="see-heat", **pictures)
            with gr.Row():
                dense = gr.Image(label="Saliency, dense", **pictures)
                less = gr.Image(label="Saliency, compressed", **pictures)
            tokens = gr.HTML()

    def take(path: str) -> tuple[Image.Image, Image.Image]:
        with look.plainly():
            taken = look.picture(path)
        return taken, taken

    def drawn(seen: PlacedTokens, at: float, kind: str) -> list[Any]:
        pair = layer(seen, int(at), kind)
        count = seen.maps[int(at)].slots
        where = f"After {int(at)} layer{'s' * (at != 1)}: {count} tokens"
        return [
            gr.update(value=pair[0], label=where),
            gr.update(value=pair[1], label=f"{kind} of what comes out there"),
        ]

    def go(
        taken: Image.Image,
        method: str,
        plan: str,
        keep: float,
        tokens: float,
        flops: float,
        at: float,
        kind: str,
        progress: gr.Progress = look.PROGRESS,
    ) -> list[Any]:
        value = {"keep": keep, "tokens": tokens, "flops": flops}[SCHEDULES[plan][0]]
        with look.plainly():
            seen = run(taken, budget(method, plan, value), tick=look.ticks(progress, 2 * (REPEATS + 1)))
        maps = [heatmap(seen.crop, each) for each in seen.found.saliency]
        less = gr.update(value=maps[1], label=f"Saliency, compressed: correlation {seen.found.correlation:.3f}")
        return [seen, figures(seen), *drawn(seen, at, kind), maps[0], less, tokens_chart(seen)]

    def turn(seen: PlacedTokens | None, at: float, kind: str) -> list[Any]:
        return [gr.skip(), gr.skip()] if seen is None else drawn(seen, at, kind)

    private: dict[str, Any] = {"api_visibility": "private"}
    upload.upload(take, upload, [image, shown], show_progress="hidden", **private)
    again.click(lambda: (example, example), None, [image, shown], **private)
    schedule.change(
        lambda plan: [gr.update(visible=key == plan) for key in SCHEDULES],
        schedule,
        sliders,
        show_progress="hidden",
        **private,
    )
    name.change(lambda chosen: gr.update(info=about[chosen]), name, name, show_progress="hidden", **private)
    for control in (number, heat):
        control.change(
            turn, [kept, number, heat], [groups, warmth], show_progress="hidden", trigger_mode="always_last", **private
        )
    job: dict[str, Any] = {
        "fn": gpu(go),
        "inputs": [image, name, schedule, *sliders, number, heat],
        "outputs": [kept, numbers, groups, warmth, dense, less, tokens],
        "concurrency_id": "model",
        "show_progress_on": numbers,
        **private,
    }
    start.click(**job)
    return job
