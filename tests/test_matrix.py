"""The promises of the design, over every method x adapter."""

import copy

import pytest
import torch
from pairs import matrix
from zoo import ZOO, model

import vtc

METHODS: dict[str, dict] = {name: {} for name, cls in vtc.methods.METHODS.items() if cls.encoder and cls.budgeted} | {
    "pitome-nearest": {"preset": "nearest", "protect": True},
    "pitome-paper": {"preset": "paper"},
    "pitome-head": {"preset": "head"},
    "pitome-text": {"preset": "text"},
    "pitome-hidden": {"metric": "hidden"},
    "downsample-resize": {"mode": "resize"},
}
CASES = [
    (name, method)
    for name, entry in ZOO.items()
    for method in METHODS
    if not (method.startswith("downsample") and entry.grid is None)
    if not (method == "downsample-resize" and not entry.resizes)
]


def make(method, **budget):
    return vtc.methods.make(method.split("-")[0], **METHODS[method], **budget)


def fingerprint(net):
    """Everything a patch could leave behind: modules, their attributes, hooks, parameters' identity."""
    return [
        (
            name,
            type(module),
            sorted((k, id(v)) for k, v in vars(module).items() if not isinstance(v, (dict, bool, int, float))),
            [list(map(id, hooks.values())) for hooks in (module._forward_hooks, module._forward_pre_hooks)],
            [list(d) for d in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs)],
            sorted((k, id(v)) for k, v in module._parameters.items()),
        )
        for name, module in net.named_modules()
    ]


def shown(case):
    """Every method in every library, and every model with every way to have fewer tokens."""
    name, method = case
    way = "matching" if method.startswith(("tome", "pitome")) else method
    return {(name.split("-")[0], method), (name, way)}


@matrix("name, method", CASES, shown)
@torch.no_grad()
def test_promises(name, method):
    entry, net = ZOO[name], model(name)
    inputs = entry.inputs(2)
    dense, before, keys = entry.run(net, inputs), fingerprint(net), list(net.state_dict())

    # keep=1.0 is bit-identical, and says so in the report
    with vtc.compress(net, make(method, keep=1.0)) as handle:
        assert torch.equal(entry.run(net, inputs), dense)
        assert handle.report.macs_after == handle.report.macs_before
        assert handle.report.before == handle.report.after
    assert fingerprint(net) == before

    # fewer tokens: something happens, the shape stays, the same inputs give the same outputs
    with vtc.compress(net, make(method, keep=0.7)) as handle:
        out = entry.run(net, inputs)
        report, token_map = handle.report, handle.token_map
        assert out.shape == dense.shape
        assert out.isfinite().all()
        assert not torch.equal(out, dense)
        assert torch.equal(entry.run(net, inputs), out)
        assert all(after < count for after, count in zip(report.after, report.before, strict=True))
        assert report.macs_after < report.macs_before
        assert token_map.mask().sum(1).tolist() == list(report.after)
        assert list(net.state_dict()) == keys
        if handle.method.merges:  # merges conserve the number of patches
            assert token_map.size.sum(1).tolist() == list(report.before)

        # a batch gives what its items give alone
        for item in range(2):
            alone = {k: v[item : item + 1] if len(v) == 2 else v for k, v in inputs.items()}
            if name == "hf-siglip2":
                real = int(alone["pixel_attention_mask"].sum())
                alone = {k: v[:, :real] if v.ndim > 1 and k != "spatial_shapes" else v for k, v in alone.items()}
            single = entry.run(net, alone)
            torch.testing.assert_close(single, out[item : item + 1], rtol=1e-4, atol=1e-5)
            assert handle.report.after == report.after[item : item + 1]
            assert torch.equal(handle.token_map.group[0], token_map.group[item, : handle.token_map.group.shape[1]])

    # removal leaves no trace
    assert fingerprint(net) == before
    assert torch.equal(entry.run(net, inputs), dense)

    # nor does an exception in the middle of a call
    last = [m for m in net.modules() if "Norm" in type(m).__name__][-2]

    def fail(*_):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"), vtc.compress(net, make(method, keep=0.7)):
        hook = last.register_forward_pre_hook(fail)
        try:
            entry.run(net, inputs)
        finally:
            hook.remove()
    assert fingerprint(net) == before
    assert torch.equal(entry.run(net, inputs), dense)


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_patch_touches_one_instance(name):
    entry, net = ZOO[name], model(name)
    other = copy.deepcopy(net)
    inputs = entry.inputs(1)
    dense = entry.run(other, inputs)
    with vtc.compress(net, "tome", keep=0.7):
        assert torch.equal(entry.run(other, inputs), dense)
        copied = copy.deepcopy(net)
        compressed = entry.run(net, inputs)
    assert torch.equal(entry.run(net, inputs), dense)
    assert torch.equal(entry.run(copied, inputs), compressed)  # the copy kept its patch
    vtc.remove(copied)
    assert torch.equal(entry.run(copied, inputs), dense)
    assert copied.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("name", ZOO)
