"""Masks of the caller's own in a prompt: cut along rows and columns, or refused."""

import mllm_zoo as zoo
import pytest
import torch
from mllm_oracle import capture

import vtc

NAMES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "gemma3", "paligemma"]
KINDS = ["causal", "prefix", "blocks", "random"]


def allowed(kind, ids, batch=1):
    """[B, 1, L, L] bool: who sees whom in prompts of the length of `ids`."""
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    place = torch.arange(length)
    if kind == "prefix":
        causal = causal | (place < length - 4)
    elif kind == "blocks":  # two sequences packed in a row
        causal = causal & ((place[:, None] < length // 2) == (place < length // 2))
    elif kind == "random":
        causal = causal & (torch.rand(length, length, generator=torch.Generator().manual_seed(1)) < 0.7)
        causal |= torch.eye(length, dtype=torch.bool)
    return causal[None, None].expand(batch, -1, -1, -1)


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def of_those_that_stay(model, dense, kept, mask, row=0, rows=None):
    """Logits of the unpatched decoder on the kept columns of one prompt, under its mask cut at these columns."""
    text, columns = zoo.text_model(model), kept[row]
    mask = mask[row : row + 1][:, :, columns][..., columns]
    if "sliding_attention" in (getattr(text.config, "layer_types", None) or []):
        mask = {"full_attention": mask, "sliding_attention": mask}
    more = {}
    if dense.deepstack:
        visual = dense.visual[row, columns][None]
        more = {"visual_pos_masks": visual}
        more["deepstack_visual_embeds"] = [plane[row, columns][visual[0]] for plane in dense.deepstack]
    out = text(
        inputs_embeds=dense.embeds[row, columns][None],
        position_ids=dense.positions[..., row : row + 1, :][..., columns],
        attention_mask=mask,
        use_cache=False,
        **more,
    )
    return model.get_output_embeddings()(out.last_hidden_state)[0]


@pytest.mark.parametrize(
    ("name", "kind"), [(name, KINDS[i % 3 + 1]) for i, name in enumerate(NAMES)] + [("llava", "causal")]
)
@torch.no_grad()
def test_a_mask_is_cut_along(name, kind):
    model, inputs = zoo.build(name), zoo.inputs(name, "pair")
    dense, mask = capture(model, inputs), allowed(kind, inputs["input_ids"])
    call = {**inputs, "attention_mask": mask, "position_ids": dense.positions}
    plain = model(**call, use_cache=False).logits
    with vtc.compress(model, "random", keep=1.0):
        assert torch.equal(model(**call, use_cache=False).logits, plain)
    with vtc.compress(model, "random", keep=0.4) as handle:
        for given in (mask, additive(mask)):
            got = model(**{**call, "attention_mask": given}, use_cache=False).logits[0]
            want = of_those_that_stay(model, dense, handle.kept, given)
            assert not handle.kept.all() and torch.allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["prefix", "blocks"])
@torch.no_grad()
def test_rows_of_different_lengths(kind):
    """Rows that lose different numbers of tokens are padded in front, and their masks with them."""
    model, inputs = zoo.build("llava_next"), zoo.inputs("llava_next", "ragged")
    real = inputs["attention_mask"].bool()
    mask = allowed(kind, inputs["input_ids"], len(real)) & real[:, None, None] & real[:, None, :, None]
    call = {**inputs, "attention_mask": mask, "position_ids": (real.long().cumsum(1) - 1).clamp(min=0)}
    with vtc.compress(model, "random", keep=0.3) as handle:
        got = model(**call, use_cache=False).logits
    dense = capture(model, inputs)
    for row, kept in enumerate(handle.kept & real):
        want = of_those_that_stay(model, dense, (handle.kept & real), mask, row)
        rows = got[row, -int(handle.kept[row].sum()) :][real[row, handle.kept[row]]]
        assert len(want) == int(kept.sum()) and torch.allclose(rows, want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_masks_by_kind_of_layer():
    model, inputs = zoo.build("gemma3"), zoo.inputs("gemma3", "single")
    dense, mask = capture(model, inputs), allowed("prefix", inputs["input_ids"])
    call = {**inputs, "attention_mask": {"full_attention": mask, "sliding_attention": mask}}
    with vtc.compress(model, "random", keep=0.4) as handle:
        got = model(**call, use_cache=False).logits[0]
    want = of_those_that_stay(model, dense, handle.kept, mask)
    assert torch.allclose(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "method", [("fastv", {"layer": 1}), ("dart", {"layer": 1}), ("dpc_knn", {"cascade": {1: 0.5}, "keep": 0.6})]
)
@torch.no_grad()
def test_a_mask_between_layers(method):
    """Behind the layer the mask's rows and columns are those that are left: all heads alike, so a mask that shuts what
    is removed anyway changes nothing."""
    name, options = method
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    mask = allowed("prefix", inputs["input_ids"])
    with vtc.compress(model, name, **{"keep": 0.4, **options}) as handle:
        got = model(**{**inputs, "attention_mask": mask}, use_cache=False).logits
        kept, seen = handle.kept[0], []
        layer = zoo.text_model(model).layers[-1]
        hook = layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        again = model(**{**inputs, "attention_mask": additive(mask)}, use_cache=False).logits
        hook.remove()
    assert got.shape[1] == int(kept.sum()) < len(kept) and torch.allclose(got, again, atol=1e-5)
    assert torch.equal(seen[0], additive(mask)[:, :, kept][..., kept])


@pytest.mark.parametrize("method", ["fastv", "dart", "relevance"])
def test_words_that_do_not_see_the_images(method):
    """What reads the prompt's words is refused where they are not one text: under a mask, or packed by positions."""
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "pair")
    length = inputs["input_ids"].shape[1]
    options = {"keep": 0.4, "importance": "relevance"} if method == "relevance" else {"keep": 0.4, "layer": 1}
    packed = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])[None]
    rest = {key: value for key, value in inputs.items() if key != "attention_mask"}
    with vtc.compress(model, "idpruner" if method == "relevance" else method, **options), torch.no_grad():
        for given in ({"attention_mask": allowed("blocks", inputs["input_ids"])}, {"position_ids": packed}):
            with pytest.raises(vtc.InputError, match="one sequence a row"):
                model(**rest, **given, use_cache=False)
        model(**rest, attention_mask=allowed("prefix", inputs["input_ids"]), use_cache=False)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda length: torch.ones(1, 1, length, length - 1, dtype=torch.bool), r"the call has 39 columns"),
        (lambda length: torch.ones(1, 1, 5, length, dtype=torch.bool), r"\[1, 1, 5, 38\]|\[1, 1, 5, 39\]"),
        (lambda length: torch.ones(1, length, length, dtype=torch.bool), r"attention_mask is \[1, "),
        (lambda length: torch.ones(1, 1, length, length, dtype=torch.long), "torch.int64"),
        (lambda length: torch.ones(1, 1, length, length + 3, dtype=torch.bool), "last 3 columns"),
        (lambda length: [[1] * length], "is a list"),
        (lambda length: torch.ones(1, length - 2), "columns"),
    ],
)
def test_masks_that_cannot_be_cut(make, match):
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    length = inputs["input_ids"].shape[1]
    with vtc.compress(model, "random", keep=0.4), pytest.raises(vtc.InputError, match=match.replace("39", str(length))):
        model(**{**inputs, "attention_mask": make(length)})


