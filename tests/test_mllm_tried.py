"""Ways of asking a compressed multimodal LLM that were tried and right: they stay so."""

import mllm_zoo as zoo
import pytest
import torch
from mllm_oracle import dense_generate_positions

import vtc

NAMES = ["llava", "qwen2_5_vl"]
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize("how", ["no cache", "prompt lookup", "streamer", "penalty"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_ways_of_generating(name, how):
    """The same answer as from plain decoding."""
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    with vtc.compress(model, "divprune", keep=0.4):
        want = model.generate(**inputs, **OPTIONS)
        if how == "no cache":
            got = model.generate(**inputs, **OPTIONS, use_cache=False)
        elif how == "prompt lookup":
            got = model.generate(**inputs, **OPTIONS, prompt_lookup_num_tokens=3)
        elif how == "streamer":
            seen = []
            streamer = type("Streamer", (), {"put": lambda self, x: seen.append(x), "end": lambda self: None})()
            got = model.generate(**inputs, **OPTIONS, streamer=streamer)
            assert torch.equal(torch.cat([x.flatten() for x in seen[1:]]), got[0, -5:])
        else:  # a processor that reads the ids of the whole prompt
            want = model.generate(**inputs, **OPTIONS, repetition_penalty=1.3)
            got = model.generate(**inputs, **OPTIONS, repetition_penalty=1.3, use_cache=False)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_beams_with_several_answers_to_two_images(name):
    model, inputs = zoo.build(name), zoo.inputs(name, "pair")
    if not hasattr(model, "_expand_multimodal_outputs") and name == "llava":
        return  # older versions mix up the images of a prompt with several
    places = dense_generate_positions(name, model, inputs)
    with vtc.compress(model, "divprune", keep=0.4) as handle:
        asked = {"num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
        found = model.generate(**inputs, **OPTIONS, num_beams=3, **asked)
        length = inputs["input_ids"].shape[1]
        assert len(found.sequences) == 2 and not torch.equal(found.sequences[0], found.sequences[1])
        kept = handle.kept
        again = model.generate(**inputs, **OPTIONS, num_beams=3)
        assert torch.equal(again[0], found.sequences[0]) and torch.equal(kept[0], kept[1])
        scores = []  # a beam's score is the mean log-probability of its tokens, as a forward gives it
        tail = places[..., -1:] + 1 + torch.arange(5)
        for row in found.sequences:
            call = {k: v for k, v in inputs.items() if "token_type" not in k}
            call |= {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
            logits = model(**call, position_ids=torch.cat([places, tail], -1), logits_to_keep=6).logits[0, :-1]
            scores.append(logits.log_softmax(-1).gather(1, row[length:, None]).mean())
    assert torch.allclose(torch.stack(scores), found.sequences_scores, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
@torch.no_grad()
def test_video_and_image_in_either_order(name, monkeypatch):
    """Each has the tokens that it has alone."""
    model = zoo.build(name)
    monkeypatch.setitem(zoo.PROMPTS, "video_image", [[3, zoo.Visual("video"), 2, zoo.Visual("image", 1), 6]])
    units = {}
    for case in ("image_video", "video_image"):
        with vtc.compress(model, "downsample", keep=0.4) as handle:
            model(**zoo.inputs(name, case))
            visual = zoo.placeholders(model, zoo.inputs(name, case)["input_ids"])
            assert 0 < int((handle.kept & visual).sum()) < int(visual.sum())
            units[case] = list(zip(handle.report.before, handle.report.after, strict=True))
    cut = next(
        i
        for i in range(len(units["image_video"]) + 1)
        if units["image_video"][i:] + units["image_video"][:i] == units["video_image"]
    )
    assert 0 < cut < len(units["image_video"])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_cached_prefix(name):
    """Words that are cached before the prompt with its image comes."""
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    places = dense_generate_positions(name, model, inputs)
    first = int(zoo.placeholders(model, inputs["input_ids"])[0].nonzero().min()) - 1
    rest = {k: v[:, first:] if v.shape == inputs["attention_mask"].shape else v for k, v in inputs.items()}
    rest["attention_mask"] = inputs["attention_mask"]
    with vtc.compress(model, "divprune", keep=0.4) as handle:
        whole = model(**inputs, position_ids=places).logits
        kept = handle.kept
        start = model(input_ids=inputs["input_ids"][:, :first], position_ids=places[..., :first], use_cache=True)
        cache = {zoo.CACHE: start[zoo.CACHE]}
        end = model(**rest, position_ids=places[..., first:], **cache, use_cache=True)
        assert torch.equal(handle.kept, kept[:, first:])
        assert torch.allclose(torch.cat([start.logits, end.logits], 1), whole, atol=1e-5)
        # the cache cropped to the prompt's end, and asked again
        more = {"input_ids": torch.tensor([[7, 9, 11]]), "position_ids": places[..., -1:] + 1 + torch.arange(3)}
        said = model(**more, **{zoo.CACHE: end[zoo.CACHE]}, use_cache=True)
        said[zoo.CACHE].crop(inputs["input_ids"].shape[1])
        assert torch.allclose(model(**more, **{zoo.CACHE: said[zoo.CACHE]}).logits, said.logits, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_embeddings_without_pixels(name):
    """Of words alone: the model's own, to the last bit."""
    model, ids = zoo.build(name), zoo.inputs(name, "text")["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # Qwen models remember the last prompt's
    dense = model(inputs_embeds=embeds).logits
    with vtc.compress(model, "divprune", keep=0.4):
        assert torch.equal(model(inputs_embeds=embeds).logits, dense)


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    """A compressed model that is compiled, called and asked to generate: many graphs, the same answers."""
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    with vtc.compress(model, "divprune", keep=0.4):
        want, said = model(**inputs).logits, model.generate(**inputs, **OPTIONS)
        torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, want, atol=1e-5, rtol=0)
        model.forward = torch.compile(model.forward, backend="eager")
        try:
            assert torch.equal(model.generate(**inputs, **OPTIONS), said)
        finally:
            del model.forward
