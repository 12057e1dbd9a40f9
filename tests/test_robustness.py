"""Whatever is asked of the public API: a plain error and nothing changed, or the promises; and nothing is left behind
when models are patched in two threads, ten times over, or shown a thousand pictures."""

from __future__ import annotations

import copy
import ctypes
import gc
import inspect
import os
import tempfile
import threading
import weakref
from dataclasses import fields
from pathlib import Path

import mllm_processor
import mllm_zoo
import psutil
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import vtc
from vtc.methods import METHODS

# -- anything may be asked ------------------------------------------------------------------------------------------

RIGHT = {  # values that an option may well have
    "keep": [0.5, 0.7, 0.9, 1.0, 4, 20],
    "r": [0, 4, [3, 2, 1]],
    "flops": [0.5, 0.8, 1.0],
    "where": ["llm", "tower"],
    "pooled": [True],
    "positions": ["ppe", vtc.PPE(2), {"slots": 4}],
    "cascade": [{1: 0.5}, {2: 1.0}],
    "proportional": [True],
    "preset": ["paper", "head", "text", "nearest"],
    "margin": [0.5, (0.9, 0.1)],
    "energy": ["elu", "paper", "gaussian", "nearest"],
    "split": ["alternate", "half"],
    "protect": [True, False, (0.5, 1.0)],
    "metric": ["keys", "hidden"],
    "mode": ["pool", "resize"],
    "importance": ["norm", "relevance", "sensitivity"],
    "normalize": ["rank", "none"],
    "exact": [True, False],
    "layer": [1, 2],
    "events": [0.5],
    "before": [vtc.PixelPrune(), vtc.PixelPrune(tolerance=0.1)],
}
NUMBERS = [0, 1, 0.5, 2]  # what the others take
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 10**6),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-1, 9), st.floats(0, 1), st.text(max_size=1)), max_size=3),
    st.dictionaries(st.one_of(st.integers(-1, 3), st.text(max_size=1)), st.floats(0, 2), max_size=2),
    st.builds(object),
)
OPTIONS = {name: [field.name for field in fields(cls)] for name, cls in METHODS.items()}


def value(option: str) -> st.SearchStrategy:
    return st.sampled_from(RIGHT.get(option, NUMBERS))


@st.composite
def asked(draw, llm):
    """A method's name, a budget and up to two more options; now and then one that makes no sense."""
    fit = [n for n, cls in METHODS.items() if cls.budgeted and (cls.encoder or (llm and not cls.rectangle))]
    name = draw(st.sampled_from(fit))
    budget = draw(st.sampled_from(["keep"] if llm else ["keep", "keep", "flops", "r"]))
    left_out = (
        {"keep", "flops", "r"}
        if llm
        else {"keep", "flops", "r", "where", "pooled", "cascade", "proportional", "before"}
    )
    own = [option for option in OPTIONS[name] if option not in left_out]
    options = {option: draw(value(option)) for option in (budget, *draw(st.lists(st.sampled_from(own), max_size=2)))}
    if draw(st.integers(0, 9)) == 7:
        options[draw(st.sampled_from(OPTIONS[name]))] = draw(ODD)
    return name, options


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_senseless_option(name, data):
    """An error that names it and its value; or a method that a file keeps."""
    option = data.draw(st.sampled_from(OPTIONS[name]))
    given = data.draw(ODD)
    budget = {} if option in ("keep", "r", "flops") or not METHODS[name].budgeted else {"keep": 0.7}
    try:
        method = vtc.methods.make(name, **budget, **{option: given})
    except vtc.OptionError as error:
        assert option in str(error) and "\n" not in str(error)
        parts = [*given, *given.values()] if isinstance(given, dict) else given if isinstance(given, list) else []
        written = [given, tuple(parts), *parts, *(["ppe"] if option == "positions" and given == {} else [])]
        assert given is None or any(repr(each) in str(error) for each in written)
        return
    with tempfile.TemporaryDirectory() as folder:
        vtc.save_config(method, Path(folder, "method.json"))
        assert vtc.load_config(Path(folder, "method.json")) == method
    assert repr(method)