@pytest.mark.parametrize("options", [{"method": "fastv"}, {"method": "dpc_knn", "cascade": {1: 0.5}}])
def test_masks_that_are_no_tensors(options):
    """FlexAttention's block masks cannot be cut between layers."""
    model = zoo.build("llava", fresh=True)
    zoo.text_model(model).config._attn_implementation = "flex_attention"
    assert "flex_attention" in str(vtc.explain(model, keep=0.5, **options))
    assert vtc.explain(model, "dpc_knn", keep=0.5).ok


def test_positions_that_the_model_makes_of_a_mask():
    model, inputs = zoo.build("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", "single")
    call = {**inputs, "attention_mask": allowed("prefix", inputs["input_ids"])}
    with vtc.compress(model, "random", keep=0.4), pytest.raises(vtc.InputError, match="give position_ids"):
        model(**call)


# -- packed sequences -------------------------------------------------------------------------------------------------


def packed(name, case="ragged"):
    """The rows of a batch one behind the other in one row without padding, and their positions, each from its start."""
    rows = [zoo.alone(name, case, row) for row in range(3)]
    out = {"input_ids": torch.cat([row["input_ids"] for row in rows], dim=1)}
    for key in ("pixel_values", "image_grid_thw"):
        if key in rows[0]:
            out[key] = torch.cat([row[key] for row in rows])
    model = zoo.build(name)
    places = [capture(model, row).positions for row in rows]
    if places[0].ndim == 3:  # text positions first, which tell the borders
        places = [torch.cat([torch.arange(p.shape[-1]).view(1, 1, -1), p]) for p in places]
    return out, rows, torch.cat(places, dim=-1)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
