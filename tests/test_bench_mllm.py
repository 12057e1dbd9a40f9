"""The measurement of multimodal LLMs: what its numbers are made of, on presets that are shrunk."""

import json
import time
from dataclasses import dataclass
from functools import partial

import pytest
import torch

import vtc
from vtc.cli import command as cli
from vtc.methods import Random

pytest.importorskip("transformers")

from vtc.bench.prefill import Stopwatch, cache_bytes, measure_prefill, methods_at  # noqa: E402
from vtc.models import configs as multimodal

SIDE = {"llava-0.5b": None, "qwen2.5-vl-0.5b": 224}  # 64 visual tokens


@pytest.fixture(scope="module", params=multimodal.PRESETS)
def small(request):
    config = multimodal.preset(request.param, shrink=16)
    model = multimodal.fill(config)
    return model, multimodal.sample(config, SIDE[request.param]).inputs(model)


@pytest.fixture
def vtc_(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments):
        code = cli.main([str(each) for each in arguments])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@dataclass(frozen=True)
class Slow(Random):
    def decide(self, tokens, r):
        time.sleep(0.1)
        return super().decide(tokens, r)


@pytest.mark.parametrize("name", multimodal.PRESETS)
def test_presets_are_of_real_size(name):
    config = multimodal.preset(name)
    decoder = multimodal.sketch(config).model.language_model
    assert 480e6 < sum(p.numel() for p in decoder.parameters()) < 510e6
    assert (len(decoder.layers), config.get_text_config().vocab_size) == (24, 151_936)
    assert multimodal.sample(config).tokens == 1024


def test_measure(small):
    model, inputs = small

    def state():
        hooks = {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()}
        return hooks, {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()}

    with torch.no_grad():
        expected = model(**inputs, use_cache=True)  # transformers itself leaves hooks
    before = state()
    turns = []
    assert [m.keep for m in methods_at(["random", "pixelprune"], [0.5, 0.25])] == [0.5, 0.25, 1.0]
    methods = methods_at(["random", "tome"], [1.0, 0.25])
    dense, rows = measure_prefill(model, inputs, methods, 2, 1, tick=lambda: turns.append(1))
    assert len(turns) == 3 * 9
    assert [(row.method, row.keep) for row in rows] == [(m, k) for m in ("random", "tome") for k in (1.0, 0.25)]
    assert (dense.visual, dense.prompt) == (64, 97)
    assert dense.kv_bytes == cache_bytes(expected)
    assert dense.total_seconds > dense.after_seconds > dense.layer_seconds > 0 and dense.tower_seconds > 0
    for row in rows:
        kept = round(64 * row.keep)
        assert (row.visual, row.prompt) == ((64, kept), (97, 33 + kept))
        assert row.total_seconds > row.after_seconds > row.method_seconds > 0
        assert row.kv_bytes[0] == dense.kv_bytes and row.kv_bytes[1] * 97 == dense.kv_bytes * (33 + kept)
        assert row.ideal == 1 if row.keep == 1 else row.ideal > 1.5
        assert row.low <= row.realised <= row.high
        assert row.of_short > 0
        found = row.to_dict()
        assert found["efficiency"] == row.realised / row.ideal
        assert found["layers"] == row.method_seconds / dense.layer_seconds
    assert state() == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected.logits)


def test_everything_that_vtc_adds_is_counted(small):
    """A method's time is in the method's column, in what comes after the projector and in the whole."""
    model, inputs = small
    dense, (fast, slow) = measure_prefill(model, inputs, [Random(keep=0.5), Slow(keep=0.5)], 3, 1)
    assert fast.method_seconds < 0.1 <= slow.method_seconds < slow.after_seconds < slow.total_seconds
    assert slow.realised < 1 and slow.whole < 1
    assert slow.of_short < min(0.5, fast.of_short)


def test_evidence_is_counted(small, monkeypatch):
    from vtc import scores

    def slow(*args, **kwargs):
        time.sleep(0.03)
        return own(*args, **kwargs)

    name = "cls_attention" if "Llava" in type(small[0]).__name__ else "attention_received"
    own = getattr(scores, name)
    monkeypatch.setattr(scores, name, slow)
    _, (row,) = measure_prefill(*small, [vtc.IDPruner(keep=0.5)], 1, 1)
    assert row.method_seconds >= 0.03 and row.after_seconds >= 0.03
    assert row.notes == "importance: attention"


def test_methods_between_layers(small):
    _, (row,) = measure_prefill(*small, [vtc.FastV(keep=0.25)], 1, 1)
    assert row.method_seconds > 0 and row.visual == (64, 16)
    assert row.kv_bytes[1] > 0.5 * row.kv_bytes[0]  # the first layers cache everything


def test_a_stopwatch_counts_nested_calls_once(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    watch = Stopwatch()
    inner = watch.around(lambda: next(ticks))
    outer = watch.around(lambda: (inner(), next(ticks)))
    outer()
    assert watch.read() == 3 and watch.read() == 0


def test_bench(vtc_, monkeypatch):
    monkeypatch.setattr(multimodal, "preset", partial(multimodal.preset, shrink=16))
    asked = ["bench", "--model", "llava-0.5b", "--method", "random", "tome", "--repeats", 1]
    code, text, err = vtc_(*asked)
    assert (code, err) == (0, "")
    for words in ("64 visual tokens", "random", "tome", "after projector", "ideal", "KV", "0.25", "decoder layer"):
        assert words in text, words
    code, text, _ = vtc_(*asked, "--tokens", 10, "--json")
    found = json.loads(text)
    assert code == 0 and [row["visual"] for row in found["rows"]] == [[64, 10], [64, 10]]
    assert found["dense"]["visual"] == 64 and found["environment"]["repeats"] == 1


def test_bench_of_a_configuration(vtc_, monkeypatch, tmp_path):
    multimodal.preset("qwen2.5-vl-0.5b", shrink=16).save_pretrained(tmp_path)
    asked = ["--method", "random", "--keep", 0.5, "--size", 112, "--repeats", 1, "--json"]
    code, text, err = vtc_("bench", "--model", tmp_path, *asked)
    assert code == 0, err
    assert json.loads(text)["rows"][0]["visual"] == [16, 8]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--flops", "0.5"], ["--flops", "encoder"]),
        (["--batch", "4"], ["--batch", "encoder"]),
        (["--method", "tomme"], ["'tomme'", "did you mean 'tome'"]),
        (["--keep", "0.5", "--tokens", "9"], ["--tokens", "not allowed with"]),
        (["--keep", "0.5", "1.5"], ["1.5"]),
        (["--tokens", "65", "--method", "random"], ["65", "64"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bench_bad_input(vtc_, monkeypatch, arguments, names):
    monkeypatch.setattr(multimodal, "preset", partial(multimodal.preset, shrink=16))
    code, out, err = vtc_("bench", "--model", "llava-0.5b", "--repeats", 1, *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1
    for name in names:
        assert name in err


def test_bench_too_large(vtc_, tmp_path):
    config = multimodal.preset("llava-0.5b")
    config.text_config.intermediate_size = 100_000
    config.save_pretrained(tmp_path)
    code, out, err = vtc_("bench", "--model", tmp_path)
    assert code == 2 and "billion parameters" in err and "llava-0.5b" in err
    assert "--keep" in vtc_("bench", "--keep", 0.5)[2]
