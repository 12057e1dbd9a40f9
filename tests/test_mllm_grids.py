"""Where the image tokens of a multimodal LLM stand: the grid comes from pixels and sizes, and is never a guess."""

from __future__ import annotations

import copy
from functools import cache

import mllm_zoo as zoo
import pytest
import torch
from mllm_zoo import IMAGE

import vtc

SIZES = {"image_size": 96, "patch_size": 8}
TOWERS = {
    "pixtral": {"model_type": "pixtral", **zoo._TOWER, **SIZES},
    "clip": zoo._clip(40),
    "siglip": zoo._siglip(40),
    "dinov2": {"model_type": "dinov2", **zoo._TOWER, "mlp_ratio": 2, **SIZES},
    "dinov2_registers": {"model_type": "dinov2_with_registers", **zoo._TOWER, "mlp_ratio": 2, **SIZES},
}


@cache
def llava(tower, layers=-1):
    import transformers

    strategy = "default" if tower in ("clip", "dinov2", "dinov2_registers") else "full"
    layer = layers if isinstance(layers, int) else list(layers)
    given = {"vision_feature_select_strategy": strategy, "vision_feature_layer": layer}
    given["vision_config"] = copy.deepcopy(TOWERS[tower])
    config = transformers.LlavaConfig(**copy.deepcopy(zoo._LLAVA), **given)
    return zoo.randomise(transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa"))


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def prompt(*counts):
    return torch.tensor([[1, 5, *[part for count in counts for part in [*[IMAGE] * count, 7]], 9]])


def case(name):
    """A model, its inputs, and the grids that its tokens fill."""
    if name == "pixtral":
        sizes = torch.tensor([[32, 72]])
        return llava(name), {"pixel_values": drawn(1, 3, 32, 72), "image_sizes": sizes}, [(4, 9)], prompt(36)
    if name == "pixtral_batch":  # padded to the largest, cut again in the tower, all in one row
        sizes = torch.tensor([[32, 72], [48, 16]])
        inputs = {"pixel_values": drawn(2, 3, 48, 72), "image_sizes": sizes}
        return llava("pixtral"), inputs, [(4, 9), (6, 2)], prompt(36, 12)
    if name == "pixtral_no_sizes":
        return llava("pixtral"), {"pixel_values": drawn(2, 3, 32, 72)}, [(4, 9), (4, 9)], prompt(36, 36)
    if name in ("clip", "siglip", "dinov2"):
        inputs = {"pixel_values": drawn(1, 3, 32, 72)}
        inputs |= {} if name == "dinov2" else {"interpolate_pos_encoding": True}
        return llava(name), inputs, [(4, 9)], prompt(36)
    if name == "clip_full":  # the CLS token reaches the decoder, so the tokens fill no rectangle
        inputs = {"pixel_values": drawn(1, 3, 40, 40), "vision_feature_select_strategy": "full"}
        return llava("clip"), inputs, [None], prompt(26)
    if name == "dinov2_registers":  # they reach the decoder too; 32 patches and 4 registers are no 6 x 6
        return llava(name), {"pixel_values": drawn(1, 3, 32, 64)}, [None], prompt(36)
    if name == "several_layers":
        model = llava("clip", layers=(-1, -3))
        return model, {"pixel_values": drawn(1, 3, 40, 40)}, [(5, 5)], prompt(25)
    if name == "paligemma":
        inputs = {"pixel_values": drawn(1, 3, 40, 40), "token_type_ids": torch.zeros(1, 29, dtype=torch.long)}
        return zoo.build(name), inputs, [(5, 5)], prompt(25)
    if name == "internvl_large":
        return zoo.build("internvl"), {"pixel_values": drawn(1, 3, 64, 64)}, [(4, 4)], prompt(16)
    if name == "internvl_wide":  # which the model folds as if it were 6 x 6
        return zoo.build("internvl"), {"pixel_values": drawn(1, 3, 32, 72)}, [None], prompt(9)
    model, family = zoo.build(name.split("_")[0]), name.split("_")[1]
    if family == "small":  # than the configuration says
        return model, {"pixel_values": drawn(1, 2, 3, 32, 32)}, [(2, 2), (2, 2)], prompt(4, 4)
    return model, {"pixel_values": drawn(1, 1, 3, 32, 72)}, [None], prompt(9)


CASES = [
    *("pixtral", "pixtral_batch", "pixtral_no_sizes", "clip", "siglip", "dinov2", "clip_full", "dinov2_registers"),
    *("several_layers", "paligemma", "internvl_large", "internvl_wide", "idefics3_small", "idefics3_wide"),
    "smolvlm_small",
]


@pytest.mark.parametrize("name", CASES)
def test_grid_is_that_of_the_pixels(name):
    model, inputs, grids, ids = case(name)
    inputs = {"input_ids": ids, **inputs}
    with torch.no_grad():
        dense = model(**inputs).logits
    for method in ("visionzip", "zoo_prune", "downsample", "hiprune"):
        with vtc.compress(model, method, keep=0.5) as handle, torch.no_grad():
            if None in grids and method in ("downsample", "hiprune"):
                with pytest.raises(vtc.InputError, match=f"{method} needs every image to fill a grid"):
                    model(**inputs)
                continue
            assert model(**inputs).logits.shape[1] < dense.shape[1]
            assert list(handle.grids) == grids
            units, counts = handle.token_map.group.shape[0], handle.report.before
            assert units == len(grids) and sum(counts) == int((ids == IMAGE).sum())
            if method == "downsample":  # neighbours of the true grid merge: every cell is a block of it
                for row, (high, wide) in enumerate(grids):
                    group = handle.token_map.group[row, : high * wide].view(high, wide)
                    for cell in group.unique():
                        rows, columns = (group == cell).nonzero().unbind(1)
                        box = group[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
                        assert bool((box == cell).all())
    with vtc.compress(model, "visionzip", keep=1.0), torch.no_grad():
        assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("method", ["visionzip", "scope", "hiprune", "zoo_prune", "downsample"])
@pytest.mark.parametrize("sized", [True, False])
def test_packed_images_do_not_see_each_other(method, sized):
    """Images that a tower packs into one row: each gets what it gets alone."""
    model = llava("pixtral")
    sizes = torch.tensor([[32, 72], [48, 16]]) if sized else torch.tensor([[48, 72]] * 2)
    counts, pixels = [36, 12] if sized else [54, 54], drawn(2, 3, 48, 72)

    def maps(rows):
        given = {"image_sizes": sizes[rows]} if sized else {}
        with vtc.compress(model, method, keep=0.4) as handle, torch.no_grad():
            model(input_ids=prompt(*[counts[row] for row in rows]), pixel_values=pixels[rows], **given)
            return [group[group >= -1][: counts[row]] for row, group in zip(rows, handle.token_map.group, strict=True)]

    for row, together in enumerate(maps([0, 1])):
        assert torch.equal(together, maps([row])[0])


def test_beams_of_packed_images():
    """generate repeats the images of every prompt. (Without sizes the plain model mixes them up: it has one tensor.)"""
    model = llava("pixtral")
    inputs = {"input_ids": torch.cat([prompt(36), prompt(36)]), "pixel_values": drawn(2, 3, 32, 72)}
    inputs["image_sizes"] = torch.tensor([[32, 72]] * 2)
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": zoo.SPECIAL, "eos_token_id": None}
    with vtc.compress(model, "visionzip", keep=0.4) as handle:
        both = model.generate(**inputs, num_beams=2, **options)
        assert handle.grids == ((4, 9),) * 4
        for row in range(2):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            assert torch.equal(both[row : row + 1], model.generate(**alone, num_beams=2, **options))


def test_pool_that_leaves_patches_out():
    """Gemma 3 pools 7 x 7 patches into 2 x 2 tokens of 3 x 3: the last row and column reach no token."""
    import transformers

    config = zoo.FAMILIES["gemma3"].config()
    config.vision_config.image_size, config.vision_config.patch_size, config.mm_tokens_per_image = 28, 4, 4
    model = zoo.randomise(transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa"))
    family, inner = vtc.adapters.multimodal.families.FAMILIES["gemma3"], model.model
    number = torch.arange(49.0).view(1, 1, 7, 7)
    pool = torch.nn.AvgPool2d(3, 3)(number).flatten()
    assert torch.equal(family.patches(inner, 49, 4).float().mean(1), pool)
    inputs = {"input_ids": prompt(4), "pixel_values": drawn(1, 3, 28, 28)}
    types = (inputs["input_ids"] == IMAGE).long()
    with vtc.compress(model, "visionzip", keep=2) as handle, torch.no_grad():
        model(**inputs, token_type_ids=types)
        assert handle.grids == ((2, 2),) and handle.report.after == (2,)


@pytest.mark.parametrize("tower", ["clip", "dinov2", "dinov2_registers"])
def test_class_tokens_that_reach_the_decoder(tower):
    """Merged in the tower they would shift every patch: refused, in the configuration and in a call."""
    model = copy.deepcopy(llava(tower))
    counts = {"clip": 26, "dinov2": 26, "dinov2_registers": 30}
    if tower != "dinov2_registers":
        inputs = {"input_ids": prompt(counts[tower]), "pixel_values": drawn(1, 3, 40, 40)}
        with vtc.compress(model, "tome", keep=0.9, where="tower"), torch.no_grad():
            with pytest.raises(vtc.InputError, match="vision_feature_select_strategy='full': the model was compressed"):
                model(**inputs, vision_feature_select_strategy="full")
        model.model.config.vision_feature_select_strategy = "full"
    with pytest.raises(vtc.UnsupportedModelError, match="class and register tokens .* reach the decoder"):
        vtc.compress(model, "tome", keep=0.9, where="tower")
    assert vtc.explain(model, "divprune").ok
