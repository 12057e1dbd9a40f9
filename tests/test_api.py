"""compress, remove, explain, Handle and configs: what they promise when things go wrong, and what they tell."""

import copy
import json
import logging

import pytest
import torch
from zoo import ZOO, model, pixels

import vtc

BAD = [
    ("pitom", {"keep": 0.9}, "did you mean 'pitome'"),
    ("nonsense", {"keep": 0.9}, "choose one of pitome, tome, "),
    (7, {"keep": 0.9}, "it takes a name"),
    ("pitome", {}, "no budget"),
    ("pitome", {"keep": 0}, "keep=0"),
    ("pitome", {"keep": 1.2}, "out of range"),
    ("pitome", {"keep": "abc"}, "not str"),
    ("pitome", {"keep": 0.9, "flops": 0.5}, "keep and flops given together"),
    ("pitome", {"ratio": 0.9}, "use keep="),
    ("pitome", {"keep": 0.9, "margn": 1}, "no option 'margn'"),
    ("pitome", {"keep": 0.9, "energy": "soft"}, "energy='soft'"),
    ("pitome", {"keep": 0.9, "preset": "best"}, "preset='best'"),
    ("pitome", {"keep": 0.9, "metric": "values"}, "metric='values'"),
    ("pitome", {"keep": 0.9, "margin": float("nan")}, "finite"),
    ("pitome", {"keep": 0.9, "energy": "gaussian", "margin": 1.0}, "below 1"),
    ("pitome", {"keep": 0.9, "preset": "nearest", "margin": 0.9}, "margin= and alpha= say nothing"),
    ("downsample", {"keep": 0.5, "mode": "crop"}, "mode='crop'"),
    ("downsample", {"r": 8}, "reduces once"),
    ("tome", {"r": -3}, "r=-3"),
    ("tome", {"flops": 2}, "flops=2"),
    ("tome+tea", {"keep": 0.9}, "tome.tea: after a . comes one of ppe, proportional"),
    ("tome+ppe", {"keep": 0.9, "positions": "original"}, "tome.ppe: positions= is given beside it"),
    ("random+ppe", {"keep": 0.9}, "random drops tokens"),
]


def test_a_name_and_an_option():
    method = vtc.methods.make("tome+ppe+proportional", keep=0.5)
    assert method == vtc.ToMe(keep=0.5, positions="ppe", proportional=True) and method.name == "tome"
    for label in ("tome", "tome+ppe", "pitome+proportional", "visionzip+ppe+proportional"):
        assert vtc.methods.make(label, keep=0.5).label == label


@pytest.mark.parametrize(("method", "options", "message"), BAD)
def test_bad_options_change_nothing(method, options, message):
    net = model("timm-dinov2")
    with pytest.raises(vtc.OptionError, match=message):
        vtc.compress(net, method, **options)
    assert not any("forward" in vars(block) for block in net.blocks)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (vtc.ToMe(keep=0.3), "a layer keeps at least half"),
        (vtc.PiToMe(keep=0.49), "a layer keeps at least half"),
        (vtc.ToMe(r=[3, 2]), "lists 2 layers, but the encoder has 3"),
    ],
)
def test_budgets_that_do_not_fit_the_encoder(method, message):
    with pytest.raises(vtc.UnsupportedModelError, match=message):
        vtc.compress(model("timm-dinov2"), method)


@torch.no_grad()
def test_budgets_that_do_not_fit_the_image():
    net = model("timm-dinov2")
    dense = net(pixels(1))
    for method, message in [(vtc.ToMe(keep=65), "more than the image's 64"), (vtc.ToMe(keep=3), "leave 8")]:
        with vtc.compress(net, method), pytest.raises(vtc.OptionError, match=message):
            net(pixels(1))
    assert torch.equal(net(pixels(1)), dense)


def test_models_without_tokens():
    with pytest.raises(vtc.UnsupportedModelError, match="holds no vision encoder"):
        vtc.compress(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), "tome", keep=0.9)
    with pytest.raises(vtc.OptionError, match="model is a str"):
        vtc.compress("resnet50", "tome", keep=0.9)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "windows"),
        ("hiera_tiny_224", "pool"),
        ("resnet18", "convolutions"),
        ("levit_128s", "grids of several sizes"),
    ],
)
def test_timm_models_that_cannot_be_reduced(name, reason):
    import timm

    net = timm.create_model(name, pretrained=False)
    plan = vtc.explain(net)
    assert not plan.ok and reason in str(plan)
    with pytest.raises(vtc.UnsupportedModelError):
        vtc.compress(net, "tome", keep=0.9)


