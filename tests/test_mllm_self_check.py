"""A model that no family file describes is tried at `compress`: mistakes planted in the patch are found, and a model of
an unknown class is served if it passes."""

import copy

import mllm_classes as classes
import pytest
import torch
from classes_oracle import expected, said
from mllm_zoo import fingerprint
from test_mllm_classes import NAMES, OWN

import vtc
from vtc.adapters.multimodal import patch, self_check, trial
from vtc.adapters.multimodal.families import generic

# One of every way to place features, to count positions, and to keep a state.
KINDS = "qwen3_5 qwen3_vl_moe glm4v gemma4 mistral3_ministral3 lfm2_vl molmo2 kimi_k25 aria cosmos3_omni".split()
COUNTING = {"qwen3_5", "qwen3_vl_moe", "glm4v", "cosmos3_omni"}  # decode at positions counted from the mask: not wrong
# Newlines among the features, features of its own: proven by their class alone.
UNTRIED = {"hunyuan_vl", "hy_v4_vl", "ovis2"}


def check(name):
    """(what is wrong, why it could not be tried), asked anew."""
    site = next(item for item in vtc.plan._find(classes.build(name), None))[1]
    return self_check._check(site)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNTRIED | OWN])
def test_every_proven_class_is_tried_and_right(name):
    model = classes.build(name)
    site = next(item for item in vtc.plan._find(model, None))[1]
    before, weights = fingerprint(model), {n: p.data_ptr() for n, p in model.named_parameters()}
    rehearsal = self_check.Rehearsal(site.family, site.inner)
    assert self_check._check(site) == ("", "")
    own = {p.data_ptr() for p in rehearsal.inner.parameters()}
    assert own <= set(weights.values()), "the copy shares all weights"
    assert fingerprint(model) == before


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3_5", "qwen4_exp", "gemma4", "molmo2", "kimi_k25", "mistral3_ministral3"])
def test_in_bfloat16(name, attn):
    model = copy.deepcopy(classes.build(name, attn)).to(torch.bfloat16)
    site = next(item for item in vtc.plan._find(model, None))[1]
    assert self_check._check(site) == ("", "")


@torch.no_grad()
def test_a_model_that_was_used_before_is_tried_as_a_new_one():
    model = classes.build("minicpmv4_7", fresh=True)
    model(**classes.inputs("minicpmv4_7", "ragged"))  # leaves what it knew of three rows
    site = next(item for item in vtc.plan._find(model, None))[1]
    assert self_check._check(site) == ("", "")


# -- mistakes ----------------------------------------------------------------------------------------------------------
def counted(monkeypatch):
    """The decoder is not told positions, though it reads them outside its rotary table."""
    monkeypatch.setattr(patch, "try_positions", lambda decoder: trial.Trial())


def of_the_words_that_stay(monkeypatch):
    """N-grams are made of the shorter prompt."""
    monkeypatch.setattr(patch, "word_readers", lambda decoder: [])


def one_axis(monkeypatch):
    monkeypatch.setattr(generic, "axes_of", lambda *given: None)


def next_place(monkeypatch):
    own = patch.shrink

    def shrink(item, *more):
        own(item, *more)
        pooled = item.output.pooler_output
        moved = [x.roll(1, 0) for x in (pooled if isinstance(pooled, tuple) else [pooled])]
        item.output.pooler_output = tuple(moved) if isinstance(pooled, tuple) else moved[0]

    monkeypatch.setattr(patch, "shrink", shrink)


def no_gaps_in_the_cache(monkeypatch):
    monkeypatch.setattr(patch, "shorten", lambda *given: None)


def no_gaps(monkeypatch):
    """The tokens that stay move together."""
    own = patch.Positions.taken

    def taken(self, positions, at, carried=None):
        return own(self, positions, torch.arange(at.shape[1]).expand_as(at), carried)

    monkeypatch.setattr(patch.Positions, "taken", taken)


