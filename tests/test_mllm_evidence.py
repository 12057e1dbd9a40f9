"""What methods read of the towers of the many classes, against the plain model run eagerly with hooks.

Nothing of the reference comes from `vtc`: attention is that of the maps which eager attention makes, and the patches of
a token are those which its feature has a gradient at.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import mllm_classes as classes
import pytest
import torch
from mllm_classes import core, sizes
from mllm_zoo import PROMPTS, fingerprint

import vtc
from vtc.adapters.multimodal.families.base import CAPTURED
from vtc.adapters.multimodal.families.towers import TOWERS
from vtc.scores.sensitivity import sensitivity

_ENCODER = "vision_tower.encoder.layers"
LAYERS = {  # where the layers of the tower are
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "qwen3_omni_moe_thinker"), "visual.blocks"),
    **dict.fromkeys(("qwen4_exp", "cohere_compass", "cosmos3_omni"), "visual.blocks"),
    **dict.fromkeys(("qwen2_5_omni_thinker", "exaone4_5"), "visual.blocks"),  # every other layer in windows
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr"), "visual.blocks"),
    **dict.fromkeys(("mistral3", "mistral_large4"), "vision_tower.transformer.layers"),
    "paddleocr_vl": "visual.vision_model.encoder.layers",
    "kimi_k25": "vision_tower.layers",
    **dict.fromkeys(("gemma4", "lfm2_vl", "minicpmv4_6", "minicpmv4_7"), _ENCODER),
}
PROJECTORS = {
    "gemma3n": "embed_vision",
    "gemma4": "embed_vision",
    "kimi_k25": "mm_projector",
    "paddleocr_vl": "projector",
    **dict.fromkeys(("mistral3", "mistral_large4", "lfm2_vl"), "multi_modal_projector"),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7"), "merger"),
    **{name: "visual.merger" for name, path in LAYERS.items() if path == "visual.blocks"},
}
MIDDLE = 2  # of four layers
ATTENDED = {"attention", "middle", "keys"}


def kinds(names):
    """Every model with one image, with a batch of several sizes, with videos of two lengths, and what is its own."""
    cases = [(name, case) for name in names for case in ("single", "ragged")]
    cases += [(name, "videos") for name in names if "video" in classes.CASES[name]]
    own = {"minicpmv4_6": "4x", "minicpmv4_7": "4x", "mistral3": "odd"}
    return cases + [(name, case) for name, case in own.items() if name in names]


@cache
def given(name, case):
    family = classes.CLASSES[name]
    if case == "videos":
        frames, rows, columns = family.video
        families = [family, replace(family, video=(frames - 1, columns, rows))]
        return core.assemble(family, [core.draw(one, PROMPTS["video"][0], i, 0) for i, one in enumerate(families)])
    if case == "odd":  # a row or a column of patches that is in no token
        family = replace(family, images=[(88, 64), (48, 104), (64, 64)])
        return core.assemble(family, [core.draw(family, prompt, i, 0) for i, prompt in enumerate(PROMPTS["ragged"])])
    if case == "4x":  # the tower does not merge
        family = replace(family, ids=sizes._minicpm_ids(4))
        rows = [core.draw(family, prompt, i, 0) for i, prompt in enumerate(PROMPTS["ragged"])]
        return {**core.assemble(family, rows), "downsample_mode": "4x"}
    return classes.inputs(name, case)


@dataclass(frozen=True)
class Reader(vtc.Random):
    """Chooses at random, and keeps what it was given."""

    asked: tuple[str, ...] = ()
    seen: ClassVar[list] = []

    @property
    def needs(self):
        return frozenset(self.asked)

    def decide(self, tokens, keep):
        self.seen.append(tokens)
        return super().decide(tokens, keep)


def handed(name, case, asked):
    """What a method is handed: every field in the order of the images' tokens, without padding; and the projector."""
    Reader.seen.clear()
    with vtc.compress(classes.build(name), Reader(keep=0.5, asked=tuple(sorted(asked)))), torch.no_grad():
        classes.build(name)(**given(name, case))
    (tokens,) = Reader.seen
    real = torch.ones(tokens.features.shape[:2], dtype=torch.bool) if tokens.mask is None else tokens.mask
    fields = {field: getattr(tokens, field) for field in {"features", *asked} - {"projector", "text"}}
    return {field: x[real] for field, x in fields.items()}, tokens