TOKENS = st.one_of(st.integers(0, 4), st.integers(0, 30))


@pytest.mark.parametrize("name", sorted(set(vtc.functional.__all__) - {"ppe_positions", "zeroth_order_sensitivity"}))
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_functional(name, data):
    """A map of the right shape, or an error that says what is wrong."""
    decide = getattr(vtc.functional, name)
    taken = inspect.signature(decide).parameters
    batch, tokens, prefix = data.draw(st.integers(0, 3)), data.draw(TOKENS), data.draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(batch, tokens, 6, generator=generator)
    mask = torch.rand(batch, tokens, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    likely = {
        "prefix": st.just(prefix),
        "mask": st.sampled_from([None, mask, mask.long(), mask[:, 1:]]),
        "size": st.sampled_from([None, torch.ones(batch, tokens), torch.ones(batch, tokens + 1)]),
        "grid": st.sampled_from([(1, tokens - prefix), (2, (tokens - prefix) // 2), (-1, prefix - tokens)]),
        "margin": st.just(0.5),
        **dict.fromkeys(("rows", "columns"), st.integers(0, 9)),
        "neighbors": st.integers(1, 40),
        "step": st.integers(1, 40),
        "seed": st.integers(0, 9),
        **dict.fromkeys(("importance", "sensitivity", "relevance", "saliency", "attention"), st.just(x.abs().sum(-1))),
        "text": st.sampled_from([x[:, :0], x[:, :2], x[..., :5]]),
        "text_mask": st.sampled_from([None, mask[:, :2], mask]),
        **dict.fromkeys(("tower", "pixels"), st.sampled_from([None, x[..., :2], x[:, 1:]])),
        "frames": st.sampled_from(
            [1, 2, 5, [(tokens,)] * batch, [(1, tokens - 1)] * batch, [(0,)] * batch, 0, "x", [3]]
        ),
    }
    needed = [
        key
        for key, parameter in taken.items()
        if parameter.default is parameter.empty and key not in ("features", "cells")
    ]
    more = data.draw(st.lists(st.sampled_from(list(taken)[1:]), max_size=3))
    options = {}
    for key in dict.fromkeys([*({"keep"} & set(taken)), *needed, *more]):
        tensor = (
            key in ("mask", "size", "text_mask", "tower", "pixels")
            or key in needed
            and key not in ("keep", "grid", "margin", "rows", "columns")
        )
        usual = likely.get(key, value(key))
        options[key] = data.draw(usual if tensor or data.draw(st.integers(0, 9)) else ODD)
    try:
        made = decide(x, **options)
    except vtc.VTCError as error:
        assert str(error) and "\n" not in str(error)
        return
    slots = made.anchor.shape[1]
    assert made.group.shape == (batch, tokens) and made.size.shape == made.anchor.shape == (batch, slots)
    assert (made.group >= -1).all() and (made.group < max(slots, 1)).all()
    merged = made.merge(x)
    assert merged.shape == made.gather(x).shape == (batch, slots, 6) and merged.isfinite().all()
    assert made.unmerge(merged, "nearest").shape == x.shape and repr(made)
    assert made.compose(vtc.TokenMap.identity(batch, slots)).group.equal(made.group)
    assert made.rank.shape == made.group.shape and made.drop_prefix(0) is made


def said(model, inputs):
    """The logits of two new tokens."""
    how = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**inputs, **how).logits, 1)


def promised(model, call, name, options):
    """An error in plain words, or an answer of the dense one's shape; and then the model is what it was."""
    dense, before = call(), mllm_zoo.fingerprint(model)
    patched = False
    try:
        with vtc.compress(model, name, **options) as handle:
            patched = True
            out = call()
            assert out.shape == dense.shape and out.isfinite().all()
            assert torch.equal(call(), out)
            assert repr(handle)
            if "1.0" in map(str, (options.get("keep"), options.get("flops"))) and "cascade" not in options:
                assert torch.equal(out, dense)
    except vtc.VTCError as error:
        assert any(word in str(error) for word in (name, *options)) and "\n" not in str(error)
    assert mllm_zoo.fingerprint(model) == before
    assert torch.equal(call(), dense)
    try:
        assert vtc.explain(model, name, **options).ok == patched
    except vtc.OptionError:
        assert not patched


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm-vit-dynamic", "timm-dinov3", "hf-dinov2"])
@settings(max_examples=25, deadline=None)
@given(asked(llm=False), st.integers(1, 3), st.sampled_from([(64, 64), (40, 96), (16, 8), (8, 8)]))
@torch.no_grad()
def test_encoders(name, ask, batch, size):
    net, images = zoo.model(name), zoo.pixels(batch, *size)
    promised(net, lambda: zoo.ZOO[name].read(net(images)), *ask)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@settings(max_examples=25, deadline=None)
@given(asked(llm=True), st.data())
def test_multimodal_llms(name, ask, data):
    model = mllm_zoo.build(name)
    inputs = mllm_zoo.inputs(name, data.draw(st.sampled_from(mllm_zoo.CASES[name])), data.draw(st.integers(0, 3)))
    promised(model, lambda: said(model, inputs), *ask)


# -- two models in two threads --------------------------------------------------------------------------------------


def encoder(name):
    net, images = copy.deepcopy(zoo.model(name)), zoo.pixels(2)
    return net, lambda: zoo.ZOO[name].read(net(images))


def llm(name):
    model, inputs = mllm_zoo.build(name, fresh=True), mllm_zoo.inputs(name, "ragged")
    return model, lambda: said(model, inputs)


PAIRS = [  # what the two threads run: a model of their own, and a method or None
    ((encoder, "timm-dinov2", "pitome"), (encoder, "timm-dinov2", "tome")),
    ((encoder, "hf-dinov2", "random"), (encoder, "hf-dinov2", None)),
    ((llm, "llava", "idpruner"), (llm, "llava", "fastv")),
    ((llm, "qwen2_5_vl", "visionzip"), (llm, "qwen2_5_vl", None)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " ".join(f"{name}-{method}" for _, name, method in pair))
def test_two_threads(pair):
    """Each gives what it gives alone, while both call, patch and remove."""
    start, errors = threading.Barrier(2), []

    def work(call, model, method, want, dense):
        try:
            start.wait(60)
            for _ in range(5):
                with torch.no_grad():
                    if method is not None:
                        handle = vtc.compress(model, method, keep=0.6)
                    assert all(torch.equal(call(), want) for _ in range(4))
                    if method is not None:
                        handle.remove()
                    assert torch.equal(call(), dense)
        except BaseException as error:
            errors.append(error)

    threads = []
    for make, name, method in pair:
        model, call = make(name)
        with torch.no_grad():
            dense = want = call()
            if method is not None:
                with vtc.compress(model, method, keep=0.6):
                    want = call()
                assert not torch.equal(want, dense)
        threads.append(threading.Thread(target=work, args=(call, model, method, want, dense)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# -- nothing is left ------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    """What was there before the test is not counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive():
    """Objects, and bytes of tensors, that were made since and are still there."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [each for each in objects if isinstance(each, torch.Tensor)]
    return len(objects), sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "name", "method"),
    [
        (encoder, "timm-dinov2", "pitome"),
        (encoder, "hf-dinov2", "downsample"),
        (llm, "llava", "idpruner"),
        (llm, "qwen2_5_vl", "dart"),
        (llm, "qwen2_5_vl", "tome"),
    ],
)
def test_ten_cycles_leave_nothing(make, name, method, fresh):
    model, call = make(name)
    with torch.no_grad():
        call()
        before, counts = mllm_zoo.fingerprint(model), []
        for _ in range(12):  # what is made once and kept, is made in the first two
            handle = vtc.compress(model, method, keep=0.6)
            call()
            assert handle.report and repr(handle.token_map)
            handle.remove()
            gone = [weakref.ref(each) for each in (handle, *handle.patches)]
            del handle
            counts.append(alive())
            assert not any(ref() for ref in gone)
            assert mllm_zoo.fingerprint(model) == before
    objects, tensors = zip(*counts[2:], strict=True)
    assert len(set(tensors)) == 1, counts
    # another thread may make some of its own once; what every cycle leaves shows as a new count each time
    assert len(set(objects)) <= 2 and objects[-1] - objects[0] < len(objects) - 1, counts


# -- a thousand pictures --------------------------------------------------------------------------------------------

PICTURES = int(os.environ.get("VTC_SOAK", 30))
WARM, MEGABYTES = 20, 8  # pictures before the memory is measured, and how much it may grow from then on


def photograph(seed):
    return mllm_processor.picture(seed, 60 + seed % 40, 80 - seed % 30)


def soak(show):
    """Show PICTURES pictures; the process's memory, in MB, after every tenth."""
    memory, trim = [], getattr(ctypes.CDLL(None), "malloc_trim", lambda spare: 0)  # glibc's: gives back what is free
    for number in range(1, PICTURES + 1):
        show(number)
        if number % 10 == 0:
            gc.collect()
            trim(0)
            memory.append(psutil.Process().memory_info().rss / 1e6)
    print("MB after every tenth picture:", *(f"{each:.0f}" for each in memory))
    assert max(memory[WARM // 10 :]) - max(memory[: WARM // 10]) < MEGABYTES, memory


@pytest.fixture
def small_encoder(monkeypatch):
    """The demo's encoder with random weights and three layers."""
    see = pytest.importorskip("vtc.demo.see")
    from transformers import Dinov2Config, Dinov2Model

    from vtc.checkpoints.dinov2 import PATCH, WIDTH, SaliencyDecoder, SaliencyModel

    config = Dinov2Config(hidden_size=WIDTH, num_attention_heads=6, num_hidden_layers=3, mlp_ratio=1, patch_size=PATCH)
    model = SaliencyModel(Dinov2Model(config), SaliencyDecoder()).eval()
    monkeypatch.setattr(see, "encoder", lambda: model)
    return see


@pytest.mark.slow
def test_soak_see(small_encoder, tmp_path):
    see, methods = small_encoder, ("pitome", "tome", "random", "downsample")

    def show(number):
        photograph(number).save(tmp_path / "picture.png")
        image = see.look.picture(str(tmp_path / "picture.png"))
        method = see.budget(methods[number % 4], "Tokens" if number % 3 else "Arithmetic", 100 if number % 3 else 0.7)
        seen = see.run(image, method, 1)
        for at, heat in ((0, "Energy"), (3, "Norm")):
            see.layer(seen, at, heat)
        assert see.figures(seen) and see.tokens_chart(seen)

    soak(show)


@pytest.mark.slow
def test_soak_ask(tmp_path, monkeypatch):
    ask = pytest.importorskip("vtc.demo.ask")
    monkeypatch.setattr(ask, "NEW_TOKENS", 2)
    folder, methods = (
        mllm_processor.save("qwen2_5_vl", tmp_path),
        [n for n, cls in METHODS.items() if n != "downsample" and not cls.rectangle],
    )

    def show(number):
        image, method = photograph(number), methods[number % len(methods)]
        found = ask.run(folder, image, "what is this ?", ask.budget(method, 0.5), 1)
        assert ask.answers(found, "this") and ask.answer.remains(image, found, 64)
        assert ask.sweep_html([(0.5, found)])

    soak(show)
