"""Scores: the reference vectors, closed forms against autograd, attention against a dense softmax, scorer files."""

import copy
import importlib
import logging
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from vtc import scores
from vtc.errors import InputError, OptionError
from vtc.ops import definitions
from vtc.scores import scorer as scorer_file
from vtc.scores.projector import quadratic
from vtc.scores.projector_form import _known, in_type, recognize
from vtc.scores.sensitivity import _warn_flat, central_differences

SENSITIVITY = importlib.import_module("vtc.scores.sensitivity")  # the package's own name is the function


def closed(n, d):
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return (torch.sin(0.7 * i * (j + 1) + 0.3 * j) + 0.5 * torch.cos(0.11 * i * i + j)).float()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(module, seed=0, spread=0.5):
    """The module with seeded weights; the gains of norms stay near 1."""
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(module.named_parameters())):
            p.copy_(spread * normal(*p.shape, seed=seed + k) + (1 if p.ndim == 1 and "weight" in name else 0))
    return module.eval()


def mlp(width=6, hidden=10, out=8, act=None, seed=0):
    return seeded(nn.Sequential(nn.Linear(width, hidden), act or nn.GELU(), nn.Linear(hidden, out)), seed)


def ranks(x):
    return x.flatten().argsort().argsort().double()


def spearman(a, b):
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


# --- attention ---


