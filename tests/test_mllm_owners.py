"""Models around a multimodal one: known, or refused by name before anything is patched."""

import copy
import types

import mllm_zoo as zoo
import pytest
import torch
import transformers
from mllm_oracle import dense_generate_positions
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification

import vtc

# peft asks models by a name that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
NAMES = list(zoo.FAMILIES)
LABELS = 3


# -- classification ---------------------------------------------------------------------------------------------------


class LlavaForSequenceClassification(GenericForSequenceClassification, transformers.LlavaPreTrainedModel):
    pass


class Qwen3VLForSequenceClassification(
    GenericForSequenceClassification, transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLPreTrainedModel
):
    pass


CLASSIFIERS = {
    "gemma3": transformers.Gemma3ForSequenceClassification,
    "llava": LlavaForSequenceClassification,
    "qwen3_vl": Qwen3VLForSequenceClassification,
}


def classifier(name, pad=zoo.PAD):
    config = zoo.FAMILIES[name].config()
    config.num_labels, config.get_text_config().pad_token_id = LABELS, pad
    torch.manual_seed(0)
    return zoo.randomise(CLASSIFIERS[name]._from_config(config, attn_implementation="sdpa"))


def with_a_longer_text(name, padding):
    """A row with an image, and one of text alone that is longer. Returns the batch, and the rows by themselves."""
    single = zoo.alone(name, "ragged", 0)
    length = single["input_ids"].shape[1]
    words = torch.randint(*zoo.TEXT_IDS, (1, length + 5), generator=torch.Generator().manual_seed(2))
    text = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    batch = dict(single)
    for key, value in single.items():
        if value.shape == (1, length):
            text.setdefault(key, torch.zeros_like(words))
            front = (5, 0) if padding == "left" else (0, 5)
            batch[key] = torch.cat([nn.functional.pad(value, front), text[key]])
    return batch, [single, text]


