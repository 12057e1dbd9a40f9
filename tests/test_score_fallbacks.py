"""A score that is not the one asked for says so; weights that are elsewhere are fetched, quantized ones left alone."""

from __future__ import annotations

import copy

import mllm_zoo as zoo
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import vtc
from vtc import scores


def run(model, inputs, method, **options):
    with vtc.compress(model, method, **options) as handle, torch.no_grad():
        logits = model(**inputs).logits
        return handle.token_map.group, handle.report.notes, logits


FAMILIES = ["llava", "internvl", "qwen2_5_vl", "gemma3"]
METHODS = [("zoo_prune", {}), ("zoo_prune", {"exact": True}), ("zoo_prune", {"exact": False, "probes": 8})]
METHODS += [("idpruner", {"importance": "sensitivity"})]


@pytest.mark.parametrize(("where", "dtype"), [("cpu", torch.float32), ("disk", torch.bfloat16)])
@pytest.mark.parametrize("name", FAMILIES)
def test_same_tokens_with_and_without_offload(name, where, dtype, tmp_path):
    """accelerate keeps the weights elsewhere, on meta until a module runs."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = zoo.build(name, fresh=True).to(dtype), zoo.inputs(name, "single")
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    methods = [(m, o) for m, o in METHODS if name != "gemma3" or o.get("exact") is not True]  # a linear projector
    want = [run(model, inputs, method, keep=0.4, **options) for method, options in methods]
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    assert all(p.is_meta for p in model.model.get_input_embeddings().parameters())
    for (method, options), (group, notes, logits) in zip(methods, want, strict=True):
        found = run(model, inputs, method, keep=0.4, **options)
        assert torch.equal(found[0], group) and found[1] == notes and torch.equal(found[2], logits), (method, options)
    assert all(p.is_meta for p in model.parameters())


class Packed(torch.Tensor):
    """As torchao's: a linear map works, and nothing else does."""

    @staticmethod
    def __new__(cls, weight):
        packed = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        packed.scale = weight.abs().amax(1, keepdim=True) / 127
        packed.codes = (weight / packed.scale).round().to(torch.int8)
        return packed

    def __repr__(self):
        return "Packed()"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(x):
            return (x.codes * x.scale).to(x.dtype) if isinstance(x, Packed) else x

        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.linear.default):
            return func(*tree_map(plain, args), **(kwargs or {}))
        if func is torch.ops.aten.t.default:
            return plain(args[0]).t()
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of {cls.__name__}")


def quantized(model, kind, projector="multi_modal_projector"):
    """The projector's weights as libraries hold them."""
    for part in model.get_submodule(f"model.{projector}").modules():
        if isinstance(part, nn.Linear) and kind == "subclass":
            part.weight = nn.Parameter(Packed(part.weight.detach()), requires_grad=False)
        elif isinstance(part, nn.Linear):  # 8-bit codes and a scale, undone on the way
            scale = part.weight.detach().abs().amax() / 127
            codes = (part.weight.detach() / scale).round()
            part.weight = nn.Parameter(codes.to(torch.int8 if kind == "int8" else torch.float8_e5m2), False)
            part.scale = scale
            part.__class__ = Coded


class Coded(nn.Linear):
    def forward(self, x):
        weight = self.weight.to(x.dtype) if self.weight.element_size() == 1 else self.weight
        return nn.functional.linear(x, weight * self.scale.to(x.dtype), None if self.bias is None else self.bias.to(x))


@pytest.mark.parametrize("kind", ["subclass", "int8", "float8"])
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_quantized_weights_are_not_read(name, kind, dtype):
    model, inputs = zoo.build(name, fresh=True).to(dtype), zoo.inputs(name, "single")
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    projector = "visual.merger" if name.startswith("qwen") else "multi_modal_projector"
    family = vtc.adapters.multimodal.families.FAMILIES["qwen_vl" if name.startswith("qwen") else name]
    dense = scores.sensitivity(
        family.projection(model.model).__class__(
            copy.deepcopy(model.get_submodule(f"model.{projector}")).float(), family.projection(model.model).run
        ),
        seen(family, model),
        exact=False,
    )
    quantized(model, kind, projector)
    for method, options in (("zoo_prune", {}), ("idpruner", {"importance": "sensitivity"})):
        _, notes, _ = run(model, inputs, method, keep=0.4, **options)
        assert "sensitivity by central differences: the projector's weights are quantized" in notes
    with vtc.compress(model, "zoo_prune", keep=0.4, exact=True), torch.no_grad():
        with pytest.raises(vtc.OptionError, match="exact=True: the projector's weights are quantized") as error:
            model(**inputs)
    assert "not of the form" not in str(error.value)
    coarse = scores.sensitivity(family.projection(model.model), seen(family, model), exact=False)
    order = torch.stack([dense.flatten().argsort().argsort(), coarse.flatten().argsort().argsort()]).double()
    assert torch.corrcoef(order)[0, 1] > 0.9  # what is left of the score is no rounding


def seen(family, model):
    """[1, 40, P, V], something for the projector to read; tokens differ in scale, so that they differ in score."""
    part = family.projector(model.model)
    norm = next((m for m in part.modules() if isinstance(m, nn.LayerNorm) or "RMSNorm" in type(m).__name__), None)
    first = next(m for m in part.modules() if isinstance(m, nn.Linear))
    patches = first.in_features // len(norm.weight) if norm is not None else 1
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(1, 40, 1, 1, generator=generator) * 3 + 0.2
    return torch.randn(1, 40, patches, first.in_features // patches, generator=generator) * scale


def test_a_form_without_a_formula():
    model, inputs = zoo.build("llava", fresh=True), zoo.inputs("llava", "single")
    model.model.multi_modal_projector = nn.Sequential(*[nn.Linear(48, 48), nn.GELU()] * 2, nn.Linear(48, 64))
    for method, options in (("zoo_prune", {}), ("idpruner", {"importance": "sensitivity"})):
        _, notes, _ = run(model, inputs, method, keep=0.4, **options)
        assert notes.endswith("differences: Sequential is not of the form [norm] - Linear - activation - Linear")
    assert run(model, inputs, "zoo_prune", keep=0.4, exact=False)[1] == ""  # as asked for


def test_a_score_that_is_flat():
    model, inputs = zoo.build("paligemma"), zoo.inputs("paligemma", "single")
    assert "equally sensitive to all tokens" in run(model, inputs, "zoo_prune", keep=0.4)[1]


@pytest.mark.parametrize(("method", "options"), [("cdpruner", {}), ("idpruner", {"importance": "relevance"})])
def test_a_prompt_without_text(method, options):
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    assert "holds no text" not in run(model, inputs, method, keep=0.4, **options)[1]
    image = inputs["input_ids"] == zoo.IMAGE
    bare = {**inputs, "input_ids": inputs["input_ids"][image][None], "attention_mask": torch.ones(1, 25).long()}
    assert "a prompt holds no text" in run(model, bare, method, keep=0.4, **options)[1]


def test_what_was_asked_for_says_nothing():
    for name, method in (("llava", "zoo_prune"), ("internvl", "zoo_prune"), ("llava", "visionzip"), ("llava", "scope")):
        assert run(zoo.build(name), zoo.inputs(name, "single"), method, keep=0.4)[1] == ""
