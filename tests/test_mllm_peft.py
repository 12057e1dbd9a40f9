"""Compressed multimodal LLMs among other libraries: pipelines, LoRA, accelerate's hooks, saved files."""

import copy

import mllm_processor
import mllm_zoo as zoo
import pytest
import torch

import vtc

transformers = pytest.importorskip("transformers")
# peft asks models by a name that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
NAMES = ["llava", "qwen2_5_vl"]
SAVED = [
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "gemma3",
    "paligemma",
]


def said(model, inputs, count=5):
    return model.generate(**inputs, max_new_tokens=count, do_sample=False)


# -- pipeline -------------------------------------------------------------------------------------------------------


def chat(*seeds):
    content = [{"type": "image", "image": mllm_processor.picture(seed)} for seed in seeds]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "what is this ?"}]}]


@pytest.mark.parametrize("name", NAMES)
def test_pipeline(name):
    """One question, a list of them, and in batches: what `generate` says of the processor's inputs."""
    model, processor = zoo.build(name), mllm_processor.PROCESSORS[name]()
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    asked = [chat(0), chat(1, 2), chat(3)]

    def wanted(messages):
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        return processor.decode(said(model, inputs, 6)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def answer(found):
        return found[0]["generated_text"].strip()

    options = {"return_full_text": False, "generate_kwargs": {"do_sample": False, "max_new_tokens": 6}}
    dense = [answer(pipe(text=messages, **options)) for messages in asked]
    with vtc.compress(model, "divprune", keep=0.2) as handle:
        want = [wanted(messages).strip() for messages in asked]
        assert [answer(pipe(text=messages, **options)) for messages in asked] == want
        assert sum(handle.report.after) < 0.3 * sum(handle.report.before)
        assert [answer(found) for found in pipe(text=asked, **options)] == want
        assert [answer(found) for found in pipe(text=asked, batch_size=3, **options)] == want
        assert len(handle.report.after) == 4
    assert want != dense
    assert [answer(pipe(text=messages, **options)) for messages in asked] == dense


def test_pipeline_of_an_image_and_a_text():
    """Without a chat: images and texts side by side."""
    model, processor = zoo.build("llava"), mllm_processor.llava()
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    picture, text = mllm_processor.picture(0), "<image> what is this ?"
    options = {"return_full_text": False, "generate_kwargs": {"do_sample": False, "max_new_tokens": 4}}
    with vtc.compress(model, "divprune", keep=0.2):
        inputs = processor(images=picture, text=text, return_tensors="pt")
        want = processor.decode(said(model, inputs, 4)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert pipe(images=picture, text=text, **options)[0]["generated_text"].strip() == want.strip()


# -- LoRA -----------------------------------------------------------------------------------------------------------


def lora(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = r".*(language_model|text_model).*\.(q_proj|v_proj|gate_proj)"
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options))


def fit(model, inputs, steps=20):
    """The losses of some steps on one batch."""
    labels = inputs["input_ids"].masked_fill(zoo.placeholders(model, inputs["input_ids"]), -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("order", ["compressed first", "adapted first", "around the adapted"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3"])
def test_lora_trains(name, order):
    model, inputs = zoo.build(name, fresh=True), zoo.inputs(name, "ragged_right")
    dense = model(**inputs).logits.detach()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    if order == "compressed first":
        handle = vtc.compress(model, "divprune", keep=0.3)
        adapted = lora(model)
    else:
        adapted = lora(model)
        handle = vtc.compress(adapted if order == "around the adapted" else model, "divprune", keep=0.3)
    adapted.train()
    losses = fit(adapted, inputs)
    assert losses[-1] < 0.7 * losses[0], losses
    assert handle.report.macs_ratio < 1
    left = {key: value for key, value in adapted.get_base_model().state_dict().items() if "lora_" not in key}
    assert all(torch.equal(value, base[key.replace("base_layer.", "")]) for key, value in left.items())
    assert len(left) == len(base)
    adapted.eval()
    with torch.no_grad():
        short = adapted(**inputs).logits
        handle.remove()
        whole = adapted(**inputs).logits
        assert whole.shape == dense.shape != short.shape
        assert not torch.allclose(whole, dense, atol=1e-3)
        with adapted.disable_adapter():
            assert torch.allclose(adapted(**inputs).logits, dense, atol=1e-5)
        with vtc.compress(adapted, "divprune", keep=0.3):
            assert torch.allclose(adapted(**inputs).logits, short, atol=1e-5)
    assert fit(adapted, inputs, 2)[0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_merged_adapters(name):
    """Merged under the patch, and unloaded: the same answers, and the patch comes off."""
    model, inputs = zoo.build(name, fresh=True), zoo.inputs(name, "ragged")
    adapted = lora(model)
    handle = vtc.compress(adapted, "divprune", keep=0.3)
    fit(adapted, zoo.inputs(name, "ragged_right"), 5)
    adapted.eval()
    with torch.no_grad():
        want = adapted(**inputs).logits
        adapted.merge_adapter()
        assert torch.allclose(adapted(**inputs).logits, want, atol=1e-4)
        adapted.unmerge_adapter()
        plain = adapted.merge_and_unload()
        assert plain is model
        assert torch.allclose(plain(**inputs).logits, want, atol=1e-4)
        ids = said(plain, inputs)
        with vtc.compress(plain, "divprune", keep=0.3) as second:  # takes the first one's place
            assert torch.equal(said(plain, inputs), ids)
            handle.remove()
            assert second.report and torch.equal(said(plain, inputs), ids)
        assert plain(**inputs).logits.shape != want.shape
    assert [key for key in plain.state_dict() if "lora" in key] == []


def test_adapters_around_a_method_between_layers():
    """FastV's patches sit on decoder layers, whose linear maps peft replaces."""
    model, inputs = zoo.build("llava", fresh=True), zoo.inputs("llava", "ragged_right")
    with vtc.compress(model, "fastv", keep=0.3, layer=1):
        losses = fit(lora(model).train(), inputs)
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.parametrize("name", NAMES)
def test_saved_adapters(name, tmp_path):
    """An adapter trained under compression is loaded onto a plain model."""
    peft = pytest.importorskip("peft")
    model, inputs = zoo.build(name, fresh=True), zoo.inputs(name, "ragged_right")
    adapted = lora(model)
    with vtc.compress(adapted, "divprune", keep=0.3):
        fit(adapted.train(), inputs, 5)
        adapted.save_pretrained(tmp_path)
        with torch.no_grad():
            want = adapted.eval()(**inputs).logits
    again = peft.PeftModel.from_pretrained(zoo.build(name, fresh=True), tmp_path).eval()
    with vtc.compress(again, "divprune", keep=0.3), torch.no_grad():
        assert torch.allclose(again(**inputs).logits, want, atol=1e-5)


# -- accelerate -----------------------------------------------------------------------------------------------------


def attributes(model):
    """Where a patch would sit. Offloaded parameters are new objects after every call."""
    names = ("forward", "_old_forward", "get_image_features", "get_video_features", "_loss_function")
    return [(m, sorted(m.__dict__), [id(m.__dict__.get(name)) for name in names]) for m in model.modules()]


@pytest.mark.parametrize("how", ["cpu", "offloaded", "on disk"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_dispatched(name, how, tmp_path):
    """Hooks replace `forward`, on the model and its parts; offloaded weights come when their part runs."""
    accelerate = pytest.importorskip("accelerate")
    inputs = zoo.inputs(name, "ragged")
    plain, model = zoo.build(name), zoo.build(name, fresh=True)
    dense = said(plain, inputs)
    with vtc.compress(plain, "divprune", keep=0.3):
        want = said(plain, inputs)
    if how == "cpu":
        parts = {"model": "cpu", "lm_head": "cpu"} if hasattr(model, "lm_head") else {"": "cpu"}
        model = accelerate.dispatch_model(model, parts, main_device="cpu", force_hooks=True)
    elif how == "offloaded":
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model = accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert "_old_forward" in model.__dict__
    assert torch.equal(said(model, inputs), dense)
    before = attributes(model)
    with vtc.compress(model, "divprune", keep=0.3) as handle:
        assert torch.equal(said(model, inputs), want)
        assert handle.report.macs_ratio < 1
    assert attributes(model) == before
    assert torch.equal(said(model, inputs), dense)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    if how == "cpu":
        assert torch.equal(said(model, inputs), dense)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_that_come_after(name):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = zoo.build(name, fresh=True), zoo.inputs(name, "ragged")
    dense = said(model, inputs)
    with vtc.compress(model, "divprune", keep=0.3):
        want = said(model, inputs)
        accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
        assert torch.equal(said(model, inputs), want)
    assert torch.equal(said(model, inputs), dense)


@pytest.mark.parametrize("name", NAMES)
def test_device_map(name, tmp_path):
    zoo.build(name).save_pretrained(tmp_path)
    inputs = zoo.inputs(name, "ragged")
    with vtc.compress(zoo.build(name), "divprune", keep=0.3):
        want = said(zoo.build(name), inputs)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, device_map={"": "cpu"})
    with vtc.compress(loaded, "divprune", keep=0.3):
        assert torch.equal(said(loaded, inputs), want)


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded(name, tmp_path):
    """A compressed model saves what the plain one saves."""
    model, inputs = zoo.build(name), zoo.inputs(name, "single")
    dense, keys = said(model, inputs), list(model.state_dict())
    with vtc.compress(model, "divprune", keep=0.3):
        short = said(model, inputs)
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert list(loaded.state_dict()) == keys
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(said(loaded, inputs), dense)
    with vtc.compress(loaded, "divprune", keep=0.3):
        assert torch.equal(said(loaded, inputs), short)


def test_weights_loaded_under_the_patch():
    model, inputs = zoo.build("llava", fresh=True), zoo.inputs("llava", "single")
    other = copy.deepcopy(model)
    zoo.randomise(other, seed=1)
    with vtc.compress(other, "divprune", keep=0.3):
        want = said(other, inputs)
    with vtc.compress(model, "divprune", keep=0.3):
        assert not torch.equal(said(model, inputs), want)
        assert not any(model.load_state_dict(other.state_dict()))
        assert torch.equal(said(model, inputs), want)
