"""Budgets to removals per layer, and the MAC counter, against the figures of the papers."""

import pytest

from vtc import OptionError
from vtc.budget import per_layer
from vtc.macs import EncoderMACs
from vtc.methods import Downsample, PiToMe, Random, ToMe


def vit(width, depth, patch, classes=1000, prefix=1):
    return EncoderMACs(
        attention=(4 * width**2,) * depth,
        width=(width,) * depth,
        mlp=(8 * width**2,) * depth,
        patch=3 * patch**2 * width,
        prefix=prefix,
        tail=(0, width * classes),
    )


DEIT_S, VIT_L, VIT_H = vit(384, 12, 16), vit(1024, 24, 16), vit(1280, 32, 14)


def left(method, patches, depth, macs):
    counts, now = [], patches
    for r in per_layer(method, patches, depth, macs):
        now -= r
        counts.append(now)
    return counts


def test_tokens_after_each_layer_are_the_references():
    with_cls = [n + 1 for n in left(ToMe(keep=0.925), 196, 12, DEIT_S)]
    assert with_cls == [183, 170, 158, 147, 137, 127, 118, 110, 102, 95, 88, 82]
    with_cls = [n + 1 for n in left(PiToMe(keep=0.9), 196, 12, DEIT_S)]
    assert with_cls == [178, 161, 145, 131, 118, 107, 97, 88, 80, 73, 66, 60]
    assert [left(ToMe(r=r), 196, 12, DEIT_S)[-1] + 1 for r in (8, 13, 16)] == [101, 41, 11]
    listed = [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    assert per_layer(ToMe(r=listed), 196, 12, DEIT_S) == tuple(listed)


@pytest.mark.parametrize(
    ("macs", "patches", "depth", "budget", "giga"),
    [
        (DEIT_S, 196, 12, {"keep": 1.0}, 4.599),
        (VIT_L, 196, 24, {"keep": 1.0}, 61.555),
        (VIT_H, 256, 32, {"keep": 1.0}, 167.295),
        (VIT_L, 196, 24, {"r": 8}, 30.963),
        (VIT_H, 256, 32, {"r": 7}, 92.835),
    ],
)
def test_macs_are_the_references(macs, patches, depth, budget, giga):
    assert macs.after(per_layer(ToMe(**budget), patches, depth, macs), patches) / 1e9 == pytest.approx(giga, abs=6e-4)


@pytest.mark.parametrize(("keep", "giga"), [(0.925, 2.991), (0.9, 2.595)])
def test_macs_of_a_ratio_schedule(keep, giga):
    """The reference applies the ratio to the patches behind CLS, as we do."""
    value = DEIT_S.after(per_layer(PiToMe(keep=keep), 196, 12, DEIT_S), 196) / 1e9
    assert value == pytest.approx(giga, abs=2e-3)


def test_flops_takes_the_nearest_reachable_value_not_above():
    for method in (ToMe, PiToMe, Random, Downsample):
        for share in (0.99, 0.8, 0.6, 0.55, 0.4):
            plan = per_layer(method(flops=share), 196, 12, DEIT_S)
            cost = DEIT_S.after(plan, 196)
            assert cost <= share * DEIT_S.dense(196)
            if method is Downsample:  # one token more would be too many
                richer = (plan[0] - 1, *plan[1:])
                assert DEIT_S.after(richer, 196) > share * DEIT_S.dense(196)
            else:  # no constant ratio on a fine grid comes nearer
                for step in range(2000):
                    other = DEIT_S.after(per_layer(method(keep=0.5 + step / 4000), 196, 12, DEIT_S), 196)
                    assert not cost < other <= share * DEIT_S.dense(196)
    assert per_layer(ToMe(flops=1.0), 196, 12, DEIT_S) == (0,) * 12
    with pytest.raises(OptionError, match="out of reach.*at least 0.1"):
        per_layer(ToMe(flops=0.05), 196, 12, DEIT_S)


@pytest.mark.parametrize("patches", [1, 2, 7, 196, 1369])
def test_an_int_is_the_final_count(patches):
    for depth in (1, 3, 12):
        for keep in range(1, patches + 1, max(1, patches // 50)):
            least = patches
            for _ in range(depth):
                least -= least // 2
            if keep < least:
                with pytest.raises(OptionError, match=f"leave {least}"):
                    per_layer(ToMe(keep=keep), patches, depth, DEIT_S)
                continue
            for method in (ToMe, Random, Downsample):
                plan = per_layer(method(keep=keep), patches, depth, DEIT_S)
                assert patches - sum(plan) == keep and min(plan) >= 0 and len(plan) == depth
            now = patches
            for r in per_layer(ToMe(keep=keep), patches, depth, DEIT_S):
                assert r <= now // 2
                now -= r
    with pytest.raises(OptionError, match="more than the image's"):
        per_layer(ToMe(keep=patches + 1), patches, 12, DEIT_S)


def test_one_shot_methods_reduce_once():
    assert per_layer(Downsample(keep=0.25), 196, 12, DEIT_S) == (147,) + (0,) * 11
    assert per_layer(Downsample(keep=0.0001), 196, 12, DEIT_S) == (195,) + (0,) * 11
