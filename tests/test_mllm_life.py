"""What people do with a multimodal LLM besides one `generate`: turns, beams, training, saving, taking it off again."""

from __future__ import annotations

import copy
import pickle

import mllm_zoo as zoo
import pytest
import torch
import transformers
from mllm_oracle import dense_generate_positions, oracle
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import vtc
from vtc.checkpoints import tiny

NAMES = list(zoo.FAMILIES)
SOME = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3", "paligemma"]


def said(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)


@pytest.mark.parametrize("name", NAMES)
def test_removed_without_a_trace(name):
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    dense, before = said(model, inputs), zoo.fingerprint(model)
    for method in ("random", "tome"):
        with vtc.compress(model, method, keep=0.3):
            said(model, inputs)
        assert zoo.fingerprint(model) == before
        assert torch.equal(said(model, inputs), dense)


@pytest.mark.parametrize("name", NAMES)
def test_removed_after_an_exception_in_the_middle(name):
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    dense, before = said(model, inputs), zoo.fingerprint(model)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    hook = zoo.text_model(model).layers[1].register_forward_hook(stop)
    try:
        with pytest.raises(Stop), vtc.compress(model, "random", keep=0.3):
            said(model, inputs)
    finally:
        hook.remove()
    assert zoo.fingerprint(model) == before
    assert torch.equal(said(model, inputs), dense)


@pytest.mark.parametrize("case", ["single", "ragged", "pair"])
@pytest.mark.parametrize("name", NAMES)
def test_keep_all_is_the_model_itself(name, case):
    model, inputs = zoo.build(name), zoo.inputs(name, case)
    with torch.no_grad():
        dense = model(**inputs).logits
        for method in ("random", "tome"):
            with vtc.compress(model, method, keep=1.0):
                assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("name", NAMES)
