"""What a handle says of a multimodal LLM's calls: of which one, with what costs, and never an error of its own."""

from __future__ import annotations

import copy

import mllm_zoo as zoo
import pytest
import torch
from test_mllm_positions import DECODERS, build
from torch import nn

import vtc
from vtc.macs import decoder_macs, linear_weights

OLD = "the last prompt held no image: this is of the last one that did"


@pytest.mark.parametrize(
    ("method", "options"), [("divprune", {}), ("fastv", {"layer": 1}), ("tome", {"where": "tower"})]
)
def test_a_prompt_without_images_afterwards(method, options):
    model, inputs, text = zoo.build("llava"), zoo.inputs("llava", "single"), zoo.inputs("llava", "text")
    with vtc.compress(model, method, keep=0.5, **options) as handle, torch.no_grad():
        model(**text)
        with pytest.raises(vtc.VTCError, match="no call with an image"):
            str(handle.report)
        for attempt in (model, lambda **given: model.generate(**given, max_new_tokens=3, do_sample=False)):
            attempt(**inputs)
            first = handle.report
            assert OLD not in first.notes and OLD not in repr(handle)
            attempt(**text)
            later = handle.report
            assert OLD in later.notes and OLD in repr(handle) and later.before == first.before
            assert handle.token_map.group.shape == (1, 25) and handle.kept.shape == inputs["input_ids"].shape
        out = model(**inputs, use_cache=True)
        assert OLD not in handle.report.notes
        model(input_ids=torch.tensor([[7, 8, 9]]), **{zoo.CACHE: out[zoo.CACHE]})  # a turn of the same conversation
        assert OLD not in handle.report.notes


@pytest.mark.parametrize("case", ["decoder", "tower"])
@pytest.mark.parametrize(
    ("method", "options"), [("divprune", {}), ("fastv", {"layer": 1}), ("tome", {"where": "tower"})]
)
def test_a_call_that_breaks_off(method, options, case):
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    pair = zoo.inputs("llava", "pair")
    part = model.model.language_model.norm if case == "decoder" else model.model.vision_tower

    def stop(*args):
        raise KeyboardInterrupt

    with vtc.compress(model, method, keep=0.5, **options) as handle, torch.no_grad():
        model(**inputs)
        before = handle.report
        hook = part.register_forward_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                model(**pair)
        finally:
            hook.remove()
        assert handle.report == before
        model(**pair)
        assert handle.report.images == 2


def test_the_model_that_ran_last():
    both = nn.ModuleList([copy.deepcopy(zoo.build("llava")), copy.deepcopy(zoo.build("paligemma"))])
    inputs = [zoo.inputs("llava", "pair"), zoo.inputs("paligemma", "single")]
    with vtc.compress(both, "divprune", keep=0.5) as handle, torch.no_grad():
        for which, images in ((0, 2), (1, 1), (0, 2)):
            both[which](**inputs[which])
            assert handle.report.images == images and handle.report.path == f"{which}.model"


# -- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["llama", "qwen3_5", "lfm2", "deepseek_v3", "gemma3"])
def test_macs_are_those_of_the_layers(decoder):
    """Against a count by hooks on what runs: linear maps by their rows, experts by the tokens sent to them."""
    model = build(decoder)
    text, config = model.model.language_model, model.model.language_model.config
    seen, hooks, number = [], [], 12

    def linear(module, args, out):
        seen.append(args[0].numel() // args[0].shape[-1] * module.weight.numel())

    for layer in text.layers:
        hooks += [m.register_forward_hook(linear) for m in layer.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        text(inputs_embeds=torch.randn(1, number, config.hidden_size))
    for hook in hooks:
        hook.remove()
    attended = [m for layer in text.layers for m in layer.modules() if type(m).__name__.endswith("Attention")]
    half = sum(
        config.num_attention_heads * (getattr(m, "qk_head_dim", 16) + getattr(m, "v_head_dim", 16)) for m in attended
    )
    experts = 0
    if decoder == "deepseek_v3":
        experts = (
            2
            * number
            * sum(
                p[0].numel() * config.num_experts_per_tok
                for layer in text.layers
                for p in layer.parameters()
                if p.ndim == 3
            )
            // 2
        )
    assert decoder_macs(text, number) == sum(seen) + experts + half // 2 * number**2
    inputs = zoo.inputs("llava", "single")
    with vtc.compress(model, "divprune", keep=0.3) as handle, torch.no_grad():
        model(**inputs)
        assert 0 < handle.report.macs_ratio < 1 and "GMACs" in repr(handle)


def test_macs_of_quantized_layers():
    """What counts is the map's size, not how its weights are packed."""
    plain, packed = nn.Linear(8, 6), nn.Linear(8, 6)
    packed.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    assert linear_weights(plain) == linear_weights(packed) == 48


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["lfm2", "qwen3_5"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fastv", {"layer": 1}),
        ("dart", {"layer": 1}),
        ("dpc_knn", {"cascade": {1: 0.5}}),
        ("dpc_knn", {"proportional": True}),
    ],
)
def test_layers_without_attention(decoder, method, options):
    assert "linear_attention" in str(DECODERS[decoder]) or "conv" in str(DECODERS[decoder])
    with pytest.raises(vtc.UnsupportedModelError, match="layer 0 of this decoder .* is no attention and keeps"):
        vtc.compress(build(decoder), method, keep=0.5, **options)


@pytest.mark.parametrize("call", [vtc.compress, vtc.explain])
@pytest.mark.parametrize("options", [{"keep": 0.25}, {"keep": 12}, {"flops": 0.5}, {}])
def test_auto_with_a_budget(call, options):
    with pytest.raises(vtc.OptionError, match='keep="auto", inputs=.* with a budget of your own, name the method'):
        call(zoo.build("llava"), "auto", **options)