def dense(query, key, scale, mask):
    """The whole map in float64: [B, H, N, N]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.double() @ key.double().mT * scale
    return logits.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("heads,key_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("tile", [1, 500, 1 << 24])
def test_attention_received_is_the_column_sum_of_the_dense_map(heads, key_heads, tokens, tile):
    query, key = normal(3, heads, tokens, 5), normal(3, key_heads, tokens, 5, seed=1)
    mask = torch.ones(3, tokens, dtype=torch.bool)
    mask[1, tokens // 2 + 1 :] = False
    mask[2] = False  # padding alone
    for given, scale in ((None, None), (mask, None), (mask, 0.8)):
        real = torch.ones_like(mask) if given is None else given
        full = dense(query, key, 5**-0.5 if scale is None else scale, real) * real[:, None, :, None]
        plain = definitions.attention_received(query, key, 5**-0.5 if scale is None else scale, given, tile=tile)
        for have in (plain, scores.attention_received(query, key, scale=scale, mask=given)):
            assert have.dtype == torch.float32
            torch.testing.assert_close(have.double(), full.mean(1).sum(1), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(have.sum(1), real.sum(1).float())


def test_attention_received_reads_no_padding_and_halves():
    query, key = normal(2, 2, 9, 4), normal(2, 2, 9, 4, seed=1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    have = scores.attention_received(query, key, mask=mask)
    alone = scores.attention_received(query[1:, :, :6], key[1:, :, :6])
    torch.testing.assert_close(have[1:, :6], alone)
    half = scores.attention_received(query.bfloat16(), key.bfloat16())
    torch.testing.assert_close(half, scores.attention_received(query.bfloat16().float(), key.bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(have, scores.attention_received(query, key, mask=mask))


def test_attention_vector():
    query, key = closed(96, 8), torch.cos(1.7 * closed(96, 8).double()).float()
    query, key = (t.view(1, 96, 2, 4).transpose(1, 2) for t in (query, key))
    a = scores.attention_received(query, key).view(24, 4).sum(1)
    torch.testing.assert_close(a[:4], torch.tensor([4.10165, 3.84496, 4.22664, 3.92130]), rtol=0, atol=6e-6)
    assert a.sum().item() == pytest.approx(96, abs=1e-4)


@pytest.mark.parametrize("prefix", [1, 5])
def test_cls_attention_is_a_softmax_over_the_patches(prefix):
    query, key = normal(2, 4, 12, 6), normal(2, 2, 12, 6, seed=1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 9:] = False
    have = scores.cls_attention(query, key, prefix, mask=mask)
    want = dense(query[:, :, :1], key[:, :, prefix:], 6**-0.5, mask[:, prefix:]).mean(1)[:, 0]
    torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(have.sum(1), torch.ones(2))
    last = scores.last_query_attention(query[:, :, 0], key[:, :, prefix:], mask=mask[:, prefix:])
    assert torch.equal(last, have)


def test_attention_refuses_what_does_not_fit():
    q = normal(1, 3, 4, 5)
    with pytest.raises(InputError, match="3 query heads cannot share 2 key heads"):
        scores.attention_received(q, normal(1, 2, 4, 5))
    with pytest.raises(InputError, match="4 queries and 6 keys"):
        scores.attention_received(q, normal(1, 3, 6, 5))
    with pytest.raises(InputError, match="do not fit together"):
        scores.attention_received(q, normal(1, 3, 4, 6))
    with pytest.raises(InputError, match="mask must be bool"):
        scores.attention_received(q, q, mask=torch.ones(1, 4))
    with pytest.raises(InputError, match="prefix=0"):
        scores.cls_attention(q, q, 0)


# --- norm and relevance ---


def test_norm_and_relevance():
    x, text = normal(2, 7, 5), normal(2, 4, 5, seed=1)
    torch.testing.assert_close(scores.norm(x), x.square().sum(-1).sqrt())
    assert scores.norm(x.half()).dtype == torch.float32 and scores.norm(x.half() * 1e4).isfinite().all()
    have = scores.relevance(x, text)
    mean = nn.functional.normalize(text, dim=-1).mean(1, keepdim=True)
    torch.testing.assert_close(have, nn.functional.cosine_similarity(x, mean, dim=-1))
    cosines = nn.functional.cosine_similarity(x[:, :, None], text[:, None], dim=-1).mean(-1)
    torch.testing.assert_close(have / have[:, :1], cosines / cosines[:, :1])  # one factor per image
    padded = torch.cat([text, torch.full((2, 2, 5), float("nan"))], dim=1)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    torch.testing.assert_close(scores.relevance(x, padded, mask), have)
    assert torch.equal(scores.relevance(x, text[:, :0]), torch.zeros(2, 7))


# --- sensitivity ---


def vector_projector():
    """zoo-prune.md, section 8.2."""
    m = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12)).double()
    with torch.no_grad():
        m[0].weight.copy_(0.5 * closed(16, 8).double())
        m[0].bias.copy_(torch.cos(torch.arange(16.0, dtype=torch.float64)))
        m[2].weight.copy_(0.4 * torch.cos(1.3 * closed(12, 16).double()))
        m[2].bias.copy_(torch.sin(torch.arange(12.0, dtype=torch.float64)))
    return m


def test_sensitivity_vectors():
    m, x = vector_projector(), closed(24, 8).double()
    u = nn.functional.normalize(closed(5, 8).double(), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(
            m(x)[0, :3], torch.tensor([2.653648, 1.043117, 1.175907]).double(), rtol=0, atol=1e-6
        )
        exact = recognize(m, dtype=torch.float64).along(x[:, None], u)
        central = central_differences(m, x[None], u, 0.01)[0]
    wanted = torch.tensor([1.457525, 1.835016, 1.547146, 1.463169], dtype=torch.float64)
    torch.testing.assert_close(exact[:4], wanted, rtol=0, atol=1e-6)
    assert exact.sum().item() == pytest.approx(32.084620, abs=1e-6)
    wanted = torch.tensor([1.457521, 1.835014, 1.547148, 1.463158], dtype=torch.float64)
    torch.testing.assert_close(central[:4], wanted, rtol=0, atol=1e-6)
    assert central.sum().item() == pytest.approx(32.084466, abs=1e-6)
    assert ((exact - central) / exact).abs().max() == pytest.approx(1.4e-5, rel=0.05)


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class SideBySide(nn.Sequential):
    def forward(self, x):
        return super().forward(x.flatten(-2))


def projectors():
    """Every projector of a family that transformers ships and whose form is known: (name, module, P, V)."""
    from transformers import InternVLConfig, LlavaConfig, LlavaNextConfig
    from transformers.activations import ACT2FN
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
    from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = {"model_type": "clip_vision_model", "hidden_size": 6, "num_attention_heads": 2, "intermediate_size": 8}
    for config, cls in ((LlavaConfig, LlavaMultiModalProjector), (LlavaNextConfig, LlavaNextMultiModalProjector)):
        for act in ("gelu", "gelu_pytorch_tanh", "quick_gelu"):
            parts = {"vision_config": clip, "text_config": {"model_type": "llama", **text}, "projector_hidden_act": act}
            yield f"{cls.__name__} {act}", cls(config(**parts)), None, 6
    vision = {"hidden_size": 3, "num_attention_heads": 1, "intermediate_size": 8, "num_hidden_layers": 1}
    intern = InternVLConfig(vision_config=vision, text_config={"model_type": "qwen2", **text})
    yield "InternVL", InternVLMultiModalProjector(intern), None, 12
    yield "Qwen2-VL", PatchMerger(9, 5), 4, 5
    yield "Qwen2.5-VL", Qwen2_5_VLPatchMerger(9, 5), 4, 5
    merger = Qwen2_5_VLPatchMerger(9, 5)
    merger.ln_q = RMSNorm(5)  # its own computes in float32 even when asked for float64
    yield "Qwen2.5-VL in float64", merger, 4, 5
    qwen3 = Qwen3VLVisionConfig(hidden_size=5, out_hidden_size=9, num_heads=1)
    yield "Qwen3-VL", Qwen3VLVisionPatchMerger(qwen3), 4, 5
    yield "Qwen3-VL DeepStack", Qwen3VLVisionPatchMerger(qwen3, use_postshuffle_norm=True), 4, 5
    for act in (nn.GELU("tanh"), nn.SiLU(), nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), ACT2FN["quick_gelu"]):
        yield f"Sequential {act}", nn.Sequential(nn.Linear(6, 10), act, nn.Linear(10, 8)), None, 6
    bare = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Identity(), nn.GELU(), nn.Dropout(0.1), nn.Linear(10, 8))
    yield "no bias", bare, None, 6
    yield "RMSNorm", nn.Sequential(RMSNorm(6), nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 8)), None, 6
    yield "patches side by side", SideBySide(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8)), 2, 6


PROJECTORS = [pytest.param(*rest, id=name) for name, *rest in projectors()]


def jacobians(module, x):
    """[T, C, V] by autograd: all patches of a token move together. x [T, P, V] or [T, V]."""
    one = in_type(module, x.dtype)

    def of(token):
        return torch.autograd.functional.jacobian(
            lambda u: one((token + u)[None, None])[0, 0], torch.zeros(token.shape[-1], dtype=x.dtype)
        )

    return torch.stack([of(token) for token in x])


@pytest.mark.parametrize("module,patches,width", PROJECTORS)
def test_every_known_projector_has_its_exact_jacobian(module, patches, width):
    module = seeded(copy.deepcopy(module), seed=3).double()
    x = normal(7, *([patches] if patches else []), width, seed=1, dtype=torch.float64) + 0.3
    form = recognize(module, patches, torch.float64)
    assert form is not None
    rows, full = x.view(7, -1, width), jacobians(module, x)
    u = nn.functional.normalize(normal(5, width, seed=2, dtype=torch.float64), dim=1)
    with torch.no_grad():
        exact = form.along(rows, u)
        single = any(type(m).__name__ == "Qwen2_5_VLRMSNorm" for m in module.modules())
        wanted = (full @ u.mT).norm(dim=1).mean(1)
        torch.testing.assert_close(exact, wanted, rtol=1e-6 if single else 1e-9, atol=1e-12)
        if form.closed:
            wanted = full.flatten(1).norm(dim=1) / width**0.5
            torch.testing.assert_close(form.frobenius(rows), wanted, rtol=1e-9, atol=1e-12)
        if not single and "ReLU" not in str(module):  # central differences jump where a ReLU does
            call = in_type(module, torch.float64)
            gaps = [(central_differences(call, x[None], u, h)[0] / exact - 1).abs().max() for h in (1e-3, 2.5e-4)]
            assert gaps[0] < 1e-3 and gaps[1] < gaps[0] / 8  # shrinks as h^2
    have = scores.sensitivity(module, x[None], probes=5)
    assert have.shape == (1, 7) and have.dtype == torch.float32
    torch.testing.assert_close(scores.sensitivity(module.float(), x[None].float(), probes=5), have, rtol=1e-4, atol=0)


def test_closed_form_ranks_as_probes_do():
    m = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 80))
    torch.nn.init.normal_(m[0].weight, std=0.2, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(m[2].weight, std=0.2, generator=torch.Generator().manual_seed(2))
    x = normal(1, 300, 64, seed=3)
    exact, probes = scores.sensitivity(m, x), scores.sensitivity(m, x, exact=False)
    assert spearman(exact, probes) >= 0.95
    torch.testing.assert_close(exact, probes, rtol=0.05, atol=0)
    assert torch.equal(exact, scores.sensitivity(m, x, exact=True))


def merger(out=40, width=24, seed=0):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger

    return seeded(Qwen2_5_VLPatchMerger(out, width), seed, spread=0.2)


@pytest.mark.parametrize("apart", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("between", [0.1, 0.5])
def test_a_mergers_closed_form_ranks_as_very_many_directions(between, apart):
    """Tokens of different scales (`between`), and patches of different scales in a token (`apart`, which is why the
    form is not exact). It agrees with 2,048 exact directions at least nearly as well as 64 of them do."""
    m, x = merger(), normal(1, 300, 4, 24, seed=1)
    x = x * (between * normal(1, 300, 1, 1, seed=2) + apart * normal(1, 300, 4, 1, seed=3)).exp()
    exact = scores.sensitivity(m, x, probes=2048, exact=True)
    few, form = scores.sensitivity(m, x, exact=True), scores.sensitivity(m, x)
    assert spearman(form, exact) > 0.985 and spearman(form, exact) > spearman(few, exact) - 0.01
    assert not torch.equal(form, scores.sensitivity(m, 2 * x)) or apart == 0  # the norm undoes all but eps
    torch.testing.assert_close(few, scores.sensitivity(m, x, exact=False), rtol=1e-3, atol=0)


def test_a_mergers_closed_form_is_exact_where_its_patches_have_one_scale():
    m = merger()
    x = torch.nn.functional.normalize(normal(1, 5, 4, 24, seed=1), dim=-1) * 24**0.5
    form = SENSITIVITY.recognize(m, 4)
    projected = form.frobenius(x[0])
    jacobian = torch.autograd.functional.jacobian  # of the form without the norm's own rank-one part, at fixed scale
    for token, got in zip(x[0], projected, strict=True):

        def moved(u, token=token):
            y = token / token.square().mean(-1, keepdim=True).add(1e-6).sqrt()
            a = torch.einsum("hpv,pv->h", form.first, y + u) + form.bias
            return form.second @ form.act(a)

        want = jacobian(moved, torch.zeros(24)).norm() / 24**0.5
        assert got.item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("every", [1, 3, 4])
def test_attention_of_every_so_many_queries(every):
    query, key = normal(2, 4, 37, 8, seed=1), normal(2, 2, 37, 8, seed=2)
    mask = torch.arange(37) < torch.tensor([[37], [29]])
    got = scores.attention_received(query, key, mask=mask, every=every)
    for image, real in enumerate(mask.sum(1).tolist()):
        keys = key[image].repeat_interleave(2, dim=0)[:, :real].double()
        asked = range(0, real, every)
        logits = query[image, :, list(asked)].double() @ keys.mT / 8**0.5
        want = logits.softmax(-1).sum(1).mean(0) * real / len(asked)
        assert torch.allclose(got[image, :real].double(), want, atol=1e-5)
        assert not got[image, real:].any()


@pytest.mark.parametrize("name", ["along", "frobenius", "central"])
def test_tiles_change_nothing(name, monkeypatch):
    m, x = merger(), normal(2, 5, 4, 24, seed=1)
    if name == "frobenius":
        m, x = mlp(24), x[:, :, 0]
    exact = name != "central" and "auto"
    whole = scores.sensitivity(m, x, probes=7, exact=exact)
    monkeypatch.setattr(SENSITIVITY, "TILE", 1)
    monkeypatch.setattr("vtc.scores.projector.TILE", 1)
    torch.testing.assert_close(whole, scores.sensitivity(m, x, probes=7, exact=exact), rtol=1e-4, atol=0)


def test_exact_forms_cost_few_passes_of_the_projector():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    known, x = mlp(32, 128, 128), normal(1, 400, 32)
    big, rows = merger(1024, 64), normal(1, 400, 4, 64)
    scores.sensitivity(known, x)  # Q once
    assert flops(lambda: scores.sensitivity(known, x)) < 1.1 * flops(lambda: known(x))
    pass_ = flops(lambda: big(rows))
    brief, full = (flops(lambda e=e: scores.sensitivity(big, rows, exact=e)) for e in ("auto", True))
    assert (
        brief < full / 5 and full < flops(lambda: scores.sensitivity(big, rows, exact=False)) / 2 and full < 60 * pass_
    )


class Tail(nn.Module):
    """A form that is not known."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).tanh()


