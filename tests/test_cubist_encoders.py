"""CubistMerge in encoders whose blocks run on a rectangle of tokens: SAM and its kin, ViTDet."""

import copy
import pickle

import pytest
import torch
from cubist_oracle import run_blocks
from torch import nn
from zoo import model as zoo_model
from zoo import pixels, randomise

import vtc
from vtc.adapters.encoders.rectangle import find

WAY_OUT = "use cubist_merge, which leaves a rectangle of them"
SAM = {
    **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 96, "patch_size": 8},
    **{"output_channels": 16, "mlp_dim": 64, "window_size": 5, "global_attn_indexes": [1, 3]},
}
VITDET = {
    **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 96, "patch_size": 8},
    **{"pretrain_image_size": 64, "window_size": 5, "window_block_indices": [0, 2], "mlp_ratio": 2},
    **{"use_relative_position_embeddings": True, "residual_block_indices": [2]},
}
TIMM = {
    **{"img_size": 96, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "window_size": 5},
    **{"global_attn_indexes": [1, 3], "num_classes": 5, "init_values": 0.1},
}


def hf(name, config, options):
    import transformers

    made = getattr(transformers, config)(**options)
    made._attn_implementation = "eager" if options.get("eager") else made._attn_implementation
    return getattr(transformers, name)(made)


def samvit(**options):
    import timm

    return timm.create_model("samvit_base_patch16_224", **{**TIMM, **options})


def sam_parts(model):
    def entry(x):
        return model.patch_embed(x) + model.pos_embed

    return model.layers, entry, model.neck


def vitdet_parts(model):
    return model.encoder.layer, model.embeddings, lambda x: x


def timm_parts(model):
    def entry(x):
        return model.patch_embed(x)  # this one has no absolute positions

    return model.blocks, entry, lambda x: model.head(model.neck(x.permute(0, 3, 1, 2)))


BUILD = {
    "sam": (lambda: hf("SamVisionModel", "SamVisionConfig", SAM), lambda m: sam_parts(m.vision_encoder)),
    "sam_eager": (
        lambda: hf("SamVisionModel", "SamVisionConfig", {**SAM, "attn_implementation": "eager"}),
        lambda m: sam_parts(m.vision_encoder),
    ),
    "sam_hq": (lambda: hf("SamHQVisionModel", "SamHQVisionConfig", SAM), lambda m: sam_parts(m.vision_encoder)),
    "vitdet": (lambda: hf("VitDetModel", "VitDetConfig", VITDET), vitdet_parts),
    "timm": (samvit, timm_parts),
}
IMAGES = pixels(2, 96)


@pytest.fixture(scope="module")
def models():
    return {name: randomise(build()) for name, (build, _) in BUILD.items()}


