"""Images that reach a compressed multimodal model pass its patch, in one thread at a time, or the call raises."""

import copy
import threading

import mllm_zoo as zoo
import pytest
import torch
from torch import nn

import vtc

SOME = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"]


def inner_of(model):
    return model.model


def filled(model, inputs):
    """The prompt's embeddings with the image features in them, as ColQwen2 and PI0 make them."""
    inner, ids = inner_of(model), inputs["input_ids"]
    given = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw", "image_sizes")}
    pooled = inner.get_image_features(**given, return_dict=True).pooler_output
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in pooled])
    embeds = inner.get_input_embeddings()(ids.clamp(min=0))
    place = (ids == inner.config.image_token_id)[..., None].expand_as(embeds)
    return embeds.masked_scatter(place, rows)


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(inputs_embeds=filled(self.model, inputs), attention_mask=inputs["attention_mask"]).logits


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_images_filled_in_by_somebody_else(name):
    model, inputs = zoo.build(name, fresh=True), zoo.inputs(name, "single")  # Qwens remember the batch before
    text = torch.randn(1, 5, inner_of(model).get_input_embeddings().weight.shape[1])
    around = Around(model)
    with vtc.compress(model, "random", keep=0.5) as handle:
        model(inputs_embeds=text)
        embeds = filled(model, inputs)
        with pytest.raises(vtc.InputError, match="in inputs_embeds were filled in before .* pass it the pixels"):
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        model(inputs_embeds=text)  # features that were asked for and went nowhere are no fault
        with pytest.raises(vtc.InputError, match="filled in before"):
            around(**inputs)
        model(**inputs)
        assert sum(handle.report.after) < sum(handle.report.before)
        model(inputs_embeds=text)
    with vtc.compress(model, "random", keep=1.0):
        found = around(**inputs)
    assert torch.equal(around(**inputs), found)


class Scaled(Around):
    """PI0's way: what stands in the embeddings is no longer what came out of the projector."""

    def forward(self, **inputs):
        embeds = filled(self.model, inputs) * 1.5
        return inner_of(self.model).language_model(inputs_embeds=embeds).last_hidden_state


@torch.no_grad()
def test_a_wrapper_that_calls_the_decoder_itself():
    model, inputs = zoo.build("llava"), zoo.inputs("llava", "single")
    around = Scaled(model)
    around(**inputs)
    with pytest.raises(vtc.VTCError, match="filled in before|Scaled"), vtc.compress(around, "random", keep=0.5):
        around(**inputs)
    around(**inputs)


@pytest.mark.parametrize("method", ["random", "idpruner", "fastv", "visionzip"])
def test_threads_in_one_model_are_right_or_refused(method):
    model, start, errors, refused = zoo.build("llava", fresh=True), threading.Barrier(3), [], []
    calls = [zoo.inputs("llava", case) for case in ("single", "pair", "ragged")]
    with vtc.compress(model, method, keep=0.5), torch.no_grad():
        want = [model(**call).logits for call in calls]

        def work(number):
            try:
                start.wait(60)
                for _ in range(8):
                    try:
                        with torch.no_grad():
                            assert torch.equal(model(**calls[number]).logits, want[number])
                    except vtc.InputError as error:
                        refused.append(str(error))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        assert all("another thread is in" in message for message in refused)
        for call, logits in zip(calls, want, strict=True):  # and then it is free again
            assert torch.equal(model(**call).logits, logits)


@torch.no_grad()
def test_another_thread_is_refused_while_one_is_in():
    model, inputs, said = zoo.build("llava", fresh=True), zoo.inputs("llava", "single"), []
    with vtc.compress(model, "random", keep=0.5):
        want = model(**inputs).logits

        def other():
            for call in (lambda: model(**inputs), lambda: inner_of(model).get_image_features(inputs["pixel_values"])):
                try:
                    call()
                    said.append("")
                except vtc.InputError as error:
                    said.append(str(error))

        def meanwhile(module, args):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

        hook = zoo.text_model(model).layers[0].register_forward_pre_hook(meanwhile)
        assert torch.equal(model(**inputs).logits, want)
        hook.remove()
        assert len(said) == 2 and all("another thread is in" in message for message in said)


@torch.no_grad()
def test_data_parallel_replicas_are_refused():
    model, inputs = zoo.build("llava", fresh=True), zoo.inputs("llava", "single")

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        replica._modules = {key: child and replicate(child) for key, child in module._modules.items()}
        return replica

    with vtc.compress(model, "random", keep=0.5):
        with pytest.raises(vtc.UnsupportedModelError, match="DistributedDataParallel"):
            replicate(model)(**inputs)
        model(**inputs)


@torch.no_grad()
def test_the_projector_is_heard_where_it_is():
    """LoRA in the projector after `compress`: ZOO-Prune decides as if it had been there before."""
    import peft

    def lora(model):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["linear_1"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)

    before, after = (copy.deepcopy(zoo.build("llava")) for _ in range(2))
    inputs = zoo.inputs("llava", "single")
    lora(before)
    with vtc.compress(before, "zoo_prune", keep=0.3) as handle:
        want, kept = before(**inputs).logits, handle.token_map.anchor
    with vtc.compress(after, "zoo_prune", keep=0.3) as handle:
        after(**inputs)
        lora(after)
        assert torch.equal(after(**inputs).logits, want) and torch.equal(handle.token_map.anchor, kept)


@pytest.mark.parametrize(
    ("method", "message"),
    [("visionzip", "attended past transformers' attention interface"), ("fastv", "without being heard")],
)
@torch.no_grad()
def test_attention_that_was_replaced_is_noticed(method, message):
    model, inputs = copy.deepcopy(zoo.build("llava")), zoo.inputs("llava", "single")
    with vtc.compress(model, method, keep=0.5):
        model(**inputs)
        layers = zoo.text_model(model).layers if method == "fastv" else model.model.vision_tower.encoder.layers
        for layer in layers:
            old = layer.self_attn
            layer.self_attn = type(old)(
                old.config.real if hasattr(old.config, "real") else old.config,
                *([old.layer_idx] if hasattr(old, "layer_idx") else []),
            )
        with pytest.raises(vtc.VTCError, match=message):
            model(**inputs)