def test_parallel_blocks_are_refused():
    import timm

    net = timm.create_model("vit_base_patch16_18x2_224", pretrained=False, depth=2, embed_dim=64, num_heads=4)
    assert "are not one attention and one MLP behind it: attns (ModuleList), ffns (ModuleList)" in str(vtc.explain(net))


def test_a_block_that_computes_something_else_is_refused():
    """The trial: whatever a subclass adds, or a new version changes, is noticed before anything is patched."""
    net = copy.deepcopy(model("timm-dinov2"))

    class Odd(type(net.blocks[1])):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x, attn_mask, is_causal) + 1e-6

    net.blocks[1].__class__ = Odd
    with pytest.raises(vtc.UnsupportedModelError, match="block 1 .Odd. computes something vtc does not know"):
        vtc.compress(net, "tome", keep=0.9)
    assert not any("forward" in vars(block) for block in net.blocks)


def test_nan_weights_are_named():
    net = copy.deepcopy(model("timm-dinov2"))
    torch.nn.init.constant_(net.blocks[2].mlp.fc1.bias, float("nan"))
    with pytest.raises(vtc.UnsupportedModelError, match="block 2 .* check the model's weights"):
        vtc.compress(net, "tome", keep=0.9)


@torch.no_grad()
def test_nan_names_the_place():
    net = model("timm-dinov2")
    with vtc.compress(net, "pitome", keep=0.8), pytest.raises(vtc.InputError, match="layer 0 hold NaN"):
        net(pixels(1) * float("nan"))
    assert net(pixels(1)).isfinite().all()


@torch.no_grad()
def test_attention_masks_that_are_no_padding_are_refused_where_tokens_merge():
    net = model("timm-dinov2")
    with vtc.compress(net, "tome", keep=0.8):
        with pytest.raises(vtc.InputError, match="causal"):
            net(pixels(1), is_causal=True)
        mask = torch.ones(1, 1, 65, 65, dtype=torch.bool).tril()
        with pytest.raises(vtc.InputError, match="tells tokens apart that were merged"):
            net(pixels(1), attn_mask=mask)
        padding = torch.ones(1, 1, 65, 65, dtype=torch.bool)
        padding[..., 50:] = False
        assert net(pixels(1), attn_mask=padding).isfinite().all()


@torch.no_grad()
def test_compressing_again_replaces_the_method():
    net = copy.deepcopy(model("timm-dinov2"))
    dense = net(pixels(1))
    first = vtc.compress(net, "tome", keep=0.8)
    second = vtc.compress(net, "pitome", keep=0.6)
    net(pixels(1))
    assert second.report.method == "pitome"
    first.remove()  # its patch is gone already: the second one stays
    net(pixels(1))
    assert not torch.equal(net(pixels(1)), dense)
    with pytest.raises(vtc.OptionError):
        vtc.compress(net, "tome", keep=7.5)
    assert not torch.equal(net(pixels(1)), dense)  # a failed call takes nothing off
    second.remove()
    second.remove()
    assert torch.equal(net(pixels(1)), dense)


@torch.no_grad()
def test_the_report_adds_up():
    net = model("timm-dinov2-reg")
    with vtc.compress(net, "tome", r=[4, 0, 6]) as handle:
        with pytest.raises(vtc.VTCError, match="nothing to report yet"):
            _ = handle.report
        assert "no call yet" in repr(handle)
        net(pixels(3))
        report = handle.report
    assert report.before == (64,) * 3 and report.after == (54,) * 3 and report.images == 3
    assert report.tokens == ((69, 65), (65, 65), (65, 59))
    assert report.to_dict()["macs_ratio"] == report.macs_after / report.macs_before
    assert "64 -> 54 image tokens (84.4% kept, 15.6% removed), 3 images" in str(report)
    assert json.dumps(report.to_dict())
    assert [m.anchor.shape[1] for m in handle.layer_maps] == [60, 54]
    assert "tome(r=(4, 0, 6))" in repr(handle)


