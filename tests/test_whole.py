"""Whole models with a vision encoder somewhere inside, and what people put around an encoder before and after vtc."""

import copy

import accelerate
import pytest
import torch
from torch import nn
from zoo import _SIZES, TEXT, ZOO, model, pixels, randomise

import vtc

DINO = {**_SIZES, "mlp_ratio": 2}
BACKBONE = {**DINO, "out_features": ["stage2", "stage3"], "reshape_hidden_states": False}
WORDS = torch.tensor([[1, 5, 2]])
PATCHES = torch.arange(64)[None] % 3 == 0


def head(kind, config, inputs=None, **options):
    """(build, inputs) of a task head of transformers."""

    def build():
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**{**_SIZES, **options}))

    return build, inputs or {}


def depth():
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        **{**DINO, "num_hidden_layers": 4, "out_features": [f"stage{i}" for i in range(1, 5)]},
        reshape_hidden_states=False,
    )
    sizes = {"reassemble_hidden_size": 64, "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(backbone_config=backbone, patch_size=8, head_hidden_size=4, **sizes)
    )


def pose():
    from transformers import VitPoseConfig, VitPoseForPoseEstimation

    backbone = {"model_type": "vitpose_backbone", **_SIZES, "image_size": [64, 64], "patch_size": [8, 8]}
    return VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=3))


def pair():
    from transformers import BertConfig, BertModel, VisionTextDualEncoderModel, ViTConfig, ViTModel

    text = {k: v for k, v in TEXT.items() if k != "projection_size"}
    return VisionTextDualEncoderModel(
        vision_model=ViTModel(ViTConfig(**_SIZES)), text_model=BertModel(BertConfig(**text))
    )


def captioner():
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    decoder = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, add_cross_attention=True, is_decoder=True)
    return VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**_SIZES), decoder)
    )


def wrapped():
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 64, "patch_size": 8, "depth": 3},
        num_labels=5,
    )
    return TimmWrapperForImageClassification(config)


WHOLE = {
    "ViTForImageClassification": head("ViTForImageClassification", "ViTConfig"),
    "ViTForMaskedImageModeling": head(
        "ViTForMaskedImageModeling", "ViTConfig", {"bool_masked_pos": PATCHES}, encoder_stride=8
    ),
    "DeiTForImageClassification": head("DeiTForImageClassification", "DeiTConfig"),
    "DeiTForMaskedImageModeling": head(
        "DeiTForMaskedImageModeling", "DeiTConfig", {"bool_masked_pos": PATCHES}, encoder_stride=8
    ),
    "ViTMAEForPreTraining": head(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {"noise": torch.linspace(0, 1, 64)[None]},
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    ),
    "Dinov2ForImageClassification": head("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2),
    "Dinov2Backbone": head("Dinov2Backbone", "Dinov2Config", mlp_ratio=2, out_features=["stage2", "stage3"]),
    "Dinov2WithRegistersBackbone": head(
        "Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", mlp_ratio=2, out_features=["stage1", "stage3"]
    ),
    "BeitForImageClassification": head("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True),
    "BeitForMaskedImageModeling": head(
        "BeitForMaskedImageModeling", "BeitConfig", {"bool_masked_pos": PATCHES}, vocab_size=20, use_mask_token=True
    ),
    "CLIPForImageClassification": (
        lambda: __import__("transformers").CLIPForImageClassification(ZOO["hf-clip"].build().config),
        {},
    ),
    "SiglipForImageClassification": (
        lambda: __import__("transformers").SiglipForImageClassification(ZOO["hf-siglip"].build().config),
        {},
    ),
    "CLIPModel": (ZOO["hf-clip"].build, {"input_ids": WORDS}),
    "SiglipModel": (ZOO["hf-siglip"].build, {"input_ids": WORDS}),
    "DepthAnythingForDepthEstimation": (depth, {}),
    "VisionTextDualEncoderModel": (pair, {"input_ids": WORDS}),
    "VisionEncoderDecoderModel": (captioner, {"decoder_input_ids": WORDS}),
    "TimmWrapperForImageClassification": (wrapped, {}),
}


def tensors(out):
    values = out.values() if hasattr(out, "values") else out
    flat = []
    for value in values:
        if isinstance(value, torch.Tensor):
            flat.append(value)
        elif isinstance(value, (tuple, list)):
            flat += [x for x in value if isinstance(x, torch.Tensor)]
    return flat


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_whole_models(name):
    """Every output keeps its shape and is finite; all at keep=1.0, and after it, are what they were."""
    build, more = WHOLE[name]
    net, inputs = randomise(build()), {"pixel_values": pixels(1), **more}
    dense = tensors(net(**inputs))
    for method in ("tome", "random"):
        with vtc.compress(net, method, keep=0.8) as handle:
            found = tensors(net(**inputs))
            assert sum(handle.report.after) < sum(handle.report.before)
        assert [x.shape for x in found] == [x.shape for x in dense]
        assert all(x.isfinite().all() for x in found if x.is_floating_point())
        assert not all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
    with vtc.compress(net, "tome", keep=1.0):
        assert all(torch.equal(a, b) for a, b in zip(tensors(net(**inputs)), dense, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(net(**inputs)), dense, strict=True))


# -- around it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm-dinov2", "hf-dinov2", "hf-clip-vision"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
@torch.no_grad()
def test_offloaded_by_accelerate(name, where, tmp_path):
    entry, net = ZOO[name], copy.deepcopy(model(name))
    with vtc.compress(net, "tome", keep=0.8):
        want = entry.run(net, entry.inputs(2))
    if where == "cpu":
        accelerate.cpu_offload(net, execution_device="cpu")
    else:
        accelerate.disk_offload(net, str(tmp_path), execution_device="cpu")
    dense = entry.run(net, entry.inputs(2))
    with vtc.compress(net, "tome", keep=0.8) as handle:
        assert torch.equal(entry.run(net, entry.inputs(2)), want)
        assert vtc.explain(net, "tome").ok and handle.report.after[0] < handle.report.before[0]
    assert torch.equal(entry.run(net, entry.inputs(2)), dense)


def hooked(net):
    for module in net.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))


