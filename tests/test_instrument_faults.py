"""The small Qwen notices mistakes of the kind that vtc could make: each, planted, costs right answers."""

import dataclasses

import pytest
import torch

import vtc
from vtc.adapters.multimodal import patch
from vtc.adapters.multimodal.families.base import Family
from vtc.checkpoints import tiny
from vtc.eval import scenes
from vtc.eval.asking import View, questions, shared_replies

placed, decide = Family.placed, patch.decide


def shuffled(family, inner, call, past):
    """The image tokens' positions, dealt out among them anew."""
    positions = placed(family, inner, call, past).clone()
    for row, marks in enumerate(call["input_ids"] == inner.config.image_token_id):
        at = marks.nonzero()[:, 0]
        deal = torch.randperm(len(at), generator=torch.Generator().manual_seed(row))
        positions[:, row, at] = positions[:, row, at[deal]]
    return positions


def too_low(family, inner, call, past):
    """Behind the prompt, as if one had counted on from the tokens that stay."""
    return placed(family, inner, call, past) - (16 if past else 0)


def mirrored(method, tokens, removed):
    """Others stay than were chosen: those that lie across the picture's middle."""
    found = decide(method, tokens, removed)
    return dataclasses.replace(found, anchor=(tokens.features.shape[1] - 1 - found.anchor).flip(-1))


@pytest.fixture(scope="module")
def asked():
    model, processor = tiny.tiny_qwen()
    processor.tokenizer.padding_side = "left"
    some = questions(0, 36, View(level=scenes.FULL))

    def share():
        with vtc.compress(model, "idpruner", keep=0.5):
            said = list(shared_replies(model, processor, some, 18))
        return sum(s == q.answer for s, q in zip(said, some, strict=True)) / len(some)

    return share


@pytest.fixture(scope="module")
def right(asked):
    return asked()


@pytest.mark.parametrize(
    ("where", "name", "fault"), [(Family, "placed", shuffled), (Family, "placed", too_low), (patch, "decide", mirrored)]
)
def test_a_mistake_costs_at_least_five_points(asked, right, monkeypatch, where, name, fault):
    monkeypatch.setattr(where, name, fault)
    assert asked() <= right - 0.05
    assert right > 0.9