class Odd:
    """A callable around a module, in the adapter's convention."""

    def __init__(self, module, factor=1.0):
        self.module, self.factor = module, factor

    def __call__(self, x):
        return self.factor * self.module(x.flatten(0, 2)).view(*x.shape[:2], -1)


def test_what_is_not_the_form_is_not_trusted():
    x = normal(2, 9, 6, seed=1)
    hooked = mlp()
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    soft = mlp(act=nn.Softmax(dim=-1))
    for module in (Tail(mlp()), hooked, soft, nn.Linear(6, 8), mlp().to("meta"), lambda x: x):
        assert recognize(module) is None
    for module in (Tail(mlp()), hooked, soft):
        auto = scores.sensitivity(module, x, probes=4)
        assert torch.equal(auto, scores.sensitivity(module, x, probes=4, exact=False))
        with pytest.raises(OptionError, match="exact=True: .* is not of the form"):
            scores.sensitivity(module, x, exact=True)
    assert recognize(Odd(merger(), factor=2.0), 4) is None and recognize(Odd(merger()), 4) is not None
    torch.testing.assert_close(scores.sensitivity(hooked, x), 2 * scores.sensitivity(mlp(), x), rtol=0.5, atol=0)


def test_a_wrapper_and_its_module_agree():
    m, x = merger(), normal(2, 9, 4, 24, seed=1)
    for exact in ("auto", False):
        torch.testing.assert_close(
            scores.sensitivity(m, x, exact=exact), scores.sensitivity(Odd(m), x, exact=exact), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("wrap", [lambda m: m, Odd], ids=["module", "wrapper"])
@pytest.mark.parametrize("exact", ["auto", False])
def test_half_precision_projectors_are_computed_in_float32(wrap, exact):
    m, x = merger().bfloat16(), normal(1, 9, 4, 24, seed=1)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    want = scores.sensitivity(copy.deepcopy(m).float(), x.bfloat16().float(), exact=exact)
    with torch.autocast("cpu", torch.bfloat16):
        have = scores.sensitivity(wrap(m), x.bfloat16(), exact=exact)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=0)
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in m.parameters())
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_seeds_and_generators():
    m, x = Tail(mlp()), normal(1, 9, 6, seed=1)
    have = scores.sensitivity(m, x, seed=5)
    torch.manual_seed(9)
    assert torch.equal(have, scores.sensitivity(m, x, seed=5))
    assert torch.equal(have, scores.sensitivity(m, x, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(have, scores.sensitivity(m, x, seed=6))
    known, merging, state = mlp(), merger(width=6), torch.get_rng_state()
    scores.sensitivity(known, x)
    scores.sensitivity(merging, x.view(1, -1, 1, 6).expand(1, -1, 4, 6))
    assert torch.equal(state, torch.get_rng_state())


def test_steps_scale_and_shift():
    m, x = Tail(mlp()), normal(1, 40, 6, seed=1, dtype=torch.float64)
    m = m.double()
    order = [scores.sensitivity(m, x, step=h).argsort() for h in (1e-3, 1e-2)]
    assert torch.equal(*order)
    known = mlp()
    one = scores.sensitivity(known, x)
    with torch.no_grad():
        known[2].weight.mul_(3)
        known[2].bias.add_(7)
    torch.testing.assert_close(scores.sensitivity(known, x), 3 * one)  # and what was kept of the old weights is gone


def test_a_batch_gives_what_its_images_give_alone_and_padding_is_not_read():
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    for m, patches in ((mlp(), ()), (merger(width=6), (4,)), (Tail(mlp()), ())):
        x = normal(2, 9, *patches, 6, seed=1)
        x[1, 6:] = float("nan")
        have = scores.sensitivity(m, x, mask=mask)
        torch.testing.assert_close(have[1:, :6], scores.sensitivity(m, x[1:, :6]), rtol=1e-4, atol=0)
        assert torch.equal(have[1, 6:], torch.zeros(3))


@pytest.mark.parametrize("exact", ["auto", False])
def test_a_linear_projector_gives_ones_and_one_warning(exact, caplog):
    _warn_flat.cache_clear()
    x = normal(2, 50, 6, seed=1)
    flat = seeded(nn.Sequential(nn.Linear(6, 8))) if exact is False else mlp(act=nn.LeakyReLU(1.0))
    with caplog.at_level(logging.WARNING, "vtc"):
        assert torch.equal(scores.sensitivity(flat, x, exact=exact), torch.ones(2, 50))
        assert torch.equal(scores.sensitivity(flat, x, exact=exact), torch.ones(2, 50))
    assert len(caplog.records) == 1 and "diversity alone" in caplog.text
    calls = []
    scores.sensitivity(lambda x: calls.append(len(x)) or flat(x), x, exact=exact)
    assert sum(calls) == 4 * len(x)  # not 128 passes to find that out
    _warn_flat.cache_clear()
    with caplog.at_level(logging.WARNING, "vtc"):
        one = scores.sensitivity(mlp(), x[:, :1])  # one token is no sign of a linear projector
    assert torch.equal(one, torch.ones(2, 1)) and len(caplog.records) == 1
    with torch.no_grad():
        raw = central_differences(flat, x, nn.functional.normalize(normal(8, 6), dim=1), 0.01)
    torch.testing.assert_close(raw, raw.mean().expand_as(raw), rtol=1e-3, atol=0)


def test_what_is_kept_of_a_module_goes_with_it():
    m, x = mlp(), normal(1, 9, 6, seed=1)
    scores.sensitivity(m, x)
    assert "Q" in _known[m][1] and not hasattr(m, "memo") and set(m.state_dict()) == set(mlp().state_dict())
    kept = _known[m][1]["Q"]
    scores.sensitivity(m, x)
    assert _known[m][1]["Q"] is kept
    before = len(_known)
    del m
    assert len(_known) == before - 1


def test_sensitivity_in_inference_mode_and_without_gradients():
    m, x = mlp(), normal(1, 9, 6, seed=1)
    want = scores.sensitivity(m, x)
    assert not want.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(scores.sensitivity(m, x.clone()), want)
        inside = mlp()
        assert torch.equal(scores.sensitivity(inside, x), want) and inside not in _known
    half = scores.sensitivity(merger(), normal(0, 9, 4, 24))
    assert half.shape == (0, 9) and scores.sensitivity(mlp(), x[:, :0]).shape == (1, 0)


def test_sensitivity_refuses_bad_input():
    m, x = mlp(act=nn.ReLU()), normal(1, 9, 6, seed=1)
    bad = x.clone()
    bad[0, 3, 2] = float("nan")
    for exact in ("auto", False):
        with pytest.raises(InputError, match="NaN or infinity"):
            scores.sensitivity(m, bad, exact=exact)
    broken = mlp()
    with torch.no_grad():
        broken[2].weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="projector's weights"):
        scores.sensitivity(broken, x)
    with pytest.raises(InputError, match=r"\[B, N, V\]"):
        scores.sensitivity(m, x[0])
    with pytest.raises(InputError, match="one row per token"):
        scores.sensitivity(lambda x: x[:, ::2], x)
    for option in ({"probes": 0}, {"step": 0.0}, {"step": math.nan}, {"exact": "yes"}, {"probes": 2.5}):
        with pytest.raises(OptionError, match=next(iter(option))):
            scores.sensitivity(m, x, **option)


# --- the trained scorer ---


def make_scorer(width=6, hidden=4, seed=0):
    scorer = scores.Scorer(width, hidden, "tiny-vl")
    return seeded(scorer, seed).requires_grad_(False)


def test_scorer_is_the_mean_product():
    scorer, x = make_scorer(), normal(2, 9, 6, seed=1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    q, k = scorer.query(x), scorer.key(x)
    want = (q @ k.mT).mean(-1) / 4**0.5
    torch.testing.assert_close(scorer.score(x), want)
    torch.testing.assert_close(scorer(x), want)
    x[1, 5:] = float("nan")
    have = scorer.score(x, mask)
    torch.testing.assert_close(have[1:, :5], scorer.score(x[1:, :5]))
    assert torch.equal(have[1, 5:], torch.zeros(4))
    half = copy.deepcopy(scorer).bfloat16().score(x[:1].bfloat16())
    assert half.dtype == torch.float32 and spearman(half, want[:1]) > 0.9
    with pytest.raises(InputError, match=r"trained for tiny-vl\) reads \[B, N, 6\]"):
        scorer.score(x[..., :5])


def test_diff_top_k_sums_to_the_budget():
    w = torch.cos(0.37 * torch.arange(10.0)) + 0.01 * torch.arange(10.0)
    assert scores.diff_top_k(w[None], 0.2).sum().item() == pytest.approx(2.0, abs=1e-5)
    w = normal(3, 50) * 10
    mask = torch.ones(3, 50, dtype=torch.bool)
    mask[1, 20:] = False
    mask[2] = False
    for keep in (0.1, 0.5, 1, 7):
        soft = scores.diff_top_k(w, keep, mask)
        budget = [keep * n if isinstance(keep, float) else keep for n in (50, 20)]
        torch.testing.assert_close(soft[:2].sum(1), torch.tensor(budget, dtype=torch.float32), rtol=1e-4, atol=1e-4)
        assert torch.equal(soft[1, 20:], torch.zeros(30)) and torch.equal(soft[2], torch.zeros(50))
        torch.testing.assert_close(soft[1:2, :20], scores.diff_top_k(w[1:2, :20], keep))
    everything = scores.diff_top_k(w.double()[:1], 1.0)
    assert everything.sum().item() == pytest.approx(50 - 1e-4, abs=1e-6)
    soft = scores.diff_top_k(w[:1], 5)
    by_score = soft[0][w[0].argsort()]
    assert (by_score.diff() >= 0).all()
    for keep in (0.0, 1.5, 0, True):
        with pytest.raises(OptionError, match="keep="):
            scores.diff_top_k(w, keep)


def test_diff_top_k_has_the_gradient_of_the_constraint():
    w = normal(2, 7, dtype=torch.float64).requires_grad_()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    assert torch.autograd.gradcheck(lambda w: scores.diff_top_k(w, 0.3), (w,))
    assert torch.autograd.gradcheck(lambda w: scores.diff_top_k(w, 2, mask), (w,))
    scores.diff_top_k(w, 0.3).sum().backward()  # the sum is fixed
    torch.testing.assert_close(w.grad, torch.zeros_like(w), rtol=0, atol=1e-10)


def test_scorer_files_round_trip(tmp_path):
    scorer, path = make_scorer(), tmp_path / "scorer.safetensors"
    scores.save_scorer(scorer, path)
    again = scores.load_scorer(path)
    assert (again.width, again.hidden, again.model) == (6, 4, "tiny-vl")
    x = normal(1, 9, 6)
    assert torch.equal(again.score(x), scorer.score(x)) and not any(p.requires_grad for p in again.parameters())
    scores.save_scorer(copy.deepcopy(scorer).bfloat16(), path)
    assert scores.load_scorer(path).key.weight.dtype == torch.float32


def change(**tensors):
    state = {**make_scorer().state_dict(), **{k.replace("_", "."): v for k, v in tensors.items()}}
    return {k: v for k, v in state.items() if v is not None}


GOOD = {"format": "vtc-selector", "version": "1"}
BAD_FILES = {
    "shape": (change(key_weight=torch.zeros(4, 5)), GOOD, OptionError, r"'key.weight' is \(4, 5\), expected \(4, 6\)"),
    "bias": (change(query_bias=torch.zeros(3)), GOOD, OptionError, r"'query.bias' is \(3,\), expected \(4,\)"),
    "rank": (change(query_weight=torch.zeros(4)), GOOD, OptionError, r"'query.weight' is \(4,\), expected \[h, D\]"),
    "missing": (change(key_bias=None), GOOD, OptionError, r"'key.bias' is missing, expected \(4,\)"),
    "nothing": (change(query_weight=None), GOOD, OptionError, r"'query.weight' is missing, expected \[h, D\]"),
    "extra": (change(value_weight=torch.zeros(2)), GOOD, OptionError, "'value.weight' does not belong"),
    "integers": (change(key_bias=torch.zeros(4, dtype=torch.int32)), GOOD, OptionError, "'key.bias' is I32"),
    "nan": (change(key_bias=torch.full((4,), math.nan)), GOOD, InputError, "'key.bias' holds NaN"),
    "format": (change(), {"format": "pt"}, OptionError, "format 'pt', not 'vtc-selector'"),
    "bare": (change(), None, OptionError, "format None"),
    "newer": (change(), {**GOOD, "version": "2"}, OptionError, "version '2', this vtc reads 1"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_scorer_files_that_are_refused(name, tmp_path):
    from safetensors.torch import save_file

    tensors, metadata, error, message = BAD_FILES[name]
    save_file(tensors, str(tmp_path / "bad.safetensors"), metadata=metadata)
    with pytest.raises(error, match=f"bad.safetensors.*{message}"):
        scores.load_scorer(tmp_path / "bad.safetensors")


def test_other_formats_and_sizes_are_refused(tmp_path, monkeypatch):
    pickled = tmp_path / "scorer.safetensors"
    torch.save(make_scorer().state_dict(), pickled)
    with pytest.raises(OptionError, match="no safetensors file"):
        scores.load_scorer(pickled)
    for content in (b"", b"\xff" * 64, b"{}"):
        pickled.write_bytes(content)
        with pytest.raises(OptionError, match="no safetensors file"):
            scores.load_scorer(pickled)
    with pytest.raises(OptionError, match="no such file"):
        scores.load_scorer(tmp_path)
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as file:
        file.truncate(scorer_file.MAX_BYTES + 1)  # sparse
    with pytest.raises(OptionError, match=f"huge.safetensors has {scorer_file.MAX_BYTES + 1} bytes"):
        scores.load_scorer(huge)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(OptionError, match="pip install"):
        scores.save_scorer(make_scorer(), tmp_path / "x.safetensors")


def test_the_package_imports_no_framework():
    code = "import sys, vtc.scores; print([m for m in ('transformers', 'safetensors', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("width", [1, 3, 64, 101])
def test_quadratic_form(width):
    g = torch.randn(5, width, generator=torch.Generator().manual_seed(1)).double()
    root = torch.randn(width, width, generator=torch.Generator().manual_seed(2)).double()
    matrix = root @ root.mT
    assert torch.allclose(quadratic(g, matrix), torch.einsum("ti,ij,tj->t", g, matrix, g), rtol=1e-12)


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_what_the_projector_computed_is_not_computed_again(name):
    """The hidden values that the adapter overheard give the sensitivity that the inputs alone give."""
    import mllm_zoo as zoo

    import vtc

    model, heard = zoo.build(name), []
    own = scores.sensitivity
    with vtc.compress(model, "zoo_prune", keep=0.5), torch.no_grad():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scores.registry, "sensitivity", lambda *a, **k: heard.append((a, k)) or own(*a, **k))
            model(**zoo.inputs(name, "ragged"))
    (args, options), *_ = heard
    assert options["hidden"] is not None
    known, anew = own(*args, **options), own(*args, **{**options, "hidden": None})
    assert torch.allclose(known, anew, rtol=1e-5, atol=1e-7)