def test_cache_holds_what_was_kept(name):
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    with vtc.compress(model, "random", keep=0.3) as handle:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        longest = int((handle.kept & inputs["attention_mask"].bool()).sum(1).max())
        kept = handle.report.after
    cache = out[zoo.CACHE]
    window = getattr(zoo.text_model(model).config, "sliding_window", None) or 10**6
    sizes = {layer.keys.shape[2] for layer in cache.layers}
    assert sizes <= {longest + 2, min(longest + 2, window - 1)} and max(sizes) == longest + 2
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 2  # the conversation's own length
    assert all(k == max(1, round(0.3 * n)) for k, n in zip(kept, handle.report.before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_batch_is_its_items(name):
    """Also the choice itself: one image's tokens do not depend on its neighbours."""
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    with vtc.compress(model, "tome", keep=0.4) as handle:
        together = said(model, inputs)
        kept = handle.kept
        for row in range(len(kept)):
            single = zoo.alone(name, "ragged", row)
            length = single["input_ids"].shape[1]
            assert torch.equal(said(model, single)[0, length:], together[row, inputs["input_ids"].shape[1] :])
            assert torch.equal(handle.kept[0], kept[row, -length:])


@pytest.mark.parametrize("name", SOME)
def test_second_turn_on_the_cache(name):
    """A question after the answer, with the cache that came back: the same as the whole conversation at once."""
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    more = torch.tensor([[7, 9, 11, 13, 8]])
    with vtc.compress(model, "random", keep=0.3) as handle:
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        kept = handle.kept
        ids = torch.cat([first.sequences, more], dim=1)
        extra = {
            k: torch.cat([v, v.new_zeros(1, ids.shape[1] - v.shape[1])], dim=1)
            for k, v in inputs.items()
            if k in ("mm_token_type_ids", "token_type_ids")
        }
        if name == "paligemma":
            extra["token_type_ids"][:, inputs["input_ids"].shape[1] :] = 1
        second = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{zoo.CACHE: first[zoo.CACHE]},
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **extra,
        )
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}
    everything = torch.cat([kept, torch.ones(1, ids.shape[1] - kept.shape[1], dtype=torch.bool)], dim=1)
    answer = second.sequences[:, ids.shape[1] :]
    want = oracle(name, model, whole, everything, steps=3, forced=answer[:, :3])
    got = torch.stack(second.logits, dim=1)[0]
    if name == "paligemma":  # its first turn looks both ways inside the prompt, of which the answer is then a part
        return
    assert torch.allclose(got[0], want.prefill[0][-1], atol=1e-5, rtol=0)
    assert torch.allclose(got[1:], want.decode[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_5_vl", "qwen3_vl"])
def test_second_image_in_a_later_turn(name):
    """Two turns with an image each, against one call that holds both."""
    model, pair = zoo.build(name), zoo.inputs(name, "pair")
    runs = zoo.runs(model, pair["input_ids"])
    positions = dense_generate_positions(name, model, pair)
    with vtc.compress(model, "random", keep=0.3) as handle, torch.no_grad():
        whole = model(**pair, position_ids=positions)
        kept = handle.kept
        half = next(i for i, run in enumerate(runs) if run[1] - runs[i - 1][2] > 1 and i > 0) if len(runs) > 2 else 1
        border = runs[half][1] - 1
        first, second = split(name, model, pair, border)
        start = model(**first, position_ids=positions[..., :border], use_cache=True)
        parts = [handle.kept]
        end = model(
            **second,
            attention_mask=pair["attention_mask"],
            position_ids=positions[..., border:],
            **{zoo.CACHE: start[zoo.CACHE]},
            use_cache=True,
        )
        parts.append(handle.kept)
    assert torch.equal(torch.cat(parts, dim=1), kept)
    both = torch.cat([start.logits, end.logits], dim=1)
    assert torch.allclose(both, whole.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["random", "fastv"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_the_cache_by_its_old_name(name, method):
    """The part without a language head, called by itself: no wrapper of transformers has translated the name."""
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    more = {"input_ids": torch.tensor([[7, 9, 11]])}
    with vtc.compress(model, method, keep=0.3):
        turns = []
        for key in ("past_key_values", zoo.CACHE):
            cache = model.model(**inputs, use_cache=True)[zoo.CACHE]
            turns.append(model.model(**more, **{key: cache}, use_cache=True))
            assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 3
    assert torch.equal(turns[0].last_hidden_state, turns[1].last_hidden_state)


@pytest.mark.parametrize("keep", [0.4, 1.0])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
@torch.no_grad()
def test_outputs_hold_no_model(name, keep):
    """Outputs are saved and sent between processes; since transformers 5.24 those of the encoder are part of them."""
    model, inputs = zoo.build(name), zoo.inputs(name, "pair")
    before = len(pickle.dumps(model(**inputs, use_cache=False)))
    with vtc.compress(model, "random", keep=keep):
        given = {"image": model.model.get_image_features(inputs["pixel_values"], *_grid(inputs), return_dict=True)}
        encoded = {k: v for k, v in inputs.items() if k != "pixel_values"} | {"mm_encoder_outputs": given}
        for call in (inputs, encoded, encoded):  # and what was encoded before is good for several calls
            assert len(pickle.dumps(model(**call, use_cache=False))) <= before


def _grid(inputs):
    return [inputs["image_grid_thw"]] if "image_grid_thw" in inputs else []


def split(name, model, pair, border):
    """The first and the second half of a prompt with two images, without the second's mask."""
    first, second = {}, {}
    visual = zoo.placeholders(model, pair["input_ids"])
    share = int(visual[:, :border].sum())
    for key, value in pair.items():
        if value.shape[-1] == pair["input_ids"].shape[-1] and value.ndim == 2:
            first[key], second[key] = value[:, :border], value[:, border:]
        elif key.endswith("grid_thw"):
            first[key], second[key] = value[:1], value[1:]
        elif name.startswith("qwen"):  # patches in one row
            first[key], second[key] = value[: share * 4], value[share * 4 :]
        elif name == "idefics3":  # [1, images, ...], 16 tokens each
            first[key], second[key] = value[:, : share // 16], value[:, share // 16 :]
        else:
            first[key], second[key] = value[:1], value[1:]
    second.pop("attention_mask")
    return first, second


@pytest.mark.parametrize("name", NAMES)
def test_beams(name):
    """Beam search: `generate` repeats every prompt with its images, and reorders caches. (transformers 5.17 mixes up
    the images of a prompt with several; then there is no reference.)"""
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    singles = [zoo.alone(name, "ragged", row) for row in range(len(inputs["input_ids"]))]

    def beams():
        together = said(model, inputs, num_beams=3)[:, -5:]
        return [torch.equal(said(model, x, num_beams=3)[0, -5:], row) for x, row in zip(singles, together, strict=True)]

    assert all(beams())
    right = hasattr(model, "_expand_multimodal_outputs") or name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3")
    with vtc.compress(model, "idpruner", keep=0.4) as handle:
        said(model, inputs)
        kept = handle.kept.repeat_interleave(3, dim=0)
        if right:
            assert all(beams())
            said(model, inputs, num_beams=3)
            assert torch.equal(handle.kept, kept)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_chunked_prefill_is_refused(name):
    """transformers cuts the encoded image into chunks (5.23), or fails at it, or prefills wrongly (5.17)."""
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    try:
        own = torch.equal(said(model, inputs, prefill_chunk_size=8), said(model, inputs))
    except RuntimeError:
        own = False
    if own:
        with vtc.compress(model, "random", keep=0.4), pytest.raises(vtc.InputError, match="chunk"):
            said(model, inputs, prefill_chunk_size=8)


@pytest.mark.parametrize("name", SOME)
def test_labels_give_the_loss_over_what_was_kept(name):
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged_right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(zoo.placeholders(model, inputs["input_ids"]), -100)
    with vtc.compress(model, "random", keep=0.4) as handle:
        out = model(**inputs, labels=labels)
        record = handle.patches[0].record
    columns = record.columns
    labels[:, 0] = -100  # which nothing says, also where padding has come before it
    kept = labels.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -100)
    want = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), kept[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(out.loss, want, atol=1e-6)
    assert out.logits.shape[1] == columns.shape[1] < labels.shape[1]


@pytest.mark.parametrize("method", ["random", "tome"])
@pytest.mark.parametrize("name", SOME)
def test_gradients_flow(name, method):
    model, inputs = zoo.build(name, fresh=True).train(), zoo.inputs(name, "single")
    with vtc.compress(model, method, keep=0.4):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    tower = next(p for n, p in model.named_parameters() if ("vision" in n or "visual" in n) and "patch" in n)
    decoder = zoo.text_model(model).layers[0].self_attn.q_proj.weight
    assert tower.grad.abs().sum() > 0 and decoder.grad.abs().sum() > 0


def test_copies_are_compressed_apart():
    model, inputs = zoo.build("qwen2_5_vl", fresh=True), zoo.inputs("qwen2_5_vl", "single")
    handle = vtc.compress(model, "random", keep=0.4)
    twin = copy.deepcopy(model)
    short = said(model, inputs)
    handle.remove()
    dense = said(model, inputs)
    assert torch.equal(said(twin, inputs), short)
    vtc.remove(twin)
    assert torch.equal(said(twin, inputs), dense)
    cache = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)[zoo.CACHE]
    copy.deepcopy(cache)


def test_half_precision_and_static_cache():
    model, inputs = zoo.build("llava", fresh=True).to(torch.bfloat16), zoo.inputs("llava", "ragged")
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with vtc.compress(model, "random", keep=0.4):
        assert said(model, inputs).shape[1] == inputs["input_ids"].shape[1] + 5
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "ragged")
    with vtc.compress(model, "random", keep=0.4):
        assert torch.equal(said(model, inputs, cache_implementation="static"), said(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_compiled_decoder(name):
    model, inputs = zoo.build(name, fresh=True), zoo.inputs(name, "single")
    want = None
    with vtc.compress(model, "random", keep=0.4):
        want = said(model, inputs)
        zoo.text_model(model).compile(backend="aot_eager")
        assert torch.equal(said(model, inputs), want)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "divprune"])
def test_a_decoder_in_two_graphs(method):
    """One prompt, and any number of any length, whose images keep different numbers of tokens: as without vtc."""
    model, processor = tiny.tiny_qwen()
    asked = [[128], [128, 192], [192], [192, 128, 160, 224], [160, 128, 192]]
    prompts = [pictures(processor, sizes) for sizes in asked]
    graphs = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    try:
        if method:
            vtc.compress(model, method, keep=0.4)
        with torch.no_grad():
            want = [model(**prompt).logits[:, -1] for prompt in prompts]
            model.model.language_model.compile(backend=graphs, dynamic=True)
            for prompt, logits in zip(prompts, want, strict=True):
                torch.testing.assert_close(model(**prompt).logits[:, -1], logits, atol=1e-5, rtol=0)
        assert graphs.frame_count == 2
    finally:
        torch._dynamo.reset()


def pictures(processor, sizes):
    """One prompt for every size, with a picture of it."""
    images = [Image.effect_noise((size, size), 40).convert("RGB") for size in sizes]
    asks = ["What?", "Where is the circle in this picture?"]
    said = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asks[i % 2]}]}]
        for i in range(len(sizes))
    ]
    text = [processor.apply_chat_template(one, add_generation_prompt=True) for one in said]
    return processor(text=text, images=images, return_tensors="pt", padding=True)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_assisted_decoding(name, monkeypatch):
    """With a draft model, tokens are taken back from the cache."""
    model, draft = zoo.build(name), zoo.build(name, fresh=True)
    inputs = zoo.inputs(name, "single")
    with torch.no_grad():
        for p in draft.lm_head.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.2)
    removed = []
    crop = transformers.DynamicCache.crop
    monkeypatch.setattr(transformers.DynamicCache, "crop", lambda cache, n: (removed.append(n), crop(cache, n))[1])
    with vtc.compress(model, "random", keep=0.4), vtc.compress(draft, "random", keep=0.4):
        want = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        got = model.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=draft)
    assert torch.equal(got, want) and any(removed)


