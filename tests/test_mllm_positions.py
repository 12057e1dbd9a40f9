"""Decoders that read positions elsewhere than in their rotary table: the true ones, or a refusal before the patch."""

from __future__ import annotations

import copy
from functools import cache

import mllm_zoo as zoo
import pytest
import torch
from mllm_oracle import capture, dense_generate_positions, forward_logits, generate_logits, oracle
from test_mllm import replaced

import vtc
from vtc.adapters.multimodal.trial import try_positions

STEPS = 4
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 80}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
KINDS = ["linear_attention", "full_attention", "linear_attention"]
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8}
DECODERS = {
    "llama": {"model_type": "llama"},
    # scales its queries by the position from a length on, here a short one
    "ministral3": {"model_type": "ministral3", "head_dim": 16, "sliding_window": None}
    | {"rope_parameters": {**SCALED, "llama_4_scaling_beta": 0.5}},
    "mistral4": {"model_type": "mistral4", "num_key_value_heads": 4, **LATENT, **EXPERTS}
    | {"rope_parameters": {**SCALED, "llama_4_scaling_beta": 0.5}, "first_k_dense_replace": 1, "sliding_window": None},
    "llama4": {"model_type": "llama4_text", "head_dim": 16, "floor_scale": 4, "no_rope_layers": [1, 0, 1], **MOE},
    # tables that depend on how far positions go
    "dynamic": {"model_type": "llama", "max_position_embeddings": 16}
    | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "longrope": {"model_type": "llama", "original_max_position_embeddings": 20}
    | {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
        | {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 20}
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "qwen3_5": {"model_type": "qwen3_5_text", "head_dim": 16, "layer_types": KINDS, **LINEAR},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]},
    "deepseek_v3": {"model_type": "deepseek_v3", "num_key_value_heads": 4, **LATENT, **EXPERTS}
    | {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 16}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}
COUNTS = {"llama4"}
READS = {"ministral3", "mistral4"}


def config(decoder):
    made = zoo.FAMILIES["llava"].config()
    import transformers

    settings = copy.deepcopy(zoo._TEXT | DECODERS[decoder])
    return transformers.LlavaConfig(
        image_token_index=zoo.IMAGE,
        text_config=settings,
        vision_config=made.vision_config.to_dict(),
        image_seq_length=25,
    )


@cache
def build(decoder, attn="sdpa"):
    import transformers

    model = zoo.randomise(
        transformers.AutoModelForImageTextToText.from_config(config(decoder), attn_implementation=attn)
    )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = zoo.PAD
    model.generation_config.suppress_tokens = zoo.SPECIAL
    return model


@pytest.mark.parametrize("decoder", DECODERS)
def test_trial(decoder):
    """Also without weights, and nothing is left behind."""
    model = build(decoder)
    text = model.model.language_model
    text.train()
    before = zoo.fingerprint(model)
    found = try_positions(text)
    assert (found.reads, found.counts, found.error) == (decoder in READS, decoder in COUNTS, "")
    assert zoo.fingerprint(model) == before and text.config._attn_implementation == "sdpa"
    assert all(module.training for module in text.modules())
    model.eval()
    with torch.device("meta"):
        import transformers

        empty = transformers.AutoModelForImageTextToText.from_config(config(decoder))
    assert try_positions(empty.model.language_model) == found
    assert vtc.explain(model, "divprune").ok == vtc.explain(empty, "divprune").ok == (decoder not in COUNTS)


def directly(model, inputs, kept, tokens):
    """Logits of the plain decoder, fed the kept rows of one prompt at their positions, then `tokens`."""
    from transformers import DynamicCache

    dense, text, head = capture(model, inputs), model.model.language_model, model.get_output_embeddings()
    cache, columns = DynamicCache(config=text.config), kept[0]
    mask, out = torch.ones(1, int(columns.sum()), dtype=torch.long), []
    x, positions = dense.embeds[:, columns], dense.positions[:, columns]
    with torch.no_grad():
        for step in range(tokens.shape[1] + 1):
            given = {"position_ids": positions, "attention_mask": mask, "use_cache": True, zoo.CACHE: cache}
            out.append(head(text(inputs_embeds=x, **given).last_hidden_state)[0])
            if step < tokens.shape[1]:
                x = model.get_input_embeddings()(tokens[:, step : step + 1])
                positions = dense.next_position(0, "generate") + step
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return out[0], torch.cat(out[1:])