@torch.no_grad()
def test_packed_sequences(name):
    """Positions that start anew pack several prompts in a row: each says what it says alone."""
    model = zoo.build(name)
    call, rows, positions = packed(name)
    with vtc.compress(model, "divprune", keep=0.4) as handle:
        got = model(**call, position_ids=positions, use_cache=False).logits[0]
        kept, start = handle.kept[0], 0
        for row, place in zip(rows, positions.split([r["input_ids"].shape[1] for r in rows], dim=-1), strict=True):
            want = model(**row, position_ids=place[-3:] if place.ndim == 3 else place, use_cache=False).logits[0]
            assert torch.equal(handle.kept[0], kept[: handle.kept.shape[1]])
            kept = kept[handle.kept.shape[1] :]
            assert torch.allclose(got[start : start + len(want)], want, atol=1e-5, rtol=0)
            start += len(want)
    assert start == len(got)


def test_packed_rows_of_different_lengths_are_refused():
    model, inputs = zoo.build("llava_next"), zoo.inputs("llava_next", "ragged")
    length = inputs.pop("attention_mask").shape[1]
    places = torch.cat([torch.arange(4), torch.arange(length - 4)]).expand(3, -1)
    with vtc.compress(model, "random", keep=0.4), pytest.raises(vtc.InputError, match="one packed row a call"):
        model(**inputs, position_ids=places, use_cache=False)


# -- other arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "max_length_k", "seq_idx", "visual_pos_masks", "tables"])
@pytest.mark.parametrize("method", ["random", "fastv"])
@torch.no_grad()
def test_arguments_with_a_place_per_column(name, method):
    """What has a place for each column of the prompt and is not cut is refused by name, where columns go."""
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    length = inputs["input_ids"].shape[1]
    value = {
        "cu_seq_lens_q": torch.tensor([0, length]),
        "max_length_k": length,
        "seq_idx": torch.zeros(1, length, dtype=torch.int32),
        "visual_pos_masks": torch.zeros(1, length, dtype=torch.bool),
        "tables": [{"of": torch.zeros(2, length, 3)}],
    }[name]
    with vtc.compress(model, method, keep=0.4), pytest.raises(vtc.InputError, match=name):
        model(**inputs, **{name: value})
    if method == "random":
        with vtc.compress(model, method, keep=1.0):
            model.model(**inputs, another=torch.zeros(1, length))
    with vtc.compress(model, method, keep=0.4):
        model(**inputs, another=torch.zeros(length + 1, 3), flag=True)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "gemma3_sliding", "paligemma"])
@torch.no_grad()
def test_static_caches(name):
    """`generate` makes 4-D masks for static caches; they are padding masks, not the caller's own."""
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    with vtc.compress(model, "divprune", keep=0.4):
        options = {"max_new_tokens": 5, "do_sample": False}
        want = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, cache_implementation="static", **options), want)


@torch.no_grad()
def test_a_mask_on_a_shortened_cache():
    """A later turn with a mask of its own over the whole conversation."""
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    more = torch.tensor([[7, 9, 11]])
    length = inputs["input_ids"].shape[1]
    places = torch.arange(length, length + 3)[None]
    with vtc.compress(model, "random", keep=0.4):
        turns = []
        for mask in (
            torch.ones(1, length + 3),
            torch.ones(length + 3, length + 3, dtype=torch.bool).tril()[None, None],
        ):
            cache = model(**inputs, use_cache=True)[zoo.CACHE]
            mask = mask if mask.ndim == 2 else mask[:, :, -3:]
            given = {"attention_mask": mask, "position_ids": places, zoo.CACHE: cache}
            turns.append(model(input_ids=more, **given, use_cache=True).logits)
    assert torch.allclose(*turns, atol=1e-5)
