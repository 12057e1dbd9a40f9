"""What is particular to transformers: models inside models, pipelines, backbones, attention implementations."""

import pytest
import torch
import transformers
from zoo import HF, ZOO, model, pixels, randomise

import vtc

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 8}


@pytest.mark.parametrize("name", HF)
def test_explain_names_the_encoder(name):
    plan = vtc.explain(model(name), "pitome")
    assert plan.ok and len(plan.encoders) == 1
    assert plan.encoders[0].adapter == "huggingface" and plan.encoders[0].layers == 3
    assert "between attention and MLP" in str(plan)


@torch.no_grad()
def test_auto_model_and_task_heads_are_the_same_encoder(tmp_path):
    net = model("hf-dinov2")
    net.save_pretrained(tmp_path)
    auto = transformers.AutoModel.from_pretrained(tmp_path)
    with vtc.compress(net, "pitome", keep=0.8), vtc.compress(auto, "pitome", keep=0.8):
        x = pixels(2)
        assert torch.equal(auto(pixel_values=x).last_hidden_state, net(pixel_values=x).last_hidden_state)


@torch.no_grad()
def test_pipeline(tmp_path):
    from PIL import Image

    net = model("hf-vit-classifier")
    processor = transformers.AutoImageProcessor.from_pretrained
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}'
    )
    pipe = transformers.pipeline("image-classification", model=net, image_processor=processor(tmp_path))
    image = Image.new("RGB", (80, 60), (200, 30, 90))
    dense = pipe(image)
    with vtc.compress(pipe.model, "tome", keep=0.7) as handle:
        assert len(pipe(image)) == len(dense)
        assert handle.report.after == (handle.token_map.anchor.shape[1],) and handle.report.after[0] < 64
    assert pipe(image) == dense


@pytest.mark.parametrize("method", ["pitome", "tome", "random", "downsample"])
@pytest.mark.parametrize("name", ["hf-vit", "hf-dinov2", "hf-dinov3", "hf-clip-vision", "hf-beit"])
@torch.no_grad()
def test_hidden_states_have_full_length(name, method):
    entry, net = ZOO[name], model(name)
    inputs = entry.inputs(1)
    with vtc.compress(net, method, keep=0.7):
        plain = net(**inputs).last_hidden_state
        out = net(**inputs, output_hidden_states=True)
    assert {state.shape[1] for state in out.hidden_states} == {plain.shape[1]}
    torch.testing.assert_close(out.last_hidden_state, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Dinov2Backbone", "DINOv3ViTBackbone", "BeitBackbone"])
@torch.no_grad()
def test_backbones_for_dense_prediction(kind):
    options = {"Beit": {"reshape_hidden_states": True}}.get(kind[:4], {})
    config = getattr(transformers, kind.replace("Backbone", "Config"))(
        **SIZES, out_features=["stage1", "stage3"], **options
    )
    net = randomise(getattr(transformers, kind)(config))
    dense = net(pixels(1, 64, 64)).feature_maps
    with vtc.compress(net, "pitome", keep=0.7):
        maps = net(pixels(1, 64, 64)).feature_maps
    assert [m.shape for m in maps] == [m.shape for m in dense] == [(1, 64, 8, 8)] * 2
    assert not torch.equal(maps[-1], dense[-1])


@torch.no_grad()
def test_image_features_of_clip_and_siglip_and_the_text_stays():
    for name in ("hf-clip", "hf-siglip"):
        entry, net = ZOO[name], model(name)
        inputs = entry.inputs(2)
        dense = net(**inputs)
        with vtc.compress(net, "pitome", keep=0.7):
            out = net(**inputs)
        assert torch.equal(out.text_embeds, dense.text_embeds)
        assert not torch.equal(out.image_embeds, dense.image_embeds)
        assert out.logits_per_image.shape == dense.logits_per_image.shape


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@torch.no_grad()
def test_eager_and_sdpa_agree(kind):
    net = randomise(transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=2, attn_implementation=kind)))
    reference = model("hf-dinov2")
    with vtc.compress(net, "tome", keep=0.7), vtc.compress(reference, "tome", keep=0.7):
        assert net.config._attn_implementation == kind  # nothing was forced
        torch.testing.assert_close(
            net(pixel_values=pixels(1)).last_hidden_state,
            reference(pixel_values=pixels(1)).last_hidden_state,
            rtol=1e-4,
            atol=1e-4,
        )


def test_attention_without_a_bias_is_refused_for_merges():
    net = transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=96))
    net.config._attn_implementation = "flash_attention_2"
    try:
        plan = vtc.explain(net, "tome")
    finally:
        net.config._attn_implementation = "sdpa"
    assert not plan.ok and 'attn_implementation="sdpa"' in str(plan)


@torch.no_grad()
def test_timm_models_inside_transformers():
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args={"depth": 2, "img_size": 64, "patch_size": 8}, do_pooling=True
    )
    net = randomise(transformers.TimmWrapperModel(config))
    assert [encoder.adapter for encoder in vtc.explain(net).encoders] == ["timm"]
    dense = net(pixel_values=pixels(1)).last_hidden_state
    with vtc.compress(net, "tome", keep=0.8) as handle:
        assert net(pixel_values=pixels(1)).last_hidden_state.shape == dense.shape
        assert handle.report.after[0] < 64


REFUSED = {
    "SwinModel": ("SwinConfig", {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1], "num_heads": [2],
                                 "window_size": 2}, "windows"),
    "ConvNextModel": ("ConvNextConfig", {"depths": [1, 1, 1, 1], "hidden_sizes": [4, 4, 4, 4]}, "convolution"),
    "HieraModel": ("HieraConfig", {"depths": [1, 1], "embed_dim": 8, "num_heads": [1, 2], "num_query_pool": 1}, "pool"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_others_are_refused_with_the_reason(kind):
    config, options, reason = REFUSED[kind]
    net = getattr(transformers, kind)(getattr(transformers, config)(**options))
    plan = vtc.explain(net)
    assert not plan.ok and reason in str(plan)
    with pytest.raises(vtc.UnsupportedModelError, match=reason):
        vtc.compress(net, "pitome", keep=0.9)
