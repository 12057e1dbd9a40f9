"""Does a merged token show better where things are if it carries its members' positions (PPE), not only its anchor's?

The question: which part of the picture did this crop come from? A frozen DINOv2-S encodes a photograph and, separately,
another view of it, shifted, larger or smaller, from which the crop is taken. The layer sees a window of the
photograph's patches, placed at random on the encoder's own grid, so that the encoder's position table does not give the
answer away. A rotary attention layer reads the window: for every part c of the picture a query asks "is this crop
there?", and the answer is how much it finds,

    logit_c = sum_h a_h log sum_i size_i softmax_i(t_h cos(x, y_i)) exp(u_hc . R(p_i) b_h / sqrt(d)),

x the crop's feature, y_i the patches, R the rotation by their places: rows rotate the first 16 of 32 pairs, columns the
others. So a key has an unrotated part for the content and a rotated part for the place. a, t, u, b are learned on all
patches, per seed; then the layer gets merged patches, without further training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vtc import functional
from vtc.eval import common
from vtc.eval.common import Results
from vtc.eval.photos import PHOTOS, locate
from vtc.models.images import load_image, preprocess
from vtc.positions import combine, members, slot_of_pair
from vtc.token_map import TokenMap

METHODS = ("dpc_knn", "tome", "downsample")
KEEP = (0.5, 0.25, 0.1, 0.05)
PARTS = (2, 4)  # quadrants, and sixteen parts
SLOTS = (2, 4, 8, 16)
_WINDOW = 12  # patches per side, out of the encoder's 16
_HEADS, _PAIRS, _BASE = 8, 16, 20.0  # pairs per axis; frequencies from 1 to 1 / 20 radian per patch
_QUESTIONS, _CROP = 8, 3  # per window; patches per side


class Reader(nn.Module):
    """The attention layer that answers. The rotated part of a head is 64 wide."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        width = 4 * _PAIRS
        self.part = nn.Parameter(torch.randn(parts**2, _HEADS, width))
        self.key = nn.Parameter(torch.randn(_HEADS, width))
        self.sharp = nn.Parameter(torch.linspace(2.0, 4.0, _HEADS))  # log t
        self.weight = nn.Parameter(torch.ones(_HEADS))

    def forward(self, crop: Tensor, patches: Tensor, table: tuple[Tensor, Tensor], size: Tensor) -> Tensor:
        """Logits [B, Q, parts^2] for crops [B, Q, C], patches [B, M, C], cos and sin [B, M, 64], sizes [B, M]."""
        what = nn.functional.normalize(crop, dim=-1) @ nn.functional.normalize(patches, dim=-1).mT
        cos, sin = (t[:, :, None] for t in table)
        turned = self.key * cos + torch.cat([-self.key[:, 2 * _PAIRS :], self.key[:, : 2 * _PAIRS]], -1) * sin
        where = torch.einsum("chd,bmhd->bchm", self.part, turned) * (4 * _PAIRS) ** -0.5
        bias = size.clamp(min=1e-12).log().masked_fill(size <= 0, float("-inf"))[:, None, None]
        # over M, for every B, Q, part and head: e^(what) and e^(where) are multiplied, which is a matrix product
        sharp = self.sharp.exp()
        match = torch.softmax(sharp[:, None, None] * what[:, None], -1)  # B H Q M
        found = torch.einsum("bhqm,bchm->bqch", match, (where + bias).exp())
        return (found.clamp(min=1e-12).log() * self.weight).sum(-1)


def rotation(places: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 64] at places [2, ...]: 16 pairs rotate by the row, 16 by the column."""
    frequency = _BASE ** (-torch.arange(_PAIRS) / _PAIRS)
    angle = torch.cat([places[0, ..., None] * frequency, places[1, ..., None] * frequency] * 2, -1)
    return angle.cos(), angle.sin()


def carried(token_map: TokenMap, slots: int) -> tuple[Tensor, Tensor]:
    """The rotary table of merged tokens; slots = 1 uses the anchor's place."""
    places = torch.stack(torch.meshgrid(torch.arange(_WINDOW), torch.arange(_WINDOW), indexing="ij")).flatten(1).float()
    slot = slot_of_pair(torch.tensor([0] * _PAIRS + [1] * _PAIRS), slots).repeat(2)
    every = [rotation(places[:, index.clamp(min=0)]) for index in members(token_map, slots)]
    cos, sin = (combine(list(tables), slot) for tables in zip(*every, strict=True))
    return cos, sin


