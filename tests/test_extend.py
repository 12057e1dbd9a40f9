"""The worked examples of docs/add-*.md (methods, a score, an encoder, a family, a kernel) keep the promises that vtc's
own parts keep."""

from __future__ import annotations

import copy
import linecache
import re
import tempfile
from pathlib import Path

import mllm_zoo
import pytest
import test_matrix
import torch
from zoo import ZOO, Entry, one, pixels, randomise

import vtc
from vtc.adapters.encoders.find import ADAPTERS
from vtc.adapters.multimodal.families import FAMILIES
from vtc.methods import METHODS
from vtc.methods.ranked import Ranked
from vtc.scores import SCORES

DOCS = Path(__file__).resolve().parent.parent / "docs"


def told(page):
    """The names that a page's python blocks leave behind, run in order as a reader would."""
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE))
    linecache.cache[page] = (len(script), None, script.splitlines(keepends=True), page)
    names = {
        "__name__": "told",
        "vtc": vtc,
        "torch": torch,
        "mllm_zoo": mllm_zoo,
        "model": randomise(ZOO["timm-dinov2"].build()),
        "images": pixels(2),
        "llm": mllm_zoo.build("llava_next"),
        "inputs": mllm_zoo.inputs("llava_next", "single"),
    }
    for source in re.findall(r"^```cpp\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE):
        names["folder"] = Path(tempfile.mkdtemp())
        (names["folder"] / "lengths.cpp").write_text(source)
    exec(compile(script, page, "exec", dont_inherit=True), names)
    return names


@pytest.fixture(scope="module")
def registries():
    """What the pages register is gone afterwards."""
    kept = [(registry, dict(registry)) for registry in (METHODS, ADAPTERS, FAMILIES, SCORES)]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)


@pytest.fixture(scope="module")
def methods(registries):
    return told("add-a-method.md")


@pytest.fixture(scope="module")
def adapters(registries):
    return told("add-an-adapter.md")


@pytest.mark.parametrize("name", ["timm-dinov2", "hf-siglip2"])
def test_the_merging_example_in_encoders(methods, name, monkeypatch):
    monkeypatch.setattr(test_matrix, "make", lambda method, **budget: vtc.methods.make(method, **budget))
    test_matrix.test_promises(name, "tome_hidden")


@pytest.mark.parametrize("method", ["farthest", "tome_hidden"])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_both_examples_in_multimodal_llms(methods, method, name):
    model, inputs = mllm_zoo.build(name), mllm_zoo.inputs(name, "ragged")
    dense, before = model(**inputs).logits, mllm_zoo.fingerprint(model)
    with vtc.compress(model, method, keep=1.0):
        assert torch.equal(model(**inputs).logits, dense)
    with vtc.compress(model, method, keep=0.3) as handle:
        model(**inputs)
        kept, report = handle.kept, handle.report
        assert list(report.after) == [max(1, round(0.3 * n)) for n in report.before]
        for row in range(len(kept)):  # a batch is its items
            single = mllm_zoo.alone(name, "ragged", row)
            model(**single)
            assert torch.equal(handle.kept[0], kept[row, -single["input_ids"].shape[1] :])
    assert mllm_zoo.fingerprint(model) == before and torch.equal(model(**inputs).logits, dense)


def test_the_selecting_example_by_its_definition(methods):
    features = torch.randn(2, 30, 8)
    far = (features - features.mean(1, keepdim=True)).abs().sum(-1)
    picked = methods["Farthest"](keep=0.5, p=1).pick(vtc.methods.Tokens(features), 5)
    assert torch.equal(picked, far.argsort(dim=1, descending=True)[:, :5])
    with pytest.raises(vtc.OptionError, match="p=0.5"):
        methods["Farthest"](keep=0.5, p=0.5)


RANKING = [
    n for n, c in METHODS.items() if issubclass(c, Ranked) and not c.in_decoder and "frames" not in c(keep=0.5).needs
]


@pytest.mark.parametrize("method", RANKING)
@torch.no_grad()
def test_the_score_in_every_method_that_ranks(registries, method):
    """It decides alone, without what the method's own score reads; a batch is its items."""
    contrast = told("add-a-score.md")["contrast"]
    model, inputs = mllm_zoo.build("llava_next"), mllm_zoo.inputs("llava_next", "ragged")
    with vtc.compress(model, method, keep=0.3, importance="contrast") as handle:
        model(**inputs)
        kept = handle.kept
        for row in range(len(kept)):
            single = mllm_zoo.alone("llava_next", "ragged", row)
            model(**single)
            assert torch.equal(handle.kept[0], kept[row, -single["input_ids"].shape[1] :])
    tokens = vtc.methods.Tokens(torch.randn(2, 30, 8))
    best = vtc.Norm(keep=5, importance="contrast").decide(tokens, 25).order
    assert torch.equal(best, contrast(tokens).argsort(dim=1, descending=True)[:, :5])


def test_the_kernel(registries):
    """Compiled, loaded, and equal to its definition; what it says of its shape is so."""
    names = told("add-a-kernel.md")
    x = torch.randn(3, 70, 33, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.ops.vtc.lengths(x), names["lengths"](x))
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.vtc.lengths(x.double())


@pytest.mark.parametrize("method", ["pitome", "tome", "random", "downsample"])
def test_the_encoder_example_keeps_the_promises(adapters, method, monkeypatch):
    entry = Entry(lambda: randomise(adapters["OurViT"]()), lambda batch: {"x": pixels(batch)}, one)
    net = entry.build()
    monkeypatch.setitem(test_matrix.ZOO, "ours", entry)
    monkeypatch.setattr(test_matrix, "model", lambda name: net)
    test_matrix.test_promises("ours", method)


def test_the_encoder_example_refuses_what_it_cannot(adapters):
    plan = vtc.explain(adapters["OurViT"](), "downsample", mode="resize")
    assert not plan.ok and "its positions are fixed" in str(plan)


def test_a_block_that_forgets_something_is_refused(adapters):
    """The page says that a wrong account cannot pass."""

    class Gated(adapters["Layer"]):
        def forward(self, x):
            return x + self.attn(self.norm1(x)) * 0.5 + self.mlp(self.norm2(x))

    net = adapters["OurViT"]()
    net.layers[1] = Gated(64, 4)
    with pytest.raises(vtc.UnsupportedModelError, match="block 1 .Gated. computes something vtc does not know"):
        vtc.compress(net, "tome", keep=0.8)


@torch.no_grad()
def test_the_family_example(adapters):
    net, inputs = copy.deepcopy(adapters["llm"]), mllm_zoo.inputs("llava", "ragged")
    dense, before = net(**inputs).logits, mllm_zoo.fingerprint(net)
    assert vtc.explain(net).encoders[0].adapter == "ours"
    with vtc.compress(net, "idpruner", keep=0.3) as handle:
        net(**inputs)
        assert list(handle.report.after) == [max(1, round(0.3 * n)) for n in handle.report.before]
    assert mllm_zoo.fingerprint(net) == before and torch.equal(net(**inputs).logits, dense)