def read(out):
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def fingerprint(model):
    return [
        (name, sorted(vars(m)), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("name", BUILD)
@torch.no_grad()
def test_the_models_own_blocks_with_the_merge_by_hand(name, layer, models):
    model = models[name]
    blocks, entry, behind = BUILD[name][1](model)
    given = run_blocks(blocks, entry(IMAGES), (10, 9), layer, name == "vitdet")
    expected, dense = behind(given[-1]), read(model(IMAGES))
    with vtc.compress(model, "cubist_merge", rows=2, columns=3, layer=layer) as handle:
        got = read(model(IMAGES))
    assert got.shape == dense.shape == expected.shape
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(got, dense, atol=1e-3)
    assert handle.grids == ((12, 12),) * 2 and handle.token_map.slots == 90
    report = handle.report
    assert report.before == (144, 144) and report.after == (90, 90)
    assert report.tokens == ((144, 144),) * layer + ((90, 90),) * (4 - layer)
    assert "12x12 -> 10x9 rows and columns" in str(report)


@pytest.mark.parametrize("name", BUILD)
@torch.no_grad()
def test_keep_all_batches_and_removal(name, models):
    model = models[name]
    dense, before = read(model(IMAGES)), fingerprint(model)
    for options in ({"keep": 1.0}, {"keep": 144}, {"rows": 0, "columns": 0}, {"rows": 0}):
        with vtc.compress(model, "cubist_merge", **options) as handle:
            assert torch.equal(read(model(IMAGES)), dense), options
            assert handle.report.kept == handle.report.macs_ratio == 1.0
    alone = [read(model(IMAGES[b : b + 1])) for b in range(2)]
    noise = max(float((dense[b : b + 1] - alone[b]).abs().max()) for b in range(2))  # of the model's own kernels
    with vtc.compress(model, "cubist_merge", keep=0.7) as handle:
        out = read(model(IMAGES))
        both = handle.token_map
        for b in range(2):
            single = read(model(IMAGES[b : b + 1]))
            assert (single - out[b : b + 1]).abs().max() <= max(10 * noise, 1e-6)
            assert torch.equal(handle.token_map.group[0], both.group[b])
        assert torch.equal(read(model(IMAGES)), out)
    assert torch.equal(read(model(IMAGES)), dense) and fingerprint(model) == before
    with pytest.raises(RuntimeError, match="in the middle"), vtc.compress(model, "cubist_merge", keep=0.7):
        blocks = BUILD[name][1](model)[0]
        blocks[2].mlp.register_forward_pre_hook(raises)
        model(IMAGES)
    blocks[2].mlp._forward_pre_hooks.clear()
    assert torch.equal(read(model(IMAGES)), dense) and fingerprint(model) == before


def raises(*args):
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BUILD)
@torch.no_grad()
def test_half_precision(name, dtype):
    model = randomise(BUILD[name][0]()).to(dtype)
    with vtc.compress(model, "cubist_merge", keep=0.7) as handle:
        out = read(model(IMAGES.to(dtype)))
    assert out.dtype == dtype and out.isfinite().all() and handle.report.after == (100, 100)
    blocks, entry, behind = BUILD[name][1](model)
    expected = behind(run_blocks(blocks, entry(IMAGES.to(dtype)), (10, 10), 1, name == "vitdet")[-1])
    assert torch.equal(out, expected)


@torch.no_grad()
def test_whoever_reads_between_the_blocks_gets_the_full_grid(models):
    """SAM-HQ's early features, ViTDet's pyramid, timm's intermediates, hooks."""
    import transformers

    for name in ("sam_hq", "vitdet", "timm"):
        model = models[name]
        blocks, entry, _ = BUILD[name][1](model)
        given = run_blocks(blocks, entry(IMAGES), (10, 10), 1, name == "vitdet")
        with vtc.compress(model, "cubist_merge", keep=0.7) as handle:
            if name == "sam_hq":
                seen, wanted = model(IMAGES).intermediate_embeddings, [given[1], given[3]]
            elif name == "vitdet":
                seen, wanted = model(IMAGES, output_hidden_states=True).hidden_states[1:], given
            else:
                seen = model.forward_intermediates(IMAGES, intermediates_only=True)
                early = model.forward_intermediates(IMAGES, indices=[1], stop_early=True, intermediates_only=True)
                assert torch.equal(early[0], seen[1]) and len(handle.report.tokens) == 2
                wanted = [x.permute(0, 3, 1, 2) for x in given]
        for got, expected in zip(seen, wanted, strict=True):
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    config = transformers.VitDetConfig(**VITDET, out_features=["stage2", "stage4"])
    backbone = randomise(transformers.VitDetBackbone(config))
    given = run_blocks(backbone.encoder.layer, backbone.embeddings(IMAGES), (10, 10), 1, True)
    with vtc.compress(backbone, "cubist_merge", keep=0.7):
        for got, expected in zip(backbone(IMAGES).feature_maps, (given[1], given[3]), strict=True):
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_segment_anything_gives_masks_of_the_full_size():
    import transformers

    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    prompts = {"hidden_size": 16, "image_size": 96, "patch_size": 8, "mask_input_channels": 4}
    vision = {**SAM, "num_pos_feats": 8}
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    model = randomise(transformers.SamModel(config))
    points = {"input_points": torch.tensor([[[[40.0, 40.0]]]] * 2)}
    dense = model(IMAGES, **points)
    assert WAY_OUT in str(vtc.explain(model)) and not vtc.explain(model).ok
    with vtc.compress(model, "cubist_merge", keep=0.7) as handle:
        assert handle.patches[0].where == "vision_encoder"
        out = model(IMAGES, **points)
        assert out.pred_masks.shape == dense.pred_masks.shape and out.pred_masks.isfinite().all()
        embeddings = model.get_image_embeddings(IMAGES)
        assert torch.equal(model(image_embeddings=embeddings, **points).pred_masks, out.pred_masks)
    assert torch.equal(model(IMAGES, **points).pred_masks, dense.pred_masks)


def test_gradients_checkpoints_and_training():
    model = randomise(samvit()).train()

    def run():
        model.zero_grad()
        model(IMAGES).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    with vtc.compress(model, "cubist_merge", keep=0.7):
        plain = run()
        model.set_grad_checkpointing(True)
        again = run()
    assert all(grad.isfinite().all() for grad in plain.values()) and plain["blocks.0.attn.qkv.weight"].any()
    for name, grad in plain.items():
        assert torch.allclose(grad, again[name], rtol=1e-4, atol=1e-4 * float(grad.abs().max())), name


def test_checkpoints_of_transformers():
    model = randomise(hf("SamVisionModel", "SamVisionConfig", SAM)).train()

    def run(images):
        model.zero_grad()
        out = model(images).last_hidden_state
        return out, {name: p for name, p in model.named_parameters()}

    def grads(out, parameters):
        out.square().sum().backward()
        return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

    with vtc.compress(model, "cubist_merge", keep=0.7):
        plain = grads(*run(IMAGES))
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        out, parameters = run(IMAGES)
        with torch.no_grad():
            model(IMAGES.flip(0))  # another call in between
        again = grads(out, parameters)
    for name, grad in plain.items():
        assert torch.allclose(grad, again[name], rtol=1e-4, atol=1e-4 * float(grad.abs().max())), name


@pytest.mark.parametrize("name", BUILD)
@torch.no_grad()
def test_copies_and_instances(name, models):
    model = models[name]
    other = copy.deepcopy(model)
    dense = read(model(IMAGES))
    with vtc.compress(model, "cubist_merge", keep=0.7) as handle:
        out = read(model(IMAGES))
        assert torch.equal(read(other(IMAGES)), dense)
        assert torch.equal(read(copy.deepcopy(model)(IMAGES)), out)
        assert torch.equal(read(pickle.loads(pickle.dumps(model))(IMAGES)), out)
        assert "cubist_merge(keep=0.7)" in repr(handle)
        with vtc.compress(model, "cubist_merge", keep=0.5):
            assert not torch.equal(read(model(IMAGES)), out)
    with torch.autocast("cpu", torch.bfloat16), vtc.compress(model, "cubist_merge", keep=0.7):
        assert read(model(IMAGES)).isfinite().all()


@torch.no_grad()
def test_other_sizes_of_image():
    """ViTDet takes any, with rows and columns of their own; their number is reported."""
    model = randomise(hf("VitDetModel", "VitDetConfig", VITDET))
    with vtc.compress(model, "cubist_merge", keep=0.75) as handle:
        for height, width in ((96, 64), (40, 136)):
            images = pixels(1, height, width)
            assert model(images).last_hidden_state.shape == (1, 32, height // 8, width // 8)
            assert handle.grids == ((height // 8, width // 8),)
            assert handle.report.after[0] <= round(0.75 * (height // 8) * (width // 8))
        with pytest.raises(vtc.OptionError, match="1x9 tokens"), vtc.compress(model, "cubist_merge", keep=0.3):
            model(pixels(1, 8, 72))


@torch.no_grad()
def test_multiply_adds_count_the_padding_of_windows(models):
    """Counted by torch: 12x12 tokens are 15x15 in windows of 5x5, 10x9 are 10x10."""
    from torch.utils.flop_counter import FlopCounterMode

    for few, windowed, options in (((12, 12), 225, {"keep": 1.0}), ((10, 9), 100, {"rows": 2, "columns": 3})):
        with (
            vtc.compress(models["sam_eager"], "cubist_merge", **options) as handle,
            FlopCounterMode(display=False) as counter,
        ):
            models["sam_eager"](IMAGES)
        # relative positions, which no weight multiplies: layers 0 and 2 in windows, 1 and 3 in none
        places = 225 * 10 + windowed * 10 + 2 * few[0] * few[1] * sum(few)
        assert handle.report.macs_after == counter.get_total_flops() / 2 - len(IMAGES) * 32 * places
    assert handle.report.macs_after < 0.85 * handle.report.macs_before


# -- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILD)
def test_the_verdict_is_the_same_on_meta(name, models):
    with torch.device("meta"):
        empty = BUILD[name][0]()
    for method in (None, "tome", "cubist_merge"):
        assert str(vtc.explain(empty, method)) == str(vtc.explain(models[name], method))
    plan = vtc.explain(empty, "cubist_merge", rows=2, columns=2)
    assert plan.ok and "reduced at layer 1, in rows and columns before its attention" in str(plan)
    with pytest.raises(vtc.UnsupportedModelError, match=WAY_OUT):
        vtc.compress(models[name], "tome", keep=0.8)


def test_sam_of_the_real_size_on_meta():
    import timm

    with torch.device("meta"):
        model = timm.create_model("samvit_base_patch16")
    assert vtc.explain(model, "cubist_merge").ok


def test_what_is_refused(models):
    for name in ("timm-vit", "hf-clip-vision", "open_clip-vit"):
        with pytest.raises(vtc.UnsupportedModelError, match="takes any number of them: use tome or pitome"):
            vtc.compress(zoo_model(name), "cubist_merge", keep=0.5)
    with pytest.raises(vtc.UnsupportedModelError, match="layer=4: its 4 layers are numbered 0 to 3"):
        vtc.compress(models["sam"], "cubist_merge", keep=0.5, layer=4)
    rotary = randomise(samvit(use_rel_pos=False, use_rope=True))
    with pytest.raises(vtc.UnsupportedModelError, match=r"block 1 .* does not run on a smaller rectangle"):
        vtc.compress(rotary, "cubist_merge", keep=0.5)
    assert WAY_OUT not in str(vtc.explain(rotary))


def test_multimodal_llms_are_refused():
    import mllm_zoo

    for name in ("llava", "qwen2_5_vl"):
        with pytest.raises(vtc.UnsupportedModelError, match="cubist_merge works in vision encoders with windows alone"):
            vtc.compress(mllm_zoo.build(name), "cubist_merge", keep=0.5)


class Mixes(nn.Module):
    """A block that looks like SAM's, and lets images see each other."""

    def __init__(self, inner):
        super().__init__()
        self.norm1, self.attn, self.mlp, self.window_size = inner.norm1, inner.attn, inner.mlp, 0

    def forward(self, x):
        return x + self.mlp(self.attn(self.norm1(x))) + x.mean(0, keepdim=True)


class Doubles(Mixes):
    def forward(self, x):
        return torch.cat([x, x], dim=2)


@pytest.mark.parametrize(
    ("block", "says"),
    [(Mixes, "makes other tokens of an image in a batch"), (Doubles, r"makes \[2, 5, 14, 32\] of tokens")],
)
def test_blocks_are_tried(block, says):
    model = randomise(samvit(depth=2))
    model.blocks[1] = block(model.blocks[1])
    with pytest.raises(vtc.UnsupportedModelError, match=f"block 1 .{block.__name__}. {says}"):
        vtc.compress(model, "cubist_merge", keep=0.5)
    assert WAY_OUT not in str(vtc.explain(model))


def test_tokens_changed_between_the_blocks():
    import timm

    class Adds(timm.models.vision_transformer_sam.VisionTransformerSAM):
        def forward_features(self, x):
            x = self.patch_embed(x)
            for block in self.blocks:
                x = block(x) + 1
            return self.neck(x.permute(0, 3, 1, 2))

    model = randomise(Adds(**{**TIMM, "use_rel_pos": True, "use_abs_pos": False}))
    with pytest.raises(vtc.UnsupportedModelError, match="changes its tokens between block 0 and block 1"):
        vtc.compress(model, "cubist_merge", keep=0.5)


def test_one_encoder_inside_another_model_is_found_once():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = randomise(hf("SamVisionModel", "SamVisionConfig", SAM)).vision_encoder

        def forward(self, x):
            return self.encoder(x).last_hidden_state

    model = Wrapper()
    assert [site.path for site in find(model)] == ["encoder"]
    with torch.no_grad(), vtc.compress(model, "cubist_merge", keep=0.7) as handle:
        assert model(IMAGES).shape == (2, 16, 12, 12) and handle.report.after == (100, 100)


def test_a_budget_that_is_measured(models):
    """keep="auto" goes by shares of the tokens, since its multiply-adds are no budget here."""
    for method in ("cubist_merge", vtc.CubistMerge(rows=1, layer=2)):
        choice = vtc.choose(models["sam"], IMAGES, method, fidelity=0.01, repeats=1)
        assert [row.method.keep for row in choice.rows[1:]] == [0.75, 0.5, 0.3]
    assert {row.method.layer for row in choice.rows[1:]} == {2}


@torch.no_grad()
def test_calls_past_the_blocks_and_without_images(models):
    model = models["timm"]
    with vtc.compress(model, "cubist_merge", keep=0.7):
        with pytest.raises(vtc.VTCError, match="was given tokens that were not cut from an image|ran without"):
            model.blocks[1](torch.randn(1, 12, 12, 32))
        with pytest.raises(vtc.UnsupportedModelError, match=r"torch\.jit\.trace"):
            torch.jit.trace(model, IMAGES)
    vitdet = models["vitdet"]
    with vtc.compress(vitdet, "cubist_merge", keep=0.7), pytest.raises(vtc.InputError, match="output_attentions=True"):
        vitdet(IMAGES, output_attentions=True)