def rewind(model):
    """Tables that grow with the longest prompt seen are as new."""
    rotary = model.model.language_model.rotary_emb
    model.model.language_model.rotary_emb = type(rotary)(rotary.config)


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name not in COUNTS])
def test_tokens_keep_their_positions(decoder):
    model, inputs = build(decoder), zoo.inputs("llava", "single")
    tokens = torch.randint(5, 100, (1, STEPS), generator=torch.Generator().manual_seed(3))
    rewind(model)
    with vtc.compress(model, "divprune", keep=0.3) as handle:
        prefill, decode = forward_logits(model, inputs, tokens)
        kept = handle.kept
        assert handle.report.macs_ratio < 1 and not kept.all()
    rewind(model)
    with vtc.compress(model, "divprune", keep=0.3):
        said = generate_logits(model, inputs, tokens)
    rewind(model)
    first, following = directly(model, inputs, kept, tokens)
    assert torch.allclose(prefill[0], first, atol=2e-5, rtol=0)
    assert torch.allclose(decode[0], following, atol=2e-5, rtol=0)
    assert torch.allclose(said[0, 1:], following, atol=2e-5, rtol=0)
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    rewind(model)
    with vtc.compress(model, "divprune", keep=0.3), torch.no_grad():  # a gap is no border between packed prompts
        assert torch.allclose(model(**bare, use_cache=False).logits[0], first, atol=2e-5, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", sorted(READS))
def test_merged_and_padded(decoder, attn):
    model, inputs = build(decoder, attn), zoo.inputs("llava", "ragged")
    positions = dense_generate_positions("llava", model, inputs)
    tokens = torch.randint(5, 100, (len(inputs["input_ids"]), STEPS), generator=torch.Generator().manual_seed(3))
    with vtc.compress(model, "visionzip", keep=0.3) as handle:
        prefill, decode = forward_logits(model, inputs, tokens, positions)
        kept, columns = handle.kept, handle.patches[0].record.columns
    want = oracle("llava", model, inputs, kept, replaced(model, inputs, handle), steps=STEPS, forced=tokens)
    for row in range(len(tokens)):
        assert torch.allclose(prefill[row, columns[row] >= 0], want.prefill[row], atol=2e-5, rtol=0)
    assert torch.allclose(decode, want.decode, atol=2e-5, rtol=0)


@pytest.mark.parametrize("decoder", sorted(READS))
def test_what_goes_past_true_positions_is_refused(decoder):
    """Methods between the layers are right there: tests/test_mllm_between.py."""
    model = build(decoder)
    assert vtc.explain(model, "fastv", keep=0.5, layer=1).ok
    assert "outside of its rotary table" in str(vtc.explain(model, "visionzip", positions="ppe"))
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    try:
        assert "FlashAttention would take their gaps" in str(vtc.explain(model, "divprune"))
    finally:
        model.model.language_model.config._attn_implementation = "sdpa"


def test_packed_sequences_are_refused():
    """A decoder that is told true positions needs a mask to tell gaps from borders."""
    model, inputs = build("ministral3"), zoo.inputs("llava", "single")
    ids = torch.cat([torch.arange(34), torch.arange(inputs["input_ids"].shape[1] - 34)])[None]
    given = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"], "position_ids": ids}
    with vtc.compress(model, "divprune", keep=0.3), torch.no_grad():
        with pytest.raises(vtc.InputError, match="position_ids pack several sequences in a row"):
            model(**given, use_cache=False)


def test_a_count_of_its_own_is_refused():
    with pytest.raises(vtc.UnsupportedModelError, match="own count of the tokens in front"):
        vtc.compress(build("llama4"), "divprune", keep=0.5)


def test_the_trial_of_a_compiled_decoder_is_of_its_own_code():
    model = copy.deepcopy(build("ministral3"))

    def never(*args, **kwargs):
        raise AssertionError("the compiled decoder ran")

    model.model.language_model._compiled_call_impl = never
    assert try_positions(model.model.language_model).reads
    model.model.language_model = torch.compile(build("llama").model.language_model, backend=never)
    assert try_positions(model.model.language_model) == try_positions(build("llama").model.language_model)


def test_what_cannot_be_tried_is_refused():
    model = copy.deepcopy(build("llama"))
    model.model.language_model.layers[0].self_attn.o_proj = torch.nn.Linear(3, 3)
    with pytest.raises(vtc.UnsupportedModelError, match="could not be tried on positions with gaps: mat1 and mat2"):
        vtc.compress(model, "divprune", keep=0.5)


def test_rounding_is_no_position():
    """A kernel that adds in another order now and then: the first two runs may agree by chance."""
    text, calls = copy.deepcopy(build("llama").model.language_model), []

    class Uneven(type(text.layers[0].mlp)):
        def forward(self, x):
            calls.append(x)
            return super().forward(x) * (1 + 2e-7 * (len(calls) > 2))

    for layer in text.layers:
        layer.mlp.__class__ = Uneven
    assert not try_positions(text).reads and len(calls) > 2


def test_a_trial_calls_no_hooks():
    """Hooks that others have hung on the layers see the model's own calls alone."""
    model, seen = zoo.build("llava", fresh=True), []
    parts = list(zoo.text_model(model).modules())
    hooks = [part.register_forward_pre_hook(lambda *a: seen.append(a)) for part in parts]
    hooks += [part.register_forward_hook(lambda *a: seen.append(a)) for part in parts]
    with vtc.compress(model, "divprune", keep=0.4):
        assert not seen
    model(**zoo.inputs("llava", "single"))
    assert seen and hooks
