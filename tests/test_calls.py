"""What a call of a compressed encoder may be: its state, threads, replicas, recorders and torch.func, the keys it
hears, and what the report speaks of."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, model, pixels

import vtc

# -- state ----------------------------------------------------------------------------------------------------------


def test_nothing_rides_on_memory_that_outlives_a_call():
    """Block 0 is given another part of a buffer that it saw before, with grad on; then the same part, masked."""
    net = model("timm-dinov2")
    buffer, other = torch.randn(1, 65, 64), torch.randn(1, 33, 64)
    fresh = copy.deepcopy(net)
    mask = torch.ones(1, 1, 1, 33, dtype=torch.bool)
    mask[..., 20:] = False
    with vtc.compress(net, "tome", keep=0.8):
        net.blocks[0](buffer)
        buffer[:, :33] = other
        assert net.blocks[0](buffer[:, :33]).shape[1] == 27
        first = net.blocks[0](buffer[:, :33], attn_mask=mask)
        with vtc.compress(fresh, "tome", keep=0.8):
            assert torch.equal(first, fresh.blocks[0](other, attn_mask=mask))
            assert not torch.equal(first[:, :20], fresh.blocks[0](other)[:, :20])
    with vtc.compress(net, "tome", keep=0.8), torch.inference_mode():
        for _ in range(2):
            assert net.blocks[0](buffer[:, :33]).shape[1] == 27


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_models_are_checkpointed_on_one_buffer(reentrant):
    """Each finds its own state again in the backward pass, though both were given the same memory."""
    nets = [copy.deepcopy(model("timm-dinov2")) for _ in range(2)]
    x = torch.randn(1, 65, 64, requires_grad=True)

    def run(way):
        total = sum(
            way(block2, way(block1, way(block0, x * 1.0 if share is None else share))).pow(2).sum()
            for block0, block1, block2 in (net.blocks for net in nets)
        )
        x.grad = None
        total.backward()
        return x.grad.clone()

    with vtc.compress(nets[0], "tome", keep=0.8), vtc.compress(nets[1], "random", keep=0.7):
        share = None
        plain = run(lambda block, y: block(y))
        share = x * 1.0
        again = run(lambda block, y: checkpoint(block, y, use_reentrant=reentrant))
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm-dinov2", "hf-dinov2", "hf-siglip2", "hf-blip2", "open_clip-vit"])
@torch.no_grad()
def test_threads_in_one_model(name):
    """Each gives what it gives alone, and the report speaks of a whole call."""
    entry, net, start, errors = ZOO[name], copy.deepcopy(model(name)), threading.Barrier(4), []
    with vtc.compress(net, "tome", keep=0.7) as handle:
        calls = [entry.inputs(batch) for batch in (1, 2, 3)]
        want = [entry.run(net, call) for call in calls]

        def work(number):
            try:
                start.wait(60)
                for turn in range(12):
                    which = (number + turn) % 3
                    with torch.no_grad():
                        assert torch.equal(entry.run(net, calls[which]), want[which])
                    assert handle.report.images in (1, 2, 3) and len(handle.report.tokens) == 3
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        assert not handle.patches[0].others


@pytest.mark.parametrize("name", ["timm-dinov2", "open_clip-vit", "hf-clip"])
@torch.no_grad()
def test_data_parallel_replicas_are_refused(name):
    net = copy.deepcopy(model(name))

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        replica._modules = {key: child and replicate(child) for key, child in module._modules.items()}
        return replica

    with vtc.compress(net, "tome", keep=0.8):
        with pytest.raises(vtc.UnsupportedModelError, match="DistributedDataParallel"):
            ZOO[name].run(replicate(net), ZOO[name].inputs(1))
        ZOO[name].run(net, ZOO[name].inputs(1))


# -- recorders ------------------------------------------------------------------------------------------------------


def jit_trace(net, x):
    return torch.jit.trace(net, (x,), check_trace=False)


def onnx(net, x):
    import io

    return torch.onnx.export(net, (x,), io.BytesIO(), dynamo=False)


def fx(net, x):
    return torch.fx.symbolic_trace(nn.Sequential(*net.blocks, net.norm))


def script(net, x):
    return torch.jit.script(net)


@pytest.mark.parametrize("record", [jit_trace, onnx, fx, script])
@pytest.mark.parametrize(("method", "options"), [("tome", {"keep": 0.8}), ("downsample", {"keep": 0.5})])
@torch.no_grad()
def test_recorders_are_refused(record, method, options):
    net, x = copy.deepcopy(model("timm-vit-dynamic")), pixels(1)
    with vtc.compress(net, method, **options):
        with pytest.raises(vtc.UnsupportedModelError, match=r"torch.export.export\(model"):
            record(net, x)
        net(x)
    with vtc.compress(net, vtc.Downsample(keep=0.5, mode="resize")):
        if record in (jit_trace, onnx):
            with pytest.raises(vtc.UnsupportedModelError, match="torch.export.export"):
                record(net, x)


@torch.no_grad()
def test_a_model_that_keeps_all_is_recorded():
    net, x = copy.deepcopy(model("timm-dinov2")), pixels(1)
    dense = net(x)
    with vtc.compress(net, "tome", keep=1.0):
        assert torch.equal(jit_trace(net, x)(x), dense)


@pytest.mark.parametrize("name", ["timm-dinov2", "hf-dinov2"])
def test_torch_func(name):
    net = copy.deepcopy(model(name))
    entry, x = ZOO[name], pixels(2)
    key = "x" if name.startswith("timm") else "pixel_values"
    weights = dict(net.named_parameters())

    def loss(weights, x):
        return entry.read(torch.func.functional_call(net, weights, (), {key: x})).pow(2).mean()

    def each(weights, x):
        return torch.func.vmap(lambda one: loss(weights, one[None]))(x)

    want = torch.func.grad(loss)(weights, x), each(weights, x)
    with vtc.compress(net, "tome", keep=1.0):
        found = torch.func.grad(loss)(weights, x), each(weights, x)
    assert all(torch.equal(want[0][key], found[0][key]) for key in weights)
    assert torch.equal(want[1], found[1])
    with vtc.compress(net, "tome", keep=0.8) as handle:
        plain = torch.autograd.grad(loss(weights, x), list(weights.values()), allow_unused=True)
        found = torch.func.grad(loss)(weights, x)
        assert handle.report.after == (34, 34)
        for ours, theirs in zip(found.values(), plain, strict=True):
            torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)
        for transformed in (each, torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))):
            with pytest.raises(vtc.UnsupportedModelError, match="vmap hides the batch"):
                transformed(weights, x if transformed is each else x[:, None])


# -- what is heard attends ------------------------------------------------------------------------------------------


def lora(net, target):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, net)


def parametrized(net, target):
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * torch.linspace(0.2, 2, len(weight))[:, None]

    for name, module in net.named_modules():
        if name.endswith(target):
            nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


def swapped(net, target):
    torch.manual_seed(0)
    for name, module in list(net.named_modules()):
        if name.endswith(target):
            parent, _, last = name.rpartition(".")
            new = nn.Linear(module.in_features, module.out_features)
            setattr(net.get_submodule(parent), last, new)


@pytest.mark.parametrize("change", [lora, parametrized, swapped])
@pytest.mark.parametrize(
    ("name", "target"), [("timm-vit", "qkv"), ("hf-dinov2", "k_proj"), ("hf-clip-vision", "k_proj")]
)
@torch.no_grad()
def test_keys_are_heard_where_they_are_made(name, target, change):
    """A module that is put in the place of the one with the keys after `compress`: as if it had been there before."""
    after, before, entry = copy.deepcopy(model(name)), copy.deepcopy(model(name)), ZOO[name]
    change(before, target)
    with vtc.compress(before, "tome", keep=0.7) as handle:
        want, groups = entry.run(before, entry.inputs(2)), handle.token_map.group
    with vtc.compress(after, "tome", keep=0.7) as handle:
        plain = entry.run(after, entry.inputs(2))
        change(after, target)
        assert torch.equal(entry.run(after, entry.inputs(2)), want)
        assert torch.equal(handle.token_map.group, groups)
        assert not torch.equal(plain, want)
    hooks = [hook for module in after.modules() for hook in module._forward_hooks.values()]
    assert not any(type(hook).__module__.startswith("vtc") for hook in hooks)


@torch.no_grad()
def test_keys_that_are_computed_are_those_of_the_attention():
    net = copy.deepcopy(model("open_clip-vit")).visual
    with vtc.compress(net, "tome", keep=0.7):
        net(pixels(1))
        lora(net, "attn")
        with pytest.raises(vtc.InputError, match="block 0 .* and did with a MultiheadAttention .* compress it again"):
            net(pixels(1))


# -- what the report speaks of --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tome", "pitome", "random", "downsample"])
@pytest.mark.parametrize("name", ["timm-dinov2", "timm-vit-avg", "timm-qknorm"])  # whose dense models take none
@torch.no_grad()
def test_no_image_at_all(name, method):
    net, entry = model(name), ZOO[name]
    inputs = {k: v[:0] for k, v in entry.inputs(2).items()}
    dense = entry.run(net, inputs)
    with vtc.compress(net, method, keep=0.8) as handle:
        out = entry.run(net, inputs)
        assert handle.report.images == 0 and "0 images" in str(handle.report) and repr(handle)
        assert handle.report.kept == handle.report.macs_ratio == 1.0
        assert handle.token_map.anchor.shape[0] == 0
    assert out.shape == dense.shape


@torch.no_grad()
def test_a_call_without_an_image_says_so():
    net, text = model("open_clip-vit"), torch.tensor([[1, 7, 9, 49, 0, 0, 0, 0]])
    with vtc.compress(net, "tome", keep=0.8) as handle:
        net(text=text)
        with pytest.raises(vtc.VTCError, match="nothing to report yet"):
            _ = handle.report
        net(image=pixels(1), text=text)
        assert handle.report.notes == ""
        net(text=text)
        assert "no image in the last call" in str(handle.report)
        net(image=pixels(2))
        assert handle.report.notes == "" and handle.report.images == 2


@torch.no_grad()
def test_two_encoders_in_one_model():
    first, second = copy.deepcopy(model("timm-dinov2")), copy.deepcopy(model("timm-dinov2-reg"))
    net = nn.ModuleDict({"a": first, "b": second})
    with vtc.compress(net, "tome", keep=0.8) as handle:
        first(pixels(2))
        assert len(handle.reports) == 1
        second(pixels(1))
        assert [report.path for report in handle.reports] == ["a", "b"]
        assert handle.report.path == "b" and handle.report.images == 1 and handle.token_map.anchor.shape[0] == 1
        assert "encoder b, one of 2" in str(handle.report)
        assert "encoder a" in repr(handle) and "encoder b" in repr(handle)
        first(pixels(2))
        assert handle.report.path == "a" and handle.token_map.anchor.shape[0] == 2