def test_the_cache_keeps_count():
    from vtc.adapters.multimodal.cache import Entries, shorten

    cache = transformers.DynamicCache()
    keys = torch.arange(2 * 6.0).view(2, 1, 6, 1)
    cache.update(keys, keys, 0)
    columns = torch.tensor([[-1, 0, 3, 5, 6, 7], [0, 2, 4, 5, 6, 7]])
    shorten(cache, Entries(columns, 8, True))
    assert isinstance(cache, transformers.DynamicCache) and cache.get_seq_length() == 8
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.vtc_entries.columns, columns[[1, 0]])
    assert torch.equal(cache.layers[0].keys[:, 0, :, 0], keys[[1, 0], 0, :, 0])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.vtc_entries.columns, columns[[1, 1, 0, 0]])
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(cache.vtc_entries.columns, columns[[1, 0]])
    cache.crop(-2)
    assert cache.get_seq_length() == 6 and torch.equal(cache.vtc_entries.columns, columns[[1, 0], :4])
    with pytest.raises(vtc.InputError, match="image tokens that vtc removed"):
        cache.crop(-3)
    assert cache.get_seq_length() == 6  # and is what it was
    # a level of layers with fewer entries, and what each stands for, goes along
    later, sizes = torch.tensor([[0, 1, 3], [-1, 2, 3]]), torch.tensor([[2.0, 1, 1], [1, 3, 1]])
    shorten(cache, cache.vtc_entries, (Entries(later, 4, True, sizes),))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(cache.vtc_levels[0].columns, later[[1, 0]])
    assert torch.equal(cache.vtc_levels[0].sizes, sizes[[1, 0]])
    cache.crop(-1)
    assert torch.equal(cache.vtc_levels[0].columns, later[[1, 0], :2]) and cache.vtc_levels[0].sizes.shape == (2, 2)
    longer = cache.vtc_levels[0].extend(torch.tensor([[0], [0]]), 1, False)
    assert longer.columns.tolist() == [[-1, 2, 3], [0, 1, 3]] and longer.sizes[:, 2].tolist() == [1, 1]
    shorten(cache, Entries(columns[[1, 0], :4], 6, True))
    mask = torch.arange(1, 7).expand(2, -1)
    assert cache.vtc_entries.take(mask).tolist() == [[1, 3, 5, 6], [0, 1, 4, 6]]
    cache.reset()
    assert cache.get_seq_length() == 0


