#!/usr/bin/env python3
"""Is a SAM-sized encoder faster with CubistMerge on one CPU core? `python benchmarks/cubist.py > FILE`.

timm's samvit_base_patch16 (width 768, windows of 14, decomposed relative positions) with random weights and fewer
layers, dense and compressed in turns. Times are of the process's own CPU, so that neighbours on the machine count
little.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import defaultdict
from typing import Any

import timm
import torch

import vtc
from vtc.methods import Tokens


def measure(side: int, depth: int, whole: list[int], ways: list[dict[str, Any]], repeats: int) -> None:
    model = timm.create_model(
        "samvit_base_patch16", img_size=side, depth=depth, global_attn_indexes=whole, num_classes=0
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    model.eval()
    image, grid = torch.randn(1, 3, side, side), (side // 16, side // 16)
    dense: list[float] = []
    seconds: dict[int, list[float]] = defaultdict(list)
    said = {}
    with torch.inference_mode():
        model(image)
        for _ in range(repeats):
            dense.append(timed(lambda: model(image)))
            for number, way in enumerate(ways):
                with vtc.compress(model, "cubist_merge", **way) as handle:
                    seconds[number].append(timed(lambda: model(image)))
                    said[number] = handle.report
        x, method = torch.randn(1, grid[0] * grid[1], 768), vtc.CubistMerge(**ways[-1])
        alone = [timed(lambda: method.decide(Tokens(x, grid=(grid,)), 0).largest(x)) for _ in range(5)]
    print(
        f"{side} pixels, {grid[0]}x{grid[1]} tokens, {depth} layers, global {whole}: "
        f"dense {statistics.median(dense):.2f} s; deciding and merging {1e3 * statistics.median(alone):.0f} ms"
    )
    for number, way in enumerate(ways):
        faster = [a / b for a, b in zip(dense, seconds[number], strict=True)]
        few = vtc.CubistMerge(**way).coarse(grid)
        print(
            f"  {', '.join(f'{k}={v}' for k, v in way.items())}: {few[0]}x{few[1]} tokens, "
            f"{said[number].macs_ratio:.0%} of the MACs, {statistics.median(seconds[number]):.2f} s, "
            f"{statistics.median(faster):.2f} times as fast ({min(faster):.2f}-{max(faster):.2f})",
            flush=True,
        )


def timed(call: Any) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {platform.machine()}, one thread, batch 1, layer=1")
    measure(384, 6, [2, 5], [{"keep": 0.7}, {"keep": 0.5}, {"keep": 0.35}], 7)
    measure(512, 6, [2, 5], [{"keep": 0.9}, {"keep": 784}, {"keep": 0.5}], 7)
    measure(1024, 4, [3], [{"rows": 8, "columns": 8}, {"rows": 22, "columns": 22}], 4)
