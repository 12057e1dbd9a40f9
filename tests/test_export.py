"""One graph for every batch size, torch.export with a batch of any size, and ONNX."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import vtc

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
METHODS = [("tome", {"keep": 0.8}), ("pitome", {"flops": 0.8})]


def small(kind, **more):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    return kind(**sizes, **more)


def models():
    torch.manual_seed(0)
    yield timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3)
    yield transformers.ViTModel(small(transformers.ViTConfig, intermediate_size=64))
    yield transformers.SiglipVisionModel(small(transformers.SiglipVisionConfig, intermediate_size=64))
    yield transformers.Dinov2Model(small(transformers.Dinov2Config))


MODELS = ("timm", "vit", "siglip", "dinov2")
QUICK = {("timm", "tome")}  # `make slow` has the others


@cache
def model_of(which):
    return dict(zip(MODELS, models(), strict=True))[which].eval()


def cases(methods, *more):
    """(model, method, options, *more): every model and every value of the others once, slow but for a few; all of them
    with `make matrix`. There are no more of the others than models."""
    found, others = [], list(product(methods, *more))
    assert len(others) <= len(MODELS)
    for turn, which in enumerate(MODELS):
        for place in range(len(others)):
            (name, options), *rest = others[(place + turn) % len(others)]
            quick = (which, name) in QUICK and (name, options) in METHODS and not any(rest)
            marks = () if quick else pytest.mark.matrix if place else pytest.mark.slow
            found.append(pytest.param(which, name, options, *rest, marks=marks, id=f"{which}-{name}-{options}-{rest}"))
    return found


def tokens(output):
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def batches(counts):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 64, 64, generator=generator) for n in counts]


def exported(model, export):
    """What `export` made of the model with a batch of any size, from three images."""
    many = torch.export.Dim("many", min=1, max=64)
    return export(model, tuple(batches([3])), dynamic_shapes=({0: many},))


@pytest.mark.parametrize(
    ("which", "name", "options"), cases([*METHODS, ("tome", {"keep": 9}), ("tome", {"r": [2, 0, 3]})])
)
@pytest.mark.filterwarnings("ignore")
def test_two_graphs_for_all_batch_sizes(which, name, options):
    model = model_of(which)
    torch._dynamo.reset()
    counter = CompileCounter()
    with vtc.compress(model, name, **options) as handle, torch.no_grad():
        compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
        for images in batches(range(1, 17)):
            torch.testing.assert_close(tokens(compiled(images)), tokens(model(images)))
            compiled(images)
            assert handle.report.images == len(images) == len(handle.token_map.group)
    assert counter.frame_count == 2  # one image, and more


@pytest.mark.parametrize(("which", "name", "options", "strict"), cases(METHODS, [False, True]))
@pytest.mark.filterwarnings("ignore")
def test_export(which, name, options, strict):
    model = model_of(which)
    with vtc.compress(model, name, **options) as handle, torch.no_grad():
        tokens(model(batches([2])[0]))
        before = handle.report
        program = exported(model, lambda *args, **more: torch.export.export(*args, **more, strict=strict)).module()
        assert str(handle.report) == str(before)  # exporting is no call
        for images in batches([1, 5]):
            torch.testing.assert_close(tokens(program(images)), tokens(model(images)))
        assert not any("vtc" in str(node.target) for node in program.graph.nodes)  # it runs where vtc is not


@pytest.mark.parametrize(("which", "name", "options"), cases(METHODS))
@pytest.mark.filterwarnings("ignore")
def test_onnx(which, name, options, tmp_path):
    model = model_of(which)
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = str(tmp_path / "model.onnx")
    with vtc.compress(model, name, **options), torch.no_grad():
        exported(model, lambda *args, **more: torch.onnx.export(*args, **more, dynamo=True, verbose=False)).save(path)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for images in batches([1, 5]):
            (out, *_) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
            torch.testing.assert_close(torch.from_numpy(out), tokens(model(images)), atol=1e-4, rtol=1e-4)
