"""What people do with a model besides calling it: compile, export, checkpoint, train, copy, save, resize."""

import copy
import io

import pytest
import torch
from pairs import matrix
from zoo import ZOO, model, pixels, randomise

import vtc

METHODS = ("pitome", "tome", "random", "downsample")
FAMILIES = ("timm-dinov2", "timm-eva02", "timm-beit", "open_clip-vit", "hf-dinov3", "hf-siglip-vision", "hf-beit")

GRAPHS = [("timm-dinov2", method) for method in METHODS] + [(name, "pitome") for name in FAMILIES[1:]]


def positional(name, net):
    """The model as a function of pixels alone, as compile and export want it."""
    entry = ZOO[name]
    inputs = entry.inputs(2)
    image = next(k for k, v in inputs.items() if v.ndim == 4)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net.visual if name.startswith("open_clip") else net

        def forward(self, x):
            return self.net(x) if name.startswith("open_clip") else entry.read(self.net(**{image: x}))

    return Net().eval(), inputs[image]


@pytest.mark.slow
@matrix("name, method", GRAPHS, lambda case: {case[0].split("-")[0], case[1]})  # every library, every method
@torch.no_grad()
def test_compile_fullgraph(name, method):
    net, x = positional(name, model(name))
    torch._dynamo.reset()
    with vtc.compress(net, method, keep=0.8) as handle:
        eager, tokens = net(x), handle.report
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), eager, rtol=1e-4, atol=1e-5)
        assert handle.report == tokens


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_follows_compress_and_remove():
    net, x = copy.deepcopy(model("timm-dinov2")), pixels(1)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    dense = net(x)
    assert torch.equal(compiled(x), dense)
    for method in (vtc.ToMe(keep=0.8), vtc.ToMe(keep=0.6)):
        with vtc.compress(net, method):
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
            assert not torch.equal(compiled(x), dense)
        assert torch.equal(compiled(x), dense)


@pytest.mark.slow
@torch.no_grad()
def test_compile_with_inductor():
    net, x = positional("timm-dinov2", model("timm-dinov2"))
    torch._dynamo.reset()
    with vtc.compress(net, "pitome", keep=0.8):
        eager = net(x)
        torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), eager, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), GRAPHS)
@torch.no_grad()
def test_export(name, method):
    net, x = positional(name, copy.deepcopy(model(name)))
    with vtc.compress(net, method, keep=0.8):
        eager = net(x)
        exported = torch.export.export(net, (x,), strict=False)
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(exported.module()(x), eager, rtol=1e-4, atol=1e-5)
    with vtc.compress(net, method, keep=0.8):
        torch.testing.assert_close(exported.module()(other), net(other), rtol=1e-4, atol=1e-5)


def gradients(net, run):
    net.zero_grad()
    run().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


CHECKPOINTED = [
    *((name, None) for name in ("timm-dinov2", "timm-eva02", "timm-beit", "open_clip-vit")),
    *((name, reentrant) for name in ("hf-dinov2", "hf-siglip2") for reentrant in (False, True)),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "reentrant"), CHECKPOINTED)
def test_activation_checkpointing(name, reentrant, method):
    """Recomputation in the backward pass finds the state of its own call, also with two calls pending."""
    entry, net = ZOO[name], copy.deepcopy(model(name)).train()
    first, second = entry.inputs(2), entry.inputs(1)

    def run():
        return entry.run(net, first).pow(2).sum() + 3 * entry.run(net, second).pow(2).sum()

    with vtc.compress(net, method, keep=0.8):
        plain = gradients(net, run)
        if reentrant is None:
            net.set_grad_checkpointing(True)
        else:
            enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        again = gradients(net, run)
    assert set(again) == set(plain)
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-5)


def test_training_steps_lower_the_loss():
    net = copy.deepcopy(model("timm-dinov2")).train()
    images, labels = pixels(8), torch.arange(8) % 5
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    with vtc.compress(net, "pitome", keep=0.8):
        for _ in range(8):
            loss = torch.nn.functional.cross_entropy(net(images), labels)
            optimiser.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["hf-dinov2", "hf-dinov3", "timm-dinov3", "open_clip-vit"])
@torch.no_grad()
def test_state_dict_and_whole_model_survive_saving(name):
    net, x = randomise(ZOO[name].build()), ZOO[name].inputs(2)
    run = ZOO[name].run
    dense = run(net, x)
    with vtc.compress(net, "pitome", keep=0.8):
        compressed = run(net, x)
        buffer, whole = io.BytesIO(), io.BytesIO()
        torch.save(net.state_dict(), buffer)
        torch.save(net, whole)
    fresh = ZOO[name].build().eval()
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(run(fresh, x), dense)
    whole.seek(0)
    loaded = torch.load(whole, weights_only=False)
    assert torch.equal(run(loaded, x), compressed)
    vtc.remove(loaded)
    assert torch.equal(run(loaded, x), dense)


@torch.no_grad()
def test_moved_and_cast_models_stay_compressed():
    net = copy.deepcopy(model("timm-dinov2"))
    with vtc.compress(net, "tome", keep=0.8) as handle:
        out = net.to(torch.bfloat16)(pixels(2).bfloat16())
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
        net.double()(pixels(2).double())
        assert handle.report.after == (34, 34)


@pytest.mark.parametrize("name", ["timm-vit-dynamic", "timm-dinov3", "hf-dinov2", "hf-dinov3"])
@torch.no_grad()
def test_other_and_changing_image_sizes(name):
    net = model(name)
    key = "x" if name.startswith("timm") else "pixel_values"
    for method in METHODS:
        with vtc.compress(net, method, keep=0.8) as handle:
            for height, width in ((64, 64), (96, 40), (40, 120), (64, 64)):
                image = pixels(1, height, width)
                out = net(**{key: image})
                assert handle.report.before == (height * width // 64,)
                assert handle.report.after[0] < handle.report.before[0]
                assert ZOO[name].read(out).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_intermediates_have_full_length(method):
    net, x = model("timm-dinov2"), pixels(2)
    with vtc.compress(net, method, keep=0.8):
        final, layers = net.forward_intermediates(x)
        assert torch.equal(final, net.forward_features(x))
        assert [layer.shape for layer in layers] == [(2, 64, 8, 8)] * 3
    clip = model("open_clip-vit").visual
    with vtc.compress(clip, method, keep=0.8):
        found = clip.forward_intermediates(x)
        assert [layer.shape for layer in found["image_intermediates"]] == [(2, 64, 8, 8)] * 3
        torch.testing.assert_close(found["image_features"], clip(x))


@torch.no_grad()
def test_a_watched_block_shows_full_length_and_changes_nothing():
    net, x, seen = model("timm-dinov2"), pixels(2), []
    with vtc.compress(net, "pitome", keep=0.8):
        out = net(x)
        hooks = [block.register_forward_hook(lambda m, a, o: seen.append(o.shape)) for block in net.blocks]
        try:
            torch.testing.assert_close(net(x), out, rtol=1e-5, atol=1e-6)
        finally:
            for hook in hooks:
                hook.remove()
    assert seen == [(2, 65, 64)] * 3


@torch.no_grad()
def test_accelerate_hooks_keep_working():
    import accelerate

    net, x = copy.deepcopy(model("timm-dinov2")), pixels(2)
    with vtc.compress(net, "tome", keep=0.8):
        expected = net(x)
    for module in net.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    with vtc.compress(net, "tome", keep=0.8) as handle:
        assert torch.equal(net(x), expected)
        assert handle.report.after == (34, 34)
    assert not torch.equal(net(x), expected)
