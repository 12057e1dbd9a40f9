"""HoloV and MMTok in multimodal LLMs: the oracle, and the projector's inputs without the projector."""

from __future__ import annotations

import mllm_zoo as zoo
import pytest
import test_mllm
import torch
from test_holov_mmtok import greedy, slow_table
from test_mllm_evidence import Reader

import vtc

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")


@pytest.mark.parametrize("method", ["holov", "mmtok"])
@pytest.mark.parametrize(
    "name, case", [(name, case) for name in FAMILIES for case in zoo.CASES[name] if case != "text"]
)
def test_oracle(name, case, method, monkeypatch):
    monkeypatch.setitem(test_mllm.METHODS, "selector", (method, {"keep": 0.3}))
    test_mllm.test_oracle(name, case, "selector", "sdpa")


@pytest.mark.parametrize("name", (*FAMILIES, "llava"))
@torch.no_grad()
def test_what_the_projector_reads_is_had_without_the_projector(name):
    def seen(*asked):
        Reader.seen.clear()
        with vtc.compress(zoo.build(name), Reader(keep=0.5, asked=asked)):
            zoo.build(name)(**zoo.inputs(name, "ragged"))
        return Reader.seen[0]

    alone, usual, words = seen("inputs"), seen("inputs", "projector"), seen("inputs", "text")
    assert torch.equal(alone.inputs, usual.inputs) and torch.equal(words.inputs, usual.inputs)
    assert alone.projector is None and alone.hidden is None and usual.projector is not None
    with vtc.compress(zoo.build(name), "mmtok", keep=0.4) as handle:
        zoo.build(name)(**zoo.inputs(name, "ragged"))
        order = handle.token_map.order
    for b, row in enumerate(order.tolist()):
        real = slice(None) if words.mask is None else words.mask[b]
        said = words.text[b] if words.text_mask is None else words.text[b, words.text_mask[b]]
        given = said, words.features[b, real], words.inputs[b, real].mean(1)
        table = slow_table(*(x.double().numpy() for x in given))
        assert [t for t in row if t >= 0] == greedy(table, sum(t >= 0 for t in row))