@pytest.mark.parametrize("method", ["random", "tome", "fastv"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_a_classifier_pools_the_rows_last_token(name, padding, method):
    """Of each row alone, and of the unpatched head on the decoder's own rows."""
    if method == "fastv" and name == "gemma3":
        return
    model, (batch, rows) = classifier(name), with_a_longer_text(name, padding)
    options = {"layer": 2} if method == "fastv" else {}
    seen = []
    dense = model(**batch).logits
    with vtc.compress(model, method, keep=0.4, **options) as handle:
        got = model(**batch, use_cache=False).logits
        assert got.shape == (2, LABELS)
        kept = handle.kept
        for row, single in enumerate(rows):
            decoder = zoo.text_model(model)
            hook = decoder.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
            alone = model(**single, use_cache=False).logits[0]
            hook.remove()
            assert torch.allclose(alone, got[row], atol=1e-5), f"row {row}"
            assert torch.allclose(model.score(seen.pop()[0, -1]), alone, atol=1e-6)
        # embeddings: transformers then reads the last column
        embeds = {k: v for k, v in rows[0].items() if k != "input_ids"}
        embeds["inputs_embeds"] = model.get_input_embeddings()(rows[0]["input_ids"])
        if name != "qwen3_vl":  # which makes its positions of ids
            assert torch.allclose(model(**embeds, use_cache=False).logits[0], got[0], atol=1e-5)
        loss = model(**batch, labels=torch.tensor([0, 2]), use_cache=False).loss
        assert torch.allclose(loss, nn.functional.cross_entropy(got, torch.tensor([0, 2])), atol=1e-5)
    assert not kept.all() and torch.equal(model(**batch).logits, dense)
    with vtc.compress(model, method, keep=1.0, **options):
        assert torch.equal(model(**batch).logits, dense)


@torch.no_grad()
def test_a_classifier_without_a_padding_id():
    model, single = classifier("gemma3", pad=None), zoo.alone("gemma3", "ragged", 0)
    with vtc.compress(model, "random", keep=0.4):
        seen = []
        hook = zoo.text_model(model).register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
        got = model(**single, use_cache=False).logits
        hook.remove()
        assert torch.allclose(model.score(seen[0][:, -1]), got, atol=1e-6)


@torch.no_grad()
def test_a_classifier_whose_prompt_ends_with_its_image():
    """The last token that stays is the row's last."""
    model, single = classifier("llava"), zoo.alone("llava", "ragged", 0)
    stop = int((single["input_ids"][0] == zoo.IMAGE).nonzero().max()) + 1
    single = {k: v[:, :stop] if v.shape == single["attention_mask"].shape else v for k, v in single.items()}
    with vtc.compress(model, "random", keep=0.2) as handle:
        seen = []
        hook = zoo.text_model(model).register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
        got = model(**single, use_cache=False).logits
        hook.remove()
        assert not handle.kept[0, -1] and torch.allclose(model.score(seen[0][:, -1]), got, atol=1e-6)


# -- wrappers and heads that are known ---------------------------------------------------------------------------------


def wrapped(how, model):
    if how == "compiled":
        return torch.compile(model, backend="eager")
    if how == "lora":
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    if how == "lora of a classifier":
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    if how == "fsdp2":
        model.__class__ = type(f"FSDP{type(model).__name__}", (type(model),), {})  # what fully_shard does
        model.model.__class__ = type(f"FSDP{type(model.model).__name__}", (type(model.model),), {})
        return model
    if how == "mixed precision":
        accelerate = pytest.importorskip("accelerate")
        model.forward = accelerate.utils.convert_outputs_to_fp32(model.forward)
        return model
    return {"sequential": nn.Sequential, "list": lambda x: nn.ModuleList([x]), "data parallel": nn.DataParallel}[how](
        model
    )


@pytest.mark.parametrize("how", ["compiled", "lora", "fsdp2", "mixed precision", "sequential", "list", "data parallel"])
@torch.no_grad()
def test_wrappers_that_hand_the_call_on(how):
    inputs, model = zoo.inputs("llava", "ragged"), zoo.build("llava", fresh=True)
    with vtc.compress(model, "divprune", keep=0.4):
        want = model(**inputs).logits
        last = model(**inputs, logits_to_keep=3).logits
    outer = wrapped(how, model)
    run = outer[0] if how in ("sequential", "list") else outer
    run = (
        model if how == "compiled" else run
    )  # to trace it all takes half a minute; test_mllm_life compiles the decoder
    with vtc.compress(outer, "divprune", keep=0.4) as handle:
        assert torch.allclose(run(**inputs).logits, want, atol=1e-5)
        assert torch.allclose(run(**inputs, logits_to_keep=3).logits, last, atol=1e-5)
        assert handle.report.macs_ratio < 1 and vtc.explain(outer, "divprune").ok


@torch.no_grad()
def test_adapters_around_a_classifier():
    batch, _ = with_a_longer_text("gemma3", "right")
    model = classifier("gemma3")
    with vtc.compress(model, "random", keep=0.4):
        want = model(**batch).logits
    outer = wrapped("lora of a classifier", model)
    with vtc.compress(outer, "random", keep=0.4):
        assert torch.allclose(outer.eval()(**batch).logits, want, atol=1e-5)


@torch.no_grad()
def test_shield_gemma_reads_the_last_column():
    config = transformers.ShieldGemma2Config(
        **{k: v for k, v in zoo.FAMILIES["gemma3"].config().to_dict().items() if k in ("text_config", "vision_config")},
        mm_tokens_per_image=36,
        image_token_index=zoo.IMAGE,
        boi_token_index=zoo.START,
        eoi_token_index=zoo.END,
        yes_token_index=7,
        no_token_index=9,
    )
    model = zoo.randomise(transformers.ShieldGemma2ForImageClassification(config))
    inputs = zoo.inputs("gemma3", "ragged")
    with vtc.compress(model, "random", keep=0.4):
        got = model(**inputs).logits
        want = model.model(**inputs).logits[:, -1, [7, 9]]
        assert torch.allclose(got, want, atol=1e-6)
        for row in range(3):
            assert torch.allclose(model(**zoo.alone("gemma3", "ragged", row)).logits[0], got[row], atol=1e-5)


# -- the others --------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """A user's own, as a value head around a language model."""

    def __init__(self, model):
        super().__init__()
        self.vlm = model
        self.value = nn.Linear(64, 1)

    def forward(self, attention_mask, **inputs):
        out = self.vlm(attention_mask=attention_mask, output_hidden_states=True, **inputs)
        return self.value(out.hidden_states[-1])[..., 0] * attention_mask


class Overridden(transformers.LlavaForConditionalGeneration):
    def forward(self, input_ids, **inputs):
        return super().forward(input_ids, **inputs).logits[input_ids != 0]


class OverriddenInside(transformers.LlavaModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def fused(self, *args, labels=None, **kwargs):
    """As kernels that replace the forward of a class, and read the labels by themselves."""
    hidden = self.model(*args, **kwargs)[0]
    return nn.functional.cross_entropy(self.lm_head(hidden).flatten(0, 1), labels.flatten())


def policy():
    expert = {"model_type": "gemma", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 16}
    expert |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": zoo.VOCAB}
    config = transformers.PI0Config(vlm_config=zoo.FAMILIES["paligemma"].config(), dit_config=expert)
    return transformers.PI0ForConditionalGeneration(config)


def unknown(case):
    model = zoo.build("llava", fresh=True)
    if case == "a wrapper":
        return Wrapper(model)
    if case == "two wrappers":
        return Wrapper(nn.Sequential(Wrapper(model)))
    if case == "a sequence":
        return nn.Sequential(model, nn.Identity())
    if case == "overridden":
        model.__class__ = Overridden
    elif case == "overridden inside":
        model.model.__class__ = OverriddenInside
    elif case == "replaced on the instance":
        model.forward = types.MethodType(fused, model)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: unknown("a wrapper"),
            ["Wrapper holds it", "does not know what Wrapper does", "compress model.vlm itself"],
        ),
        (lambda: unknown("two wrappers"), ["Wrapper holds it", "compress model.vlm.0.vlm itself"]),
        (lambda: unknown("a sequence"), ["Sequential holds it", "compress model.0 itself"]),
        (lambda: unknown("overridden"), ["Overridden holds it", "LlavaForConditionalGeneration"]),
        (lambda: unknown("overridden inside"), ["OverriddenInside has a forward", "LlavaModel"]),
        (lambda: unknown("replaced on the instance"), ["LlavaForConditionalGeneration holds it", "forward"]),
        (policy, ["PI0Model", "embeddings itself", "compress model.model.vlm itself"]),
    ],
)
def test_models_that_are_not_known(make, words):
    """By name, with a way out, the same in `explain` and `compress`, and nothing is patched; the way out works."""
    model = make()
    before = zoo.fingerprint(model)
    plan = vtc.explain(model, "divprune")
    assert not plan.ok and all(word in str(plan) for word in words), str(plan)
    with pytest.raises(vtc.UnsupportedModelError) as raised:
        vtc.compress(model, "divprune", keep=0.4)
    assert str(raised.value) == str(plan)
    assert zoo.fingerprint(model) == before
    if "compress model." in str(plan) and "forward" not in words[-1]:
        path = str(plan).split("compress model.")[1].split(" itself")[0]
        assert vtc.explain(model.get_submodule(path), "divprune").ok