# -- pictures -------------------------------------------------------------------------------------------------------


def _view(photo: Image.Image, corner: Sequence[float], side: float) -> Tensor:
    left, top = corner
    return preprocess(photo.crop((round(left), round(top), round(left + side), round(top + side))), 224)


def examples(model: nn.Module, split: str, per_photo: int, seed: int, bar: Any) -> dict[str, Tensor]:
    """Windows of patches [n, 144, C], crops' features [n, Q, C], and the middle of every crop in the window [n, Q, 2],
    0 to 1, row and column."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    out: dict[str, list[Tensor]] = {"patches": [], "crops": [], "middle": []}
    for package, file in PHOTOS[split]:
        photo = load_image(locate(package, file))
        for _ in range(per_photo):
            side = min(photo.size) * draw(0.5, 1.0)
            corner = [draw(0, full - side) for full in photo.size]
            # another view of about the same area: larger or smaller, and shifted by up to a patch and a half
            other = min(side * draw(0.85, 1.15), *photo.size)
            moved = [at + (side - other) / 2 + draw(-0.1, 0.1) * side for at in corner]
            moved = [min(max(0.0, at), full - other) for at, full in zip(moved, photo.size, strict=True)]
            views = [_view(photo, at, length) for at, length in ((corner, side), (moved, other))]
            first, second = common.features(model, torch.cat(views))[:, -256:].view(2, 16, 16, -1)
            row, column = (int(torch.randint(16 - _WINDOW + 1, (), generator=generator)) for _ in range(2))
            out["patches"].append(first[row : row + _WINDOW, column : column + _WINDOW].flatten(0, 1))
            crops, middles = [], []
            for _ in range(_QUESTIONS):
                y, x = (draw(0, _WINDOW - _CROP) for _ in range(2))  # in the window, in patches
                spans = []
                for start, at, to in ((row + y, corner[1], moved[1]), (column + x, corner[0], moved[0])):
                    begin = (at + start * side / 16 - to) / other * 16  # in the other view
                    begin = min(max(0, round(begin)), 15)
                    spans.append(slice(begin, begin + max(1, round(_CROP * side / other))))
                crops.append(second[spans[0], spans[1]].flatten(0, 1).mean(0))
                middles.append(torch.tensor([y + _CROP / 2, x + _CROP / 2]) / _WINDOW)
            out["crops"].append(torch.stack(crops))
            out["middle"].append(torch.stack(middles))
            bar.update(2)
    return {name: torch.stack(values) for name, values in out.items()}


def answers(middle: Tensor, parts: int) -> Tensor:
    """[n, Q]: the part of the window that the middle of the crop lies in, row by row."""
    cell = (middle * parts).long().clamp(max=parts - 1)
    return cell[..., 0] * parts + cell[..., 1]


# -- training and asking --------------------------------------------------------------------------------------------


def train(data: dict[str, Tensor], parts: int, steps: int, seed: int, bar: Any) -> Reader:
    torch.manual_seed(seed)
    reader = Reader(parts)
    optimizer = torch.optim.Adam(reader.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-2, total_steps=steps)
    truth, whole = answers(data["middle"], parts), TokenMap.identity(1, _WINDOW**2)
    table = carried(whole, 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(truth), (32,), generator=generator)
        patches = data["patches"][some]
        logits = reader(data["crops"][some], patches, table, torch.ones(patches.shape[:2]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), truth[some].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update()
    return reader.eval()


@torch.no_grad()
def accuracy(reader: Reader, data: dict[str, Tensor], parts: int, token_map: TokenMap, slots: int) -> float:
    merged, truth = token_map.merge(data["patches"]), answers(data["middle"], parts)
    table = carried(token_map, slots)
    right = []
    for start in range(0, len(truth), 16):
        some = slice(start, start + 16)
        here = tuple(t[some] for t in table) if len(table[0]) > 1 else table
        logits = reader(data["crops"][some], merged[some], here, token_map.size[some])  # type: ignore[arg-type]
        right.append((logits.argmax(-1) == truth[some]).float())
    return float(torch.cat(right).mean())


def maps(patches: Tensor, method: str, keep: float) -> TokenMap:
    if method == "dpc_knn":
        return functional.dpc_knn(patches, keep=keep)
    if method == "tome":
        return functional.tome(patches, keep=max(1, round(keep * patches.shape[1])))
    grid = ((_WINDOW, _WINDOW),) * len(patches)
    return functional.downsample(patches, keep=keep, grid=grid[0])


def run(
    images: int | None = None,
    out: str | Path | None = None,
    levels: Sequence[float] = KEEP,
    progress: bool = False,
    seeds: int = 5,
    steps: int = 1000,
) -> Results:
    """Train a reader for every seed and number of parts, and test it on merged windows.

    Args:
        images: windows per photograph, for training and for testing; None = 20.
        out: folder for positions.csv and .md; None = write nothing.
        levels: fractions of the 144 tokens that stay.
        seeds: of the weights and of the windows.
        steps: of training.
    """
    levels, per_photo = common.check_levels(levels), images or 20
    model = common.load_model("float32")
    photos = sum(map(len, PHOTOS.values()))
    encoding = common.bar(2 * seeds * photos * per_photo, "features", progress)
    training = common.bar(seeds * len(PARTS) * steps, "readers", progress)
    values: dict[tuple, list[float]] = {}
    for seed in range(seeds):
        data = {
            split: examples(model, split, per_photo, 2 * seed + half, encoding) for half, split in enumerate(PHOTOS)
        }
        asked = data["held-out"]
        found = {(method, keep): maps(asked["patches"], method, keep) for method in METHODS for keep in levels}
        whole = TokenMap.identity(len(asked["patches"]), _WINDOW**2)
        for parts in PARTS:
            reader = train(data["search"], parts, steps, seed, training)
            values.setdefault((parts, "dense", 1.0, 1), []).append(accuracy(reader, asked, parts, whole, 1))
            for (method, keep), token_map in found.items():
                for slots in (1, *SLOTS):
                    right = accuracy(reader, asked, parts, token_map, slots)
                    values.setdefault((parts, method, keep, slots), []).append(right)
    encoding.close()
    training.close()
    # the actual counts: downsample rounds a fraction up, the others to the nearest
    counts = {key: token_map.slots for key, token_map in found.items()}
    rows = [_row(key, scores, values, counts.get(key[1:3], _WINDOW**2)) for key, scores in values.items()]
    columns = {"parts": "parts", "method": "method", "keep": "keep", "tokens": "tokens", "slots": "slots"}
    columns |= {"accuracy": "accuracy", "gain": "- anchor's place", "low": "from", "high": "to"}
    count = asked["crops"].shape[:2].numel()
    about = (
        f"Which part of the picture does a crop come from? Accuracy on {seeds} x {count} crops of "
        f"{len(PHOTOS['held-out'])} photographs that training has not seen, mean of {seeds} seeds; slots 1 = the "
        "anchor's place. The gain of PPE over it, with its paired 95 % interval over seeds (Student's t). "
        f"{common.environment()}."
    )
    results = Results("positions", rows, columns, about)
    if out is not None:
        results.write(out)
    return results


def _row(key: tuple, scores: list[float], values: dict[tuple, list[float]], tokens: int) -> dict[str, Any]:
    parts, method, keep, slots = key
    row = {"parts": parts**2, "method": method, "keep": keep, "tokens": tokens, "slots": slots}
    row |= {"seeds": len(scores), "accuracy": sum(scores) / len(scores)}
    if slots > 1:
        gains = torch.tensor(scores) - torch.tensor(values[parts, method, keep, 1])
        gain, half = common.spread(gains.tolist())
        row |= {"gain": gain, "low": gain - half, "high": gain + half}
    return row