class Run:
    """The plain model with eager attention, and what its parts did while it encoded. Where the tower's layers end,
    the values are made a leaf, so that features have gradients there and no further back."""

    def __init__(self, name, case, shift=None):
        self.model, self.inputs = classes.build(name, "eager"), given(name, case)
        self.maps, self.keys, self.leaf, self.features = {}, {}, None, None
        inner = self.model.model
        undo = []
        for kind in ("image", "video"):
            encode = getattr(inner, f"get_{kind}_features", None)
            if encode is not None:
                inner.__dict__[f"get_{kind}_features"] = self.wrapped(encode)
                undo.append(f"get_{kind}_features")
        hooks = []
        if name in LAYERS:
            layers = inner.get_submodule(LAYERS[name])
            own = [next(m for m in layer.children() if type(m).__name__.endswith("Attention")) for layer in layers]
            self.numbers = {module: number for number, module in enumerate(own)}
            space = sys.modules[type(own[0]).__module__]
            eager = space.eager_attention_forward
            space.eager_attention_forward = lambda module, *args, **kwargs: self.attend(eager, module, args, kwargs)
            hooks.append(layers[-1].register_forward_hook(self.cut))
        if shift is not None:
            projector = inner.get_submodule(PROJECTORS[name])
            hooks.append(projector.register_forward_pre_hook(moved(shift), with_kwargs=True))
        try:
            self.model(**self.inputs)
        finally:
            for hook in hooks:
                hook.remove()
            for encode in undo:
                del inner.__dict__[encode]
            if name in LAYERS:
                space.eager_attention_forward = eager

    def wrapped(self, encode):
        def run(*args, **kwargs):
            output = encode(*args, **kwargs)
            if self.features is None:
                self.features = torch.cat([x.reshape(-1, x.shape[-1]) for x in output.pooler_output])
            return output

        return run

    def attend(self, eager, module, args, kwargs):
        out = eager(module, *args, **kwargs)
        number = self.numbers.get(module)
        if number is not None:
            self.maps.setdefault(number, []).append(out[1].detach().double().mean(1))  # [n, P, P]
            self.keys.setdefault(number, []).append(args[1].detach().double().mean(1))  # [n, P, D]
        return out

    def cut(self, module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        self.leaf = first.detach().requires_grad_()
        return (self.leaf, *output[1:]) if isinstance(output, tuple) else self.leaf

    def real(self):
        """Which patches are there, where images are padded to one number of them."""
        for name in ("image_position_ids", "video_position_ids"):
            if name in self.inputs:
                return (self.inputs[name] >= 0).all(-1)
        return self.inputs["pixel_attention_mask"].bool() if "pixel_attention_mask" in self.inputs else None

    def received(self, number):
        """[patches] what every patch received in a layer, from the patches that are there."""
        real = self.real()
        maps = self.maps[number]
        if real is not None:
            maps = [each * real[:, :, None] for each in maps]
        return torch.cat([each.sum(1).flatten() for each in maps])

    def members(self):
        """[tokens, patches] which patches each token's feature has a gradient at."""
        direction = torch.randn(self.features.shape[1], generator=torch.Generator().manual_seed(0))
        found = []
        for feature in self.features @ direction:
            (grad,) = torch.autograd.grad(feature, self.leaf, retain_graph=True)
            found.append((grad.flatten(0, -2) != 0).any(-1))
        return torch.stack(found).double()


def moved(shift):
    """A hook that adds to every row that the projector reads."""

    def hook(module, args, kwargs):
        if args:
            return (args[0] + shift, *args[1:]), kwargs
        if "input_ids" in kwargs:  # Gemma 3n embeds words of its tower's too
            return args, kwargs
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + shift}

    return hook


@cache
def run(name, case):
    made = Run(name, case)
    return made, made.members()


@pytest.mark.parametrize("name, case", kinds(LAYERS))
def test_attention_and_keys_are_the_towers(name, case):
    asked = ATTENDED & TOWERS[name].evidence
    fields, _ = handed(name, case, asked)
    made, members = run(name, case)
    assert torch.allclose(fields["features"], made.features, atol=1e-4), "another order of tokens"
    assert members.sum(1).min() > 0 and members.sum(0).max() == 1  # a patch is in one token
    near = {"rtol": 1e-3, "atol": 1e-4}
    assert torch.allclose(fields["attention"].double(), members @ made.received(3), **near)
    if "middle" in asked:
        assert torch.allclose(fields["middle"].double(), members @ made.received(MIDDLE), **near)
    keys = torch.cat([each.flatten(0, 1) for each in made.keys[3]])
    assert torch.allclose(fields["keys"].double(), members @ keys / members.sum(1, keepdim=True), **near)
    assert fields["attention"].std() > 0.01 * fields["attention"].mean()  # of any use at all