@torch.no_grad()
def test_flops_budget_is_kept_on_the_model():
    for name in ("timm-dinov2", "open_clip-vit"):
        net = model(name)
        run = net.visual if name == "open_clip-vit" else net
        for method in ("tome", "pitome", "random", "downsample"):
            with vtc.compress(net, method, flops=0.8) as handle:
                run(pixels(2))
                assert 0.7 < handle.report.macs_ratio <= 0.8
    net = model("timm-vit-dynamic")
    with vtc.compress(net, "downsample", mode="resize", flops=0.5) as handle:
        net(pixels(1))
        assert 0.35 < handle.report.macs_ratio <= 0.5


def test_macs_agree_with_torchs_own_counter():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    hybrids = ("timm-hybrid", "timm-mobileclip", "timm-vitamin")  # whose patches come out of a network
    for name in ("timm-dinov2", "timm-siglip", "hf-clip-vision", *hybrids):
        net, entry = model(name), ZOO[name]
        with vtc.compress(net, "tome", keep=1.0) as handle:
            # the counter does not know the fused attention of the CPU, but its plain products
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                entry.run(net, entry.inputs(1))
            assert counter.get_total_flops() / 2 == pytest.approx(handle.report.macs_before, rel=0.02)


def test_explain_changes_nothing_and_is_data():
    net = model("timm-dinov2")
    training = [m.training for m in net.modules()]
    state = torch.get_rng_state()
    plan = vtc.explain(net, "pitome")
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == training
    assert plan.ok and plan.to_dict()["encoders"][0]["layers"] == 3
    assert json.dumps(plan.to_dict())
    assert vtc.explain(net).ok
    with vtc.compress(net, "tome", keep=0.9):
        assert vtc.explain(net, "pitome").ok


def test_a_margin_without_a_preset_means_the_papers():
    assert vtc.PiToMe(keep=0.9).option("energy") == "nearest"
    given = vtc.PiToMe(keep=0.9, margin=0.8)
    assert (given.option("energy"), given.option("margin"), given.option("protect")) == ("paper", (0.8, 0.0), (0, 1))
    assert vtc.PiToMe(keep=0.9, energy="elu").option("margin") == (0.9, 0.0)


def test_a_failure_half_way_leaves_nothing(monkeypatch):
    net = copy.deepcopy(model("timm-dinov2"))
    hook, calls = torch.nn.Module.register_forward_hook, []

    def fails_late(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("planted")
        return hook(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", fails_late)
    with pytest.raises(RuntimeError, match="planted"):
        vtc.compress(net, "tome", keep=0.8)
    for module in net.modules():
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


def test_lists():
    named = "pitome tome idpruner zoo_prune divprune visionzip dpc_knn random downsample"
    assert set(named.split()) <= set(vtc.list_methods())
    assert {"timm", "open_clip", "huggingface", "llava", "qwen_vl", "gemma3"} <= set(vtc.list_adapters())


def test_config_round_trip(tmp_path, caplog):
    path = tmp_path / "method.json"
    for method in (
        vtc.PiToMe(keep=0.9, margin=(0.8, 0.1), protect=(0.5, 1.0)),
        vtc.ToMe(r=[3, 2, 1]),
        vtc.Downsample(flops=0.5, mode="resize"),
        vtc.Random(keep=12, seed=4),
    ):
        vtc.save_config(method, path)
        assert vtc.load_config(path) == method
    handle = vtc.compress(copy.deepcopy(model("timm-dinov2")), vtc.ToMe(keep=0.9))
    vtc.save_config(handle, path)
    assert vtc.load_config(path) == vtc.ToMe(keep=0.9)

    data = json.loads(path.read_text())
    data["options"]["future"] = 1
    path.write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING):
        assert vtc.load_config(path) == vtc.ToMe(keep=0.9)
    assert "'future'" in caplog.text
    data["vtc_config"] = 99
    path.write_text(json.dumps(data))
    with pytest.raises(vtc.OptionError, match="newer format"):
        vtc.load_config(path)


def test_configs_overwrite_nothing_of_the_users(tmp_path):
    mine = tmp_path / "notes.json"
    mine.write_text('{"a": 1}')
    with pytest.raises(vtc.OptionError, match="choose another name"):
        vtc.save_config(vtc.ToMe(keep=0.9), mine)
    assert mine.read_text() == '{"a": 1}'
    with pytest.raises(vtc.OptionError, match="no vtc config"):
        vtc.load_config(mine)
    with pytest.raises(vtc.OptionError, match="cannot be read"):
        vtc.load_config(tmp_path / "absent.json")