MISTAKES = [
    ("mistral3_ministral3", counted, "prefill"),
    ("qwen4_exp", counted, "decoding"),
    ("qwen4_exp", of_the_words_that_stay, "prefill"),
    ("qwen3_vl_moe", one_axis, "prefill"),
    ("glm4v", one_axis, "prefill"),
    *((name, next_place, "prefill") for name in KINDS),
    *((name, no_gaps, "prefill") for name in KINDS if name != "lfm2_vl"),
    *((name, no_gaps_in_the_cache, "decoding") for name in KINDS if name not in COUNTING),
]


@pytest.mark.parametrize(("name", "mistake", "what"), MISTAKES)
def test_mistakes_are_found(name, mistake, what, monkeypatch):
    assert check(name) == ("", "")
    mistake(monkeypatch)
    wrong, _ = check(name)
    assert what in wrong


def test_features_at_other_placeholders_are_found(monkeypatch):
    own = self_check.Rehearsal.entry

    def entry(self, moved=None):
        return own(self, None if moved is None else moved.roll(1))

    monkeypatch.setattr(self_check.Rehearsal, "entry", entry)
    assert "placeholders" in check("aria")[0]


def test_compress_refuses_what_the_check_finds(monkeypatch):
    model = classes.build("glm4v")
    next_place(monkeypatch)
    monkeypatch.setattr(self_check, "_checked", {})
    before = fingerprint(model)
    with pytest.raises(vtc.UnsupportedModelError, match="tried on made-up image features, on fewer tokens its prefill"):
        vtc.compress(model, "divprune", keep=0.5)
    assert fingerprint(model) == before and not vtc.explain(model, "divprune").ok


# -- classes that nobody tried -----------------------------------------------------------------------------------------
# The oldest supported transformers has them too (tools/old_transformers.py), and there none is taken as proven.
SERVED = "qwen3_5 qwen3_vl_moe glm4v gemma4 mistral3_ministral3 lfm2_vl kimi_k25 ernie4_5_vl_moe paddleocr_vl".split()


@pytest.mark.parametrize("name", SERVED)
def test_a_class_that_nobody_tried_is_served_if_it_passes(name, monkeypatch):
    model, inputs = classes.build(name), classes.inputs(name, "pair")
    monkeypatch.setattr(generic, "PROVEN", frozenset())
    monkeypatch.setattr(self_check, "_checked", {})
    rows = len(inputs["input_ids"])
    tokens = torch.randint(5, 100, (rows, 10), generator=torch.Generator().manual_seed(3))
    with vtc.compress(model, "random", keep=0.5) as handle:
        got, kept, columns = said(model, inputs, tokens), handle.kept, handle.patches[0].record.columns
    prefill, decode = expected(name, model, inputs, kept, tokens)
    for row in range(rows):
        assert torch.allclose(got[0][row, columns[row] >= 0], prefill[row], atol=1e-4, rtol=0)
    assert all(torch.allclose(got[1 + step][:, -1], decode[:, step], atol=1e-4, rtol=0) for step in range(10))


@pytest.mark.parametrize("name", sorted(UNTRIED))
def test_a_class_that_nobody_tried_and_that_cannot_be_tried_is_refused(name, monkeypatch):
    monkeypatch.setattr(self_check, "_checked", {})
    assert vtc.explain(classes.build(name), "divprune").ok
    monkeypatch.setattr(generic, "PROVEN", frozenset())
    assert "has not been tried on this class, and could not try it here" in str(vtc.explain(classes.build(name)))


@pytest.mark.parametrize("name", ["minimax_m3_vl", "deepseek_vl_hybrid", "fuyu"])
def test_what_is_refused_by_name_would_be_refused_by_trial(name, monkeypatch):
    monkeypatch.setattr(generic, "UNFIT", {})
    monkeypatch.setattr(self_check, "_checked", {})
    assert not vtc.explain(classes.build(name), "divprune").ok


@pytest.mark.parametrize("name", ["qwen3_5", "qwen4_exp", "gemma4", "mistral3_ministral3"])
def test_the_verdict_is_the_same_without_weights(name):
    with torch.device("meta"):
        model = type(classes.build(name))(copy.deepcopy(classes.build(name).config))
    assert check(name) == ("", "") and self_check._check(next(vtc.plan._find(model, None))[1]) == ("", "")
