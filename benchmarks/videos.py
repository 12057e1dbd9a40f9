#!/usr/bin/env python3
"""How long the methods for videos decide about 64 frames of 196 tokens of width 896, a quarter of which stays. Writes
benchmarks/results/videos-cpu.txt: ``.venv/bin/python benchmarks/videos.py``.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch

from vtc.bench.environment import environment
from vtc.methods import Tokens, make

FRAMES, PLACES, WIDTH, RUNS = 64, 196, 896, 11


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(8, 1, PLACES, WIDTH, generator=generator).expand(8, FRAMES // 8, PLACES, WIDTH)
    x = scenes + 0.3 * torch.randn(scenes.shape, generator=generator)
    x, attention = x.reshape(1, -1, WIDTH), torch.rand(1, FRAMES * PLACES, generator=generator)
    tokens = Tokens(x, attention=attention, frames=((PLACES,) * FRAMES,))
    lines = [f"{environment()}; {torch.get_num_threads()} threads; seconds, median of {RUNS}"]
    for name in ("evs", "vidcom2", "flashvid"):
        method = make(name, keep=0.25)
        gone = FRAMES * PLACES - method.kept_of_video((PLACES,) * FRAMES)
        times = []
        for _ in range(RUNS):
            start = time.perf_counter()
            _ = method.decide(tokens, gone).anchor
            times.append(time.perf_counter() - start)
        lines.append(f"{name:10} {median(times):.3f}")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    (Path(__file__).parent / "results" / "videos-cpu.txt").write_text(text)


if __name__ == "__main__":
    main()