def test_gradients_reach_every_patch(name):
    """Merging loses no token: with ToMe and PiToMe every pixel that the model reads gets a gradient."""
    entry, net = ZOO[name], model(name)
    inputs = entry.inputs(1)
    image = next(k for k, v in inputs.items() if v.is_floating_point() and v.ndim > 2)

    def gradient():
        leaf = inputs[image].clone().requires_grad_()
        out = entry.run(net, {**inputs, image: leaf})
        aim = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))  # CLIP's squares sum to 1
        return torch.autograd.grad((out.float() * aim).sum(), leaf)[0]

    read = gradient() != 0
    assert read.float().mean() > 0.4  # ViT-MAE hides half
    for method in ("tome", "pitome"):
        with vtc.compress(net, method, keep=0.7):
            found = gradient()
        assert found.isfinite().all()
        if entry.grid is not None:
            assert (found[read] != 0).float().mean() > 0.99


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_reduced_precision(name):
    entry, net = ZOO[name], model(name)
    inputs = entry.inputs(2)
    for dtype in (torch.bfloat16, torch.float16):
        with vtc.compress(net, "pitome", keep=0.7) as handle, torch.autocast("cpu", dtype):
            out = entry.run(net, inputs)
            assert out.isfinite().all()
            assert handle.token_map.size.dtype == torch.float32
            assert torch.equal(entry.run(net, inputs), out)


@pytest.mark.parametrize("name", [n for n, e in ZOO.items() if e.grid is None])
def test_downsample_refuses_patches_without_rows_and_columns(name):
    with pytest.raises(vtc.UnsupportedModelError, match="shuffle|have a third axis, time"):
        vtc.compress(model(name), "downsample", keep=0.5)


@pytest.mark.parametrize("name", [n for n, e in ZOO.items() if not e.resizes and e.grid is not None])
def test_resize_refusals_say_why(name):
    before = fingerprint(model(name))
    with pytest.raises(vtc.UnsupportedModelError, match='mode="pool" works'):
        vtc.compress(model(name), "downsample", keep=0.5, mode="resize")
    assert fingerprint(model(name)) == before


@pytest.mark.parametrize("name", ["hf-siglip2", "timm-naflex", "timm-naflex-rope"])
@torch.no_grad()
def test_padding_is_invisible(name):
    """Whatever stands in the padding changes nothing, and padding is never kept."""
    entry, net = ZOO[name], model(name)
    inputs = entry.inputs(2)
    patches = next(iter(inputs))
    other = {**inputs, patches: inputs[patches].clone()}
    other[patches][1, 48:] = 7.0
    for method in METHODS:
        if method == "downsample-resize":
            continue
        with vtc.compress(net, make(method, keep=0.7)) as handle:
            torch.testing.assert_close(entry.run(net, inputs), entry.run(net, other), rtol=0, atol=1e-6)
            group = handle.token_map.group
            assert (group[1, 48:] == -1).all()
            if handle.method.merges:
                assert (group[1, :48] >= 0).all()


@torch.no_grad()
def test_batch_of_64_equals_singles():
    net = model("timm-dinov2")
    images = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    for method in METHODS:
        if method == "downsample-resize":
            continue
        with vtc.compress(net, make(method, keep=0.8)) as handle:
            together, groups = net(images), handle.token_map.group
            for item in (0, 31, 63):
                torch.testing.assert_close(net(images[item : item + 1])[0], together[item], rtol=1e-4, atol=1e-5)
                assert torch.equal(handle.token_map.group[0], groups[item])
