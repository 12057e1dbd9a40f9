"""Tiny models with random weights of every family that an adapter covers: the rows of the test matrix.

Each entry builds a model, its inputs for a batch, and reads the outputs to compare. Biases, norms and LayerScales are
drawn, not left at 0 or 1, so that a forgotten part shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]  # batch -> keyword arguments
    read: Callable[[Any], Tensor]
    grid: tuple[int, int] | None = (8, 8)  # None: the patches are not in their places
    resizes: bool = False

    def run(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return self.read(model(**inputs))


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.uniform_(-0.4, 0.4, generator=generator)
            else:
                parameter.normal_(std=0.12, generator=generator)
    return model.eval()


def pixels(batch: int, side: int = 64, other: int | None = None) -> Tensor:
    return torch.randn(batch, 3, side, other or side, generator=torch.Generator().manual_seed(1))


def one(x: Tensor) -> Tensor:
    return x


# -- timm -----------------------------------------------------------------------------------------------------------


def _timm(name: str, side: int = 64, resizes: bool = False, patch: int = 8, **options: Any) -> Entry:
    def build() -> nn.Module:
        import timm

        given = {"patch_size": patch} | {key: value() if callable(value) else value for key, value in options.items()}
        return timm.create_model(name, pretrained=False, img_size=side, depth=3, num_classes=5, **given)

    return Entry(build, lambda batch: {"x": pixels(batch, side)}, one, (side // patch,) * 2, resizes)


def _res_post_block() -> type:
    from timm.models.vision_transformer import ResPostBlock

    return ResPostBlock


def naflex_patches(batch: int) -> dict[str, Tensor]:
    """Patches that the caller has cut, row by row; every second image has 6x8, and 16 of padding."""
    patches = torch.randn(batch, 64, 192, generator=torch.Generator().manual_seed(1))
    places, valid = torch.cartesian_prod(torch.arange(8), torch.arange(8)).repeat(batch, 1, 1), torch.ones(batch, 64)
    places[1::2, 48:], valid[1::2, 48:] = 0, 0
    return {"x": patches, "patch_coord": places, "patch_valid": valid.bool()}


def _naflex(name: str, images: bool = False, **options: Any) -> Entry:
    def build() -> nn.Module:
        import timm

        sizes = {"patch_size": 8, "embed_dim": 64, "num_heads": 4, "depth": 3, "num_classes": 5}
        return timm.create_model(name, pretrained=False, **sizes, **options)

    return Entry(build, (lambda batch: {"x": pixels(batch)}) if images else naflex_patches, one)


TIMM = {
    "timm-vit": _timm("vit_tiny_patch16_224"),
    "timm-vit-dynamic": _timm("vit_tiny_patch16_224", dynamic_img_size=True, resizes=True),
    "timm-vit-avg": _timm("vit_tiny_patch16_224", global_pool="avg"),
    "timm-augreg-map": _timm("vit_tiny_patch16_224", global_pool="map", class_token=False),
    "timm-qknorm": _timm("vit_tiny_patch16_224", qk_norm=True, init_values=0.1),
    "timm-diff": _timm("vit_tiny_patch16_224", attn_layer="diff", embed_dim=64, num_heads=4),
    "timm-respost": _timm("vit_tiny_patch16_224", block_fn=_res_post_block, init_values=0.1),
    "timm-qwen3": _timm("qwen3_vit_88m", embed_dim=64, num_heads=4),
    "timm-deit": _timm("deit_tiny_patch16_224"),
    "timm-deit-distilled": _timm("deit_tiny_distilled_patch16_224"),
    "timm-deit3": _timm("deit3_small_patch16_224", embed_dim=64, num_heads=4),
    "timm-mae": _timm("vit_base_patch16_224.mae", embed_dim=64, num_heads=4),
    "timm-dinov2": _timm("vit_small_patch14_dinov2", embed_dim=64, num_heads=4),
    "timm-dinov2-reg": _timm("vit_small_patch14_reg4_dinov2", embed_dim=64, num_heads=4),
    "timm-dinov3": _timm("vit_small_patch16_dinov3", embed_dim=64, num_heads=4, dynamic_img_size=True, resizes=True),
    "timm-eva02": _timm("eva02_tiny_patch14_224", embed_dim=64, num_heads=4),
    "timm-vit-rope-mixed": _timm("vit_small_patch16_rope_mixed_224", embed_dim=64, num_heads=4),
    "timm-siglip": _timm("vit_base_patch16_siglip_224", embed_dim=64, num_heads=4),
    "timm-siglip2": _timm("vit_base_patch16_siglip_224.v2_webli", embed_dim=64, num_heads=4),
    "timm-clip": _timm("vit_base_patch16_clip_224", embed_dim=64, num_heads=4),
    "timm-beit": _timm("beit_base_patch16_224", embed_dim=64, num_heads=4),
    "timm-beit-shared": _timm(
        "beit_base_patch16_224", embed_dim=64, num_heads=4, use_rel_pos_bias=False, use_shared_rel_pos_bias=True
    ),
    "timm-relpos": _timm("vit_relpos_small_patch16_224", embed_dim=64, num_heads=4),
    "timm-relpos-post-table": _timm(
        "vit_relpos_base_patch32_plus_rpn_256", embed_dim=64, num_heads=4, rel_pos_type="bias", class_token=True
    ),
    "timm-srelpos": _timm("vit_srelpos_small_patch16_224", embed_dim=64, num_heads=4),
    # hybrids, whose patches (of 16 pixels) come out of a network; its last convolution may have patches of its own
    "timm-hybrid": _timm("vit_tiny_r_s16_p8_224", 64, patch=16, patch_size=4, embed_dim=64, num_heads=4),
    "timm-mobileclip": _timm("vit_base_mci_224", 96, patch=16, patch_size=1),
    "timm-vitamin": _timm("vitamin_small_224", 96, patch=16, patch_size=1),
    "timm-naflex": _naflex("naflexvit_base_patch16_gap"),
    "timm-naflex-images": _naflex("naflexvit_base_patch16_siglip", images=True),
    "timm-naflex-rope": _naflex("naflexvit_base_patch16_gap", rope_type="axial"),
    "timm-naflex-rope-mixed": _naflex("naflexvit_base_patch16_map", rope_type="mixed"),
}

# -- open_clip ------------------------------------------------------------------------------------------------------

_VISION = {"image_size": 64, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
_TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


def _open_clip(timm_trunk: bool = False, coca: bool = False, **vision: Any) -> Entry:
    def build() -> nn.Module:
        from open_clip.model import CLIP

        if coca:
            from open_clip.coca_model import CoCa

            pool = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_tokens": True}
            return CoCa(
                embed_dim=32,
                vision_cfg={**_VISION, **pool},
                text_cfg={**_TEXT, "embed_cls": True, "output_tokens": True},
                multimodal_cfg={**_TEXT, "layers": 1},
            )
        trunk = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
        return CLIP(embed_dim=32, vision_cfg=trunk if timm_trunk else {**_VISION, **vision}, text_cfg=_TEXT)

    text = torch.tensor([[1, 7, 9, 49, 0, 0, 0, 0]])

    def read(out: Any) -> Tensor:
        return out["image_features"] if isinstance(out, dict) else out[0]

    side, grid = (224, (14, 14)) if timm_trunk else (64, (8, 8))
    return Entry(build, lambda batch: {"image": pixels(batch, side), "text": text.repeat(batch, 1)}, read, grid)


OPEN_CLIP = {
    "open_clip-vit": _open_clip(),
    "open_clip-layerscale-avg": _open_clip(ls_init_value=0.1, pool_type="avg"),
    "open_clip-custom": _open_clip(qk_norm=True, scale_heads=True, scale_attn=True, scale_fc=True),
    "open_clip-timm-trunk": _open_clip(timm_trunk=True),
    "open_clip-coca": _open_clip(coca=True),
}

# -- Hugging Face ---------------------------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 8,
}


TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "projection_size": 32,
}


def _hf(kind: str, config: str, *, resizes: bool = True, read: str = "last_hidden_state", **options: Any) -> Entry:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**{**_SIZES, **options}))

    return Entry(build, lambda batch: {"pixel_values": pixels(batch)}, lambda out: getattr(out, read), (8, 8), resizes)


def _hf_mae() -> Entry:
    entry = _hf("ViTMAEModel", "ViTMAEConfig", mask_ratio=0.5)

    def inputs(batch: int) -> dict[str, Tensor]:
        return {"pixel_values": pixels(batch), "noise": torch.linspace(0, 1, 64).roll(20).expand(batch, 64)}

    return Entry(entry.build, inputs, entry.read, None)


def _hf_pair(kind: str, config: str) -> Entry:
    def build() -> nn.Module:
        import transformers

        settings = {"vision_config": dict(_SIZES), "text_config": dict(TEXT)}
        if "CLIP" in kind:
            settings["projection_dim"] = 32
        else:
            settings["text_config"]["projection_size"] = 64
        return getattr(transformers, kind)(getattr(transformers, config)(**settings))

    def inputs(batch: int) -> dict[str, Tensor]:
        return {"pixel_values": pixels(batch), "input_ids": torch.tensor([[1, 5, 2]])}

    return Entry(build, inputs, lambda out: out.image_embeds, (8, 8), True)


def naflex_inputs(batch: int) -> dict[str, Tensor]:
    """SigLIP 2 takes patches; every second image is 6x8 patches and 16 of padding."""
    patches = torch.randn(batch, 64, 192, generator=torch.Generator().manual_seed(1))
    mask, shapes = torch.ones(batch, 64, dtype=torch.long), torch.tensor([[8, 8]]).repeat(batch, 1)
    mask[1::2, 48:], shapes[1::2] = 0, torch.tensor([6, 8])
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _hf_siglip2() -> Entry:
    def build() -> nn.Module:
        import transformers

        sizes = {k: v for k, v in _SIZES.items() if k != "image_size"}
        return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=64))

    return Entry(build, naflex_inputs, lambda out: out.pooler_output)


def _hf_clip(kind: str, config: str, **options: Any) -> Entry:
    """Clips of four frames, two to a patch."""
    entry = _hf(kind, config, num_frames=4, **options)

    def inputs(batch: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(batch, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))}

    return Entry(entry.build, inputs, entry.read, None)


def _hf_vitpose() -> Entry:
    size = {"image_size": [64, 64], "patch_size": [8, 8], "mlp_ratio": 2, "out_indices": [3]}
    entry = _hf("VitPoseBackbone", "VitPoseBackboneConfig", **size)
    return Entry(entry.build, entry.inputs, lambda out: out.feature_maps[0])


HF = {
    "hf-vit": _hf("ViTModel", "ViTConfig"),
    "hf-vit-classifier": _hf("ViTForImageClassification", "ViTConfig", read="logits"),
    "hf-pixio": _hf("PixioModel", "PixioConfig", n_cls_tokens=8, mlp_ratio=2, resizes=True),
    "hf-internvit": _hf("InternVLVisionModel", "InternVLVisionConfig"),
    "hf-deit": _hf("DeiTModel", "DeiTConfig"),
    "hf-deit-distilled": _hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", read="logits"),
    "hf-mae": _hf_mae(),
    "hf-dinov2": _hf("Dinov2Model", "Dinov2Config", mlp_ratio=2),
    "hf-dinov2-classifier": _hf("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, read="logits"),
    "hf-dinov2-reg": _hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2, use_swiglu_ffn=True),
    "hf-dinov3": _hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4),
    "hf-clip-vision": _hf("CLIPVisionModel", "CLIPVisionConfig", read="pooler_output"),
    "hf-clip": _hf_pair("CLIPModel", "CLIPConfig"),
    "hf-siglip-vision": _hf("SiglipVisionModel", "SiglipVisionConfig", read="pooler_output"),
    "hf-siglip": _hf_pair("SiglipModel", "SiglipConfig"),
    "hf-siglip2": _hf_siglip2(),
    "hf-beit": _hf("BeitModel", "BeitConfig", use_relative_position_bias=True, resizes=False),
    "hf-beit-shared-avg": _hf(
        "BeitForImageClassification",
        "BeitConfig",
        use_shared_relative_position_bias=True,
        use_mean_pooling=True,
        resizes=False,
        read="logits",
    ),
}

_BIASED = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
HF |= {
    "hf-data2vec": _hf("Data2VecVisionModel", "Data2VecVisionConfig", resizes=False),
    "hf-data2vec-relative": _hf("Data2VecVisionModel", "Data2VecVisionConfig", resizes=False, **_BIASED),
}

_DETECTS = {"image_size": [64, 64], "num_detection_tokens": 5}  # tokens behind the patches
HF |= {
    "hf-yolos": _hf("YolosModel", "YolosConfig", resizes=False, use_mid_position_embeddings=False, **_DETECTS),
    # adds positions between its blocks
    "hf-yolos-detection": _hf("YolosForObjectDetection", "YolosConfig", resizes=False, read="pred_boxes", **_DETECTS),
}

_CLIP = {"image_size": 32, "tubelet_size": (2, 8, 8)}
HF |= {"hf-mlcd": _hf("MLCDVisionModel", "MLCDVisionConfig", resizes=False)}
# How their blocks work is found out (vtc/adapters/encoders/prenorm.py); the last six take no mask in their attention.
HF |= {
    "hf-aimv2": _hf("Aimv2VisionModel", "Aimv2VisionConfig", resizes=False),
    "hf-qianfan": _hf("QianfanOCRVisionModel", "QianfanOCRVisionConfig", image_size=[64, 64], patch_size=[8, 8]),
    "hf-vivit": _hf_clip("VivitModel", "VivitConfig", **_CLIP),
    "hf-idefics3": _hf("Idefics3VisionTransformer", "Idefics3VisionConfig", resizes=False),
    "hf-smolvlm": _hf("SmolVLMVisionTransformer", "SmolVLMVisionConfig", resizes=False),
    "hf-blip2": _hf("Blip2VisionModel", "Blip2VisionConfig"),
    "hf-dpt": _hf("DPTModel", "DPTConfig", backbone_out_indices=[0, 1, 1, 2]),
    "hf-vitpose": _hf_vitpose(),
    "hf-videomae": _hf_clip("VideoMAEModel", "VideoMAEConfig", image_size=32, tubelet_size=2),
}

ZOO: dict[str, Entry] = {**TIMM, **OPEN_CLIP, **HF}


@cache
def model(name: str) -> nn.Module:
    """One model per process and name; tests that change it must give it back as it was."""
    return randomise(ZOO[name].build())
