"""The reference vectors of ToMe and PiToMe (tests/pitome_vectors.json), generated and compared as the file says."""

import json
from pathlib import Path

import pytest
import torch

from vtc import functional, ops
from vtc.token_map import TokenMap

FILE = json.loads((Path(__file__).parent / "pitome_vectors.json").read_text())
ENERGY = {"head": "elu", "paper": "paper", "text": "gaussian"}


def det(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """splitmix64, element by element, in float64."""
    word, values = (1 << 64) - 1, []
    state = (seed * 0xD1342543DE82EF95) & word
    for _ in range(torch.Size(shape).numel()):
        state = (state + 0x9E3779B97F4A7C15) & word
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        values.append((((z ^ (z >> 31)) >> 43) - 2**20) / 2**20)
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


@pytest.fixture(scope="module")
def data():
    centres, label = det((6, 16), 11), (6 * det((2, 50), 12).abs()).long().clamp(max=5)
    keys = centres[label] + 0.4 * det((2, 50, 16), 1)
    x, size = det((2, 50, 12), 2), (3 * det((2, 50, 1), 3).abs()).floor()[..., 0] + 1
    check = FILE["input"]["check"]
    assert keys[0, 0, :4].tolist() == check["k[0,0,:4]"]
    assert x[0, 0, :3].tolist() == check["x[0,0,:3]"]
    assert size.sum().item() == check["size_sum"]
    return keys, x, size


def partition(group):
    slots: dict[int, list[int]] = {}
    for token, slot in enumerate(group):
        slots.setdefault(slot, []).append(token)
    return sorted(slots.values())


def kth(keys: torch.Tensor, k: int) -> TokenMap:
    """ToMe's kth grouping from the public operators: the last of every k tokens is a target, all others merge."""
    batch, tokens, _ = keys.shape
    index = torch.arange(tokens)
    a, b = (index[(index % k == k - 1) == last].expand(batch, -1) for last in (False, True))
    return TokenMap.from_pairs(tokens, ops.bipartite_match(ops.normalize(keys), a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FILE["cases"])
def test_vector(name, dtype, data):
    case = FILE["cases"][name]
    keys, x, size = (t.to(dtype) for t in data)
    prefix = case.get("prefix", 0)
    if case["algo"] == "tome":
        token_map = functional.tome(keys, r=case["r"], prefix=prefix, size=size)
    elif case["algo"] == "tome_kth":
        keys, x, size = (t[:, : case["n_in"]] for t in (keys, x, size))
        token_map = kth(keys, case["k"])
    else:
        token_map = functional.pitome(
            keys,
            keep=case["ratio"],
            margin=case["margin"],
            energy=ENERGY[case["preset"]],
            split="half" if case["path"] == "text" else "alternate",
            protect=case["path"] != "bsm",
            prefix=prefix,
            size=size,
        )
    if case["merge"] == "prune":
        assert [sorted(row) for row in token_map.anchor.tolist()] == [sorted(row) for row in case["kept"]]
        merged = token_map.gather(x.double())
    else:
        for ours, reference in zip(token_map.group.tolist(), case["group"], strict=True):
            assert partition(ours) == partition(reference)
        weights = size.float() if case["merge"] == "wavg" else torch.ones_like(size).float()
        merged = token_map.merge(x.double(), weights)
    assert list(merged.shape) == case["x"]["shape"]
    # Rows stand in another order than the reference's; put them there, then the order-dependent signature must agree.
    merged = reorder(token_map, case, merged)
    for key, value in signature(merged).items():
        assert value == pytest.approx(case["x"][key], abs=2e-4 if key == "wsum" else 1e-4), key
    if "size" in case:
        ordered = reorder(token_map, case, token_map.size[..., None].double())
        for key, value in signature(ordered).items():
            assert value == pytest.approx(case["size"][key], abs=1e-6), key
    if "unmerge" in case:
        for key, value in signature(token_map.unmerge(token_map.merge(x.double(), weights))).items():
            assert value == pytest.approx(case["unmerge"][key], abs=1e-4), key


def reorder(token_map: TokenMap, case: dict, rows: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(rows)
    for b in range(rows.shape[0]):
        if "group" in case:
            for token, row in enumerate(case["group"][b]):
                out[b, row] = rows[b, token_map.group[b, token]]
        else:
            for row, token in enumerate(case["kept"][b]):
                out[b, row] = rows[b, token_map.group[b, token]]
    return out


def signature(t: torch.Tensor) -> dict[str, float]:
    flat = t.double().reshape(-1)
    index = torch.arange(1, flat.numel() + 1, dtype=torch.float64)
    return {"sum": flat.sum().item(), "abs": flat.abs().sum().item(), "wsum": (flat * index.cos()).sum().item()}
