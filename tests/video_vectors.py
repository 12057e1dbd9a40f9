"""The reference vectors of the methods for videos and pictures that came later (tests/video_vectors.json): their inputs
from the closed forms that the file gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

FILE = json.loads((Path(__file__).parent / "video_vectors.json").read_text())
DTYPES = (torch.float32, torch.float64)


def tok(n, d, a, b, c, e):
    i, j = np.arange(n)[:, None], np.arange(d)[None]
    return np.sin(a * i * (j + 1) + b * j) + e * np.cos(c * i * i + j)


def vid(frames, places, d, a, b, c, e, s, o=0.0):
    t, p, j = np.ogrid[:frames, :places, :d]
    return (
        o
        + np.sin(a * p * (j + 1) + b * j + 0.05 * t)
        + e * np.cos(c * p * p + j + 1.3 * np.floor(t / s))
        + 0.15 * np.sin(0.37 * t * (p + 1) + 0.9 * j)
    )


def att(frames, places, a, b):
    t, p = np.ogrid[:frames, :places]
    x = 1.1 + np.sin(a * p + b * t)
    return x / x.sum(1, keepdims=True)


def att1(n, a, b):
    i = np.arange(n)
    x = 1.1 + np.sin(a * i + b * i * i)
    return x / x.sum()


def pix(frames, high, wide, a, b, s):
    t, y, x, k = np.ogrid[:frames, :high, :wide, :3]
    blocks = np.floor(y / s) + 2.7 * np.floor(x / s) + 1
    return 127.5 + 100 * np.sin(a * y + b * x + k) + 20 * np.sin(0.21 * t * blocks)


def cells(high, wide, d, u, v, m, n=0.0):
    r, c, j = np.ogrid[:high, :wide, :d]
    flat = ((np.floor(r / u) * 5 + np.floor(c / v) * 3) % m + 0.1 * (j % 3)) / (m + 1)
    return (flat + n * np.sin(1.7 * r + 0.9 * c + j)).reshape(high * wide, d)


FORMULAS = {"tok": tok, "vid": vid, "att": att, "att1": att1, "pix": pix, "cells": cells}


def cases(*methods: str) -> list[dict]:
    found = [case for case in FILE["cases"] if case["method"] in methods]
    assert found, methods
    return found


def inputs(case: dict, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    made = (FORMULAS[name](*given) for name, *given in case["inputs"])
    return [torch.from_numpy(np.ascontiguousarray(x)).to(dtype) for x in made]