def test_wrong_inputs_change_nothing():
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "pair")
    dense = said(model, inputs)
    with vtc.compress(model, "random", keep=0.4):
        fewer = {**inputs, "pixel_values": inputs["pixel_values"][:1]}
        with pytest.raises(vtc.InputError, match="does not match the prompt"):
            said(model, fewer)
        broken = {**inputs, "pixel_values": inputs["pixel_values"] * float("nan")}
        with pytest.raises(vtc.InputError, match="NaN"):
            said(model, broken)
    with vtc.compress(model, "random", keep=1000), pytest.raises(vtc.OptionError, match="more than the 25 tokens"):
        said(model, inputs)
    assert torch.equal(said(model, inputs), dense)
    for options in ({"r": 4}, {"flops": 0.5}, {"keep": 0.5, "where": "nowhere"}):
        with pytest.raises(vtc.VTCError):
            vtc.compress(model, "random", **options)
    with pytest.raises(vtc.UnsupportedModelError, match="smaller image"):
        vtc.compress(model, "downsample", keep=0.5, mode="resize")


def checkpoint(model):
    """`activation_checkpointing_enable` in newer transformers."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_gradient_checkpointing(name):
    """Recomputed layers see the same positions: the same gradients with and without."""
    model, inputs = zoo.build(name, fresh=True).train(), zoo.inputs(name, "ragged_right")
    grads = []
    with vtc.compress(model, "divprune", keep=0.4):
        for again in (False, True):
            if again:
                checkpoint(model)
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
            grads.append([p.grad.clone() for p in zoo.text_model(model).parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_layer_methods_refuse_a_static_cache():
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    dense = said(model, inputs)
    with vtc.compress(model, "fastv", keep=0.4), pytest.raises(vtc.InputError, match="static cache"):
        said(model, inputs, cache_implementation="static")
    assert torch.equal(said(model, inputs), dense)


def test_layer_methods_refuse_gradient_checkpointing():
    model, inputs = zoo.build("llava", fresh=True).train(), zoo.inputs("llava", "single")
    checkpoint(model)
    with vtc.compress(model, "fastv", keep=0.4), pytest.raises(vtc.InputError, match="checkpointed"):
        model(**inputs, labels=inputs["input_ids"], use_cache=False)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_embeddings_in_place_of_ids(name):
    model, inputs = zoo.build(name), zoo.inputs(name, "ragged")
    positions = dense_generate_positions(name, model, inputs)
    ids = inputs["input_ids"]
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    with vtc.compress(model, "divprune", keep=0.4), torch.no_grad():
        want = model(**inputs, position_ids=positions).logits
        got = model(inputs_embeds=model.get_input_embeddings()(ids), **rest, position_ids=positions).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_counts_in_a_video(name):
    """A number is per video, shared out over its frames."""
    model, inputs = zoo.build(name), zoo.inputs(name, "video")
    with vtc.compress(model, "divprune", keep=7) as handle:
        said(model, inputs)
        after = handle.report.after
    assert sum(after) == 7 and max(after) - min(after) <= 1


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("name", NAMES)
def test_no_gap_reaches_the_attention(name, method):
    """FlashAttention and the mask builders take a gap in the positions for a border between packed sequences."""
    if method == "fastv" and name.startswith("gemma3"):
        return
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    seen = []

    def note(module, args, kwargs):
        seen.append(kwargs.get("position_ids"))

    hooks = [
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in zoo.text_model(model).layers
    ]
    try:
        with vtc.compress(model, method, keep=0.4), torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    given = [ids for ids in seen if ids is not None]
    assert all(ids.ndim == 2 and bool((ids.diff() == 1).all()) for ids in given)
    assert given or name.startswith("qwen")  # which hands its layers none where nothing is packed


def test_scorers_are_checked_before_anything_is_patched(tmp_path):
    import pickle

    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    before = zoo.fingerprint(model)
    width = zoo.text_model(model).config.hidden_size
    good, wide, pickled = tmp_path / "good.safetensors", tmp_path / "wide.safetensors", tmp_path / "scorer.pt"
    torch.manual_seed(0)
    vtc.scores.save_scorer(vtc.scores.Scorer(width, 8), good)
    vtc.scores.save_scorer(vtc.scores.Scorer(width + 1, 8), wide)
    pickled.write_bytes(pickle.dumps({"query.weight": [1.0]}))
    for path, words in ((wide, "trained"), (pickled, "safetensors"), (tmp_path / "absent", "cannot be read")):
        with pytest.raises(vtc.VTCError, match=words):
            vtc.compress(model, "idpruner", keep=0.3, scorer=str(path))
        assert zoo.fingerprint(model) == before
    with vtc.compress(model, "idpruner", keep=0.3, scorer=str(good)) as handle:
        said(model, inputs)
        assert "importance: scorer" in str(handle.report)
        scored = handle.kept
    with vtc.compress(model, "idpruner", keep=0.3) as handle:
        said(model, inputs)
        assert "importance: attention" in str(handle.report)
    vtc.scores.save_scorer(vtc.scores.Scorer(width, 8), good)  # another one in its place
    with vtc.compress(model, "idpruner", keep=0.3, scorer=str(good)) as handle:
        said(model, inputs)
        assert not torch.equal(handle.kept, scored)
