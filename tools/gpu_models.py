"""What vtc brings whole models on a GPU, with random weights: tools/gpu_check.py asks it.

    python tools/gpu_models.py          # ViT-S, -B, -L at batch 1, 16, 64; decoders of 0.5 and 7 billion parameters
    python tools/gpu_models.py small    # a little of it on the processor, to see that it runs

Ratios are medians over rounds in which dense and compressed take turns. limit: the same model with its tokens cut
by plain slicing to the same counts. graph: both replayed as CUDA graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import vtc
from vtc.bench import interleave, measure, measure_prefill, methods_at
from vtc.models.configs import preset, sample

ENCODERS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
BATCHES = (1, 16, 64)
LLM_7B = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28}
LLM_7B |= {"num_key_value_heads": 4, "vocab_size": 152_064}
Row = dict[str, Any]


def encoders(device: str, names: tuple[str, ...], batches: tuple[int, ...], repeats: int) -> list[Row]:
    import timm

    rows = []
    for name in names:
        model = timm.create_model(name).eval().to(device, torch.bfloat16)
        for batch in batches:
            size = model.patch_embed.img_size
            images = torch.randn(batch, 3, *size, device=device, dtype=torch.bfloat16)
            methods = [vtc.ToMe(flops=0.5), vtc.PiToMe(flops=0.5)]
            for method, row in zip(methods, measure(model, images, methods, repeats), strict=True):
                found = {"dense_ms": 1e3 * row.dense_seconds, "realised": row.realised, "limit": row.limit}
                rows.append({"model": name, "batch": batch, "method": row.method, "ideal": row.ideal, **found})
                rows[-1]["graph"] = graphs(model, images, method, repeats) if device == "cuda" else None
                print(rows[-1], flush=True)
    return rows


def graphs(model: nn.Module, images: Tensor, method: vtc.Method, repeats: int) -> float:
    """How much faster the compressed model is where both are CUDA graphs."""
    calls: dict[str, Callable[[], Any]] = {"dense": captured(model, images)}
    with vtc.compress(model, method):
        calls["compressed"] = captured(model, images)
    took = interleave(calls, repeats)
    return median(d / c for d, c in zip(took["dense"], took["compressed"], strict=True))


def captured(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    """A call of the model as a CUDA graph."""
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(images)
    return graph.replay


def decoders(device: str, names: tuple[str, ...], repeats: int, shrink: int = 1) -> list[Row]:
    from transformers import AutoModelForImageTextToText

    rows = []
    for name in names:
        config = preset("qwen2.5-vl-0.5b", shrink)
        if name == "7b":
            for key, value in LLM_7B.items():
                setattr(config.text_config, key, value)
            config.text_config.layer_types = ["full_attention"] * LLM_7B["num_hidden_layers"]
            config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
            config.vision_config.out_hidden_size = LLM_7B["hidden_size"]
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                model = AutoModelForImageTextToText.from_config(config).eval()
        finally:
            torch.set_default_dtype(before)
        inputs = {
            key: value.to(device) for key, value in sample(config, 896 // shrink // 28 * 28).inputs(model).items()
        }
        methods = methods_at(["divprune", "idpruner", "tome", "random"], [0.25, 0.1])
        dense, found = measure_prefill(model, inputs, methods, repeats)
        for row in found:
            rows.append({"model": f"qwen2.5-vl, {name}", "method": row.method, "keep": row.keep, "ideal": row.ideal})
            times = {"dense_ms": 1e3 * dense.after_seconds, "realised": row.realised, "whole": row.whole}
            rows[-1] |= times | {"method_ms": 1e3 * row.method_seconds}
            print(rows[-1], flush=True)
        del model
    return rows


def tables(encoded: list[Row], decoded: list[Row]) -> str:
    """Both as Markdown."""

    def number(value: Any) -> str:
        return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    out = []
    for rows in (encoded, decoded):
        heads = list(rows[0])
        lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        out.append("\n".join(lines + ["| " + " | ".join(map(number, row.values())) + " |" for row in rows]))
    return "\n\n".join(out)


def main() -> None:
    if sys.argv[1:] == ["small"]:
        print(tables(encoders("cpu", ("vit_tiny_patch16_224",), (1,), 1), decoders("cpu", ("0.5b",), 1, shrink=8)))
    else:
        print(tables(encoders("cuda", ENCODERS, BATCHES, 15), decoders("cuda", ("0.5b", "7b"), 9)))


if __name__ == "__main__":
    main()