def test_a_class_whose_forward_was_replaced(monkeypatch):
    model = zoo.build("llava", fresh=True)
    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "forward", fused)
    with pytest.raises(vtc.UnsupportedModelError, match="compress model.model itself if"):
        vtc.compress(model, "divprune", keep=0.4)


def heads():
    """Every class of transformers that holds a model of a known family, as of 5.24 by a sweep over all classes."""
    found = [type(zoo.build(name)).__name__ for name in NAMES]
    return {*found, "Gemma3ForSequenceClassification", "ShieldGemma2ForImageClassification"}


@pytest.mark.parametrize("name", NAMES)
def test_heads_of_every_family(name):
    assert vtc.explain(zoo.build(name), "random").ok and type(zoo.build(name)).__name__ in heads()


def test_a_second_patch_finds_the_same_owners():
    model = zoo.build("llava", fresh=True)
    handle = vtc.compress(model, "random", keep=0.4)
    assert vtc.explain(model, "random").ok
    twin = copy.deepcopy(model)
    second = vtc.compress(model, "divprune", keep=0.4)
    handle.remove()
    assert "forward" in model.__dict__
    second.remove()
    vtc.remove(twin)
    assert "forward" not in model.__dict__ and "forward" not in twin.__dict__
    assert dense_generate_positions("llava", model, zoo.inputs("llava", "single")) is not None


class OurModel(transformers.LlavaModel):
    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids, **kwargs)


class OurForConditionalGeneration(transformers.LlavaForConditionalGeneration):
    def forward(self, *args, logits_to_keep=0, **kwargs):
        return super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)


@torch.no_grad()
def test_a_family_of_the_users_own(monkeypatch):
    """Its head is called after it and comes from where it comes from, or is one of transformers."""
    from vtc.adapters.multimodal.families import FAMILIES
    from vtc.adapters.multimodal.families.llava import Llava

    model, inputs = zoo.build("llava", fresh=True), zoo.inputs("llava", "ragged")
    with vtc.compress(model, "random", keep=0.4):
        want = model(**inputs, logits_to_keep=2).logits
    ours = type("Ours", (Llava,), {"name": "ours", "covers": "ours", "classes": ("OurModel",)})
    model.model.__class__ = OurModel
    monkeypatch.setitem(FAMILIES, "ours", ours())
    for kind in (transformers.LlavaForConditionalGeneration, OurForConditionalGeneration):
        model.__class__ = kind
        with vtc.compress(model, "random", keep=0.4):
            assert torch.equal(model(**inputs, logits_to_keep=2).logits, want)