def wrapped_by_hand(net):
    for block in net.blocks:
        block.forward = (lambda own: lambda *args, **kwargs: own(*args, **kwargs))(block.forward)


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_accelerates_hooks_before_and_after(first):
    net, x = copy.deepcopy(model("timm-dinov2")), pixels(1)
    dense = net(x)
    if first:
        hooked(net)
    handle = vtc.compress(net, "tome", keep=0.8)
    want = net(x)
    if not first:
        hooked(net)
    assert torch.equal(net(x), want) and not torch.equal(want, dense)
    assert vtc.explain(net, "pitome").ok and vtc.explain(net).ok
    handle.remove()
    assert torch.equal(net(x), dense)
    accelerate.hooks.remove_hook_from_submodules(net)
    assert torch.equal(net(x), dense)


@pytest.mark.parametrize("how", ["handle", "remove", "again"])
@torch.no_grad()
def test_a_forward_that_was_wrapped_after_compress(how):
    """Somebody keeps our patch in a closure: taking vtc off, or putting another method in, still works."""
    net, x = copy.deepcopy(model("timm-dinov2")), pixels(1)
    dense = net(x)
    handle = vtc.compress(net, "tome", keep=0.8)
    want = net(x)
    wrapped_by_hand(net)
    assert torch.equal(net(x), want)
    if how == "handle":
        handle.remove()
    else:
        vtc.remove(net)
    if how == "again":
        with vtc.compress(net, "tome", keep=0.8):
            assert torch.equal(net(x), want)
    assert torch.equal(net(x), dense)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("name", ["hf-dinov2", "hf-clip-vision"])
@torch.no_grad()
def test_lora_before_merged_and_unloaded(name):
    import peft

    entry, net = ZOO[name], copy.deepcopy(model(name))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(net, config).eval()
    inputs = entry.inputs(2)
    dense = entry.read(tuned(**inputs))
    with vtc.compress(tuned, "tome", keep=0.8) as handle:
        want = entry.read(tuned(**inputs))
        assert not torch.equal(want, dense)
        tuned.merge_adapter()
        torch.testing.assert_close(entry.read(tuned(**inputs)), want, rtol=1e-3, atol=1e-4)
        tuned.unmerge_adapter()
        torch.testing.assert_close(entry.read(tuned(**inputs)), want, rtol=1e-3, atol=1e-4)
        plain = tuned.merge_and_unload()
        torch.testing.assert_close(entry.run(plain, inputs), want, rtol=1e-3, atol=1e-4)
        handle.remove()
    torch.testing.assert_close(entry.run(plain, inputs), dense, rtol=1e-3, atol=1e-4)
    left = [hook for module in plain.modules() for hook in module._forward_hooks.values()]
    assert not any(type(hook).__module__.startswith("vtc") for hook in left)


@torch.no_grad()
def test_a_sentence_transformer_with_clip():
    """A Sequential of modules that hand on a dict; its CLIP calls the vision model and the projection by themselves."""

    class CLIP(nn.Module):
        def __init__(self, clip):
            super().__init__()
            self.model = clip

        def forward(self, features):
            seen = self.model.vision_model(pixel_values=features["pixel_values"])
            return {**features, "sentence_embedding": self.model.visual_projection(seen[1])}

    class Normalize(nn.Module):
        def forward(self, features):
            return {**features, "sentence_embedding": nn.functional.normalize(features["sentence_embedding"])}

    clip = model("hf-clip")
    net = nn.Sequential(CLIP(clip), Normalize())
    with vtc.compress(clip, "tome", keep=0.8):
        want = nn.functional.normalize(clip.get_image_features(pixel_values=pixels(2)).pooler_output)
    with vtc.compress(net, "tome", keep=0.8) as handle:
        found = net({"pixel_values": pixels(2)})["sentence_embedding"]
        assert handle.report.images == 2
    torch.testing.assert_close(found, want)