@pytest.mark.parametrize("name, case", kinds(PROJECTORS))
@torch.no_grad()
def test_the_projector_and_its_inputs_are_the_models(name, case):
    """Projected again, a token's input gives the token; and it answers a small step as it does inside the model."""
    fields, tokens = handed(name, case, {"inputs", "projector"})
    inputs = fields["inputs"]
    assert torch.allclose(tokens.projector(inputs[None])[0], fields["features"], atol=1e-4)
    width, probes, step = inputs.shape[-1], 3, 0.01
    directions = torch.randn(probes, width, generator=torch.Generator().manual_seed(0))
    directions = step * torch.nn.functional.normalize(directions, dim=1)
    apart = [(Run(name, case, u).features - Run(name, case, -u).features).norm(dim=1) for u in directions]
    want = torch.stack(apart).mean(0) / (2 * step)
    got = sensitivity(tokens.projector, inputs[None], probes=probes, step=step, exact=False)[0]
    assert torch.allclose(got, want, rtol=2e-2)
    assert want.std() > 0.01 * want.mean()


METHODS = {  # what each reads
    "visionzip": {"attention", "keys"},
    "hiprune": {"attention", "middle"},
    "vispruner": {"attention"},
    "scope": {"attention"},
    "idpruner": {"attention"},
    "zoo_prune": {"inputs", "projector"},
    "cdpruner": {"text"},
    "holov": {"attention"},
    "mmtok": {"inputs", "text"},
}


@cache
def grids(name):
    with vtc.compress(classes.build(name), "random", keep=0.5) as handle, torch.no_grad():
        classes.build(name)(**classes.inputs(name, "ragged"))
        return handle.patches[0].grids


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_methods(name, method):
    """They run, take nothing of the words, and leave nothing behind; or they are refused, and the reason names what
    they read and the model."""
    model, inputs = classes.build(name), classes.inputs(name, "ragged")
    chosen = vtc.methods.make(method, keep=0.4)
    lacking = (chosen.needs - chosen.optional) & CAPTURED - TOWERS[name].evidence
    lacking |= chosen.needs & {"grid"} if None in grids(name) else set()
    dense, before = model(**inputs).logits, fingerprint(model)
    plan = vtc.explain(model, chosen)
    assert plan.ok == (not lacking), str(plan)
    if lacking:
        with pytest.raises(vtc.UnsupportedModelError, match=f"{method} reads .*{name}"):
            vtc.compress(model, chosen)
        assert fingerprint(model) == before
        return
    with vtc.compress(model, chosen) as handle:
        assert model(**inputs).logits.isfinite().all()
        kept, report = handle.kept, handle.report
    assert list(report.after) == [max(1, round(0.4 * n)) for n in report.before]
    assert kept[~classes.placeholders(name, inputs["input_ids"])].all()
    assert fingerprint(model) == before and torch.equal(model(**inputs).logits, dense)


def test_all_that_is_opened_is_compared():
    for name, tower in TOWERS.items():
        assert (name in LAYERS) == ("attention" in tower.evidence), name
        assert (name in PROJECTORS) == ("projector" in tower.evidence), name


REFUSED = {
    ("gemma3n", "visionzip"): "a MobileNet of convolutions",
    ("gemma3n", "hiprune"): "a MobileNet of convolutions",
    ("gemma4_unified", "vispruner"): "has no vision tower",
    ("gemma4_unified", "zoo_prune"): "made of pixels and of its place",
    ("minicpmv4_6", "hiprune"): "merges patches on the way",
    ("aya_vision", "visionzip"): "vtc does not know of aya_vision",
}


@pytest.mark.parametrize("name, method", REFUSED)
def test_the_reason_is_the_true_one(name, method):
    with pytest.raises(vtc.UnsupportedModelError, match=REFUSED[name, method]):
        vtc.compress(classes.build(name), method, keep=0.5)
