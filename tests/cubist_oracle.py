"""CubistMerge written once more, with loops in numpy and float64, and how an encoder's own blocks run with it."""

import numpy as np
import torch


def line(x, r):
    """x [n, D] -> values [n - r, D], and the members of each, the kept one first."""
    n = len(x)
    r = min(r, n // 2)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    def cosine(i, j):
        found = float((unit[i] * unit[j]).sum())
        return 1.0 if found > 1 - 1e-6 else found

    pairs = []
    for odd in range(1, n, 2):
        score, to = cosine(odd, odd - 1), odd - 1
        if odd + 1 < n and cosine(odd, odd + 1) > score:
            score, to = cosine(odd, odd + 1), odd + 1
        pairs.append((-score, odd, to))
    goes = {odd: to for _, odd, to in sorted(pairs)[:r]}
    values, members = [], []
    for kept in range(n):
        if kept in goes:
            continue
        joined = [odd for odd in sorted(goes) if goes[odd] == kept]
        value = x[kept].copy()
        for odd in joined:
            for c in range(x.shape[1]):
                if abs(x[odd, c]) > abs(value[c]):
                    value[c] = x[odd, c]
        values.append(value)
        members.append([kept, *joined])
    return np.array(values), members


def cubist(x, grid, rows, columns):
    """x [h w, D] -> values [h' w', D], the members of each as places of the grid, the kept one first, and how many
    places are hit from both sides."""
    height, width = grid
    x = np.asarray(x, dtype=np.float64).reshape(height, width, -1)
    made = [line(row, columns) for row in x]
    values = np.stack([value for value, _ in made])
    inside = [[[i * width + j for j in group] for group in groups] for i, (_, groups) in enumerate(made)]
    shared = sum(len(group) == 3 for _, groups in made for group in groups)
    made = [line(values[:, j], rows) for j in range(values.shape[1])]
    values = np.stack([value for value, _ in made], axis=1)
    shared += sum(len(group) == 3 for _, groups in made for group in groups)
    short, few = values.shape[:2]
    groups = [[p for i in made[j][1][k] for p in inside[i][j]] for k in range(short) for j in range(few)]
    return values.reshape(short * few, -1), groups, shared


def run_blocks(blocks, x, few, layer, first=False):
    """x [B, h, w, C] ([B, C, h, w] if `first`) through an encoder's own blocks, merged to `few` before block `layer`:
    what each block gives, on the whole grid."""

    def call(block, x):
        out = block(x.permute(0, 3, 1, 2) if first else x)
        out = out[0] if isinstance(out, tuple) else out
        return out.permute(0, 2, 3, 1) if first else out

    x = x.permute(0, 2, 3, 1) if first else x
    grid, given, groups = tuple(x.shape[1:3]), [], None
    for index, block in enumerate(blocks):
        if index == layer:
            made = [
                cubist(one.double().numpy().reshape(-1, x.shape[-1]), grid, grid[0] - few[0], grid[1] - few[1])
                for one in x
            ]
            groups = [made[b][1] for b in range(len(x))]
            x = torch.stack([torch.tensor(value).to(x.dtype) for value, *_ in made]).unflatten(1, few)
        x = call(block, x)
        whole = x
        if groups is not None:
            whole = x.new_zeros(len(x), grid[0] * grid[1], x.shape[-1])
            for b, mine in enumerate(groups):
                for slot, members in enumerate(mine):
                    whole[b, members] = x[b].flatten(0, 1)[slot]
            whole = whole.unflatten(1, grid)
        given.append(whole.permute(0, 3, 1, 2) if first else whole)
    return given
