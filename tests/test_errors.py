"""Errors that no other test raises, each with the value that is wrong: tools/raised.py finds them."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import mllm_processor
import mllm_zoo
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from zoo import model, pixels

import vtc
from vtc import checkpoints
from vtc.adapters.multimodal import capture as evidence
from vtc.adapters.multimodal.families.llava_next import LlavaNext
from vtc.adapters.multimodal.rotary import axes
from vtc.bench import answer as chat
from vtc.bench import fidelity as check
from vtc.bench import measure, named, prefill
from vtc.bench.opened import opened
from vtc.checkpoints import CheckpointError, MissingPackageError, tiny
from vtc.eval import answers, clip, common
from vtc.methods import Tokens
from vtc.models import configs as multimodal
from vtc.models import encoders as models
from vtc.models import llms
from vtc.models.encoders import ModelError
from vtc.models.images import ImageError, load_image
from vtc.ops import kernels
from vtc.viz import sheet

# -- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: vtc.compress(net, vtc.ToMe(keep=0.9), r=3), r"^r given beside a ready method: .* ToMe\(...\)"),
        (lambda net: vtc.compress(net, "pitome", keep=0.9, split="thirds"), "split='thirds' is unknown"),
        (lambda net: vtc.compress(net, "pitome", keep=0.9, margin=(1, 2, 3)), r"margin=\(1, 2, 3\): .* a pair"),
        (lambda net: vtc.compress(net, "pitome", keep=0.9, protect=0.5), "protect=0.5: it takes True, False, or a"),
        (lambda net: vtc.compress(net, "tome", keep=0.9, pooled="no"), "pooled='no': it takes True or False"),
        (lambda net: vtc.compress(net, "random", keep=0.9, seed=2**63), "seed=9223372036854775808: it takes a whole"),
        (lambda net: vtc.compress(net, "idpruner", keep=0.9, scorer=7), "scorer=7: it takes the path"),
        (lambda net: vtc.explain("resnet50"), "model is a str: explain takes"),
        (lambda net: vtc.remove(None), "model is a NoneType: remove takes"),
        (lambda net: vtc.save_config(net.norm, "x.json"), "^LayerNorm.* is neither a handle nor a method"),
        (lambda net: vtc.save_config(vtc.ToMe(r=3), "/dev/null/x.json"), "/dev/null/x.json cannot be written"),
        (lambda net: vtc.choose(net, pixels(1), ttft="soon"), "ttft='soon': it takes seconds"),
        (lambda net: vtc.choose(net, pixels(1), fidelity="high"), "fidelity='high': it takes a share"),
        (lambda net: vtc.choose(net, pixels(1), tokens=0.5), "tokens=0.5: it takes a whole number >= 1"),
        (lambda net: vtc.functional.tome(torch.zeros(1, 4, 2), r=[1, 2]), r"r=\[1, 2\]: it takes one whole number"),
        (
            lambda net: vtc.functional.downsample(torch.zeros(1, 4, 2), keep=1, grid=(2, -2)),
            r"grid=\(2, -2\): it takes \(rows, columns\)",
        ),
        (lambda net: measure(net, pixels(1), []), "methods is empty"),
        (lambda net: measure(net, pixels(1), [vtc.ToMe(r=3)], repeats=0), "repeats=0: it takes a whole number >= 1"),
        (lambda net: named("timm:vit_tiny_patch16_224", 0), "size=0: it takes a positive number"),
        (lambda net: answers._chosen(net, ["idpruner"], (), None), "idpruner cannot reduce this model: Vision"),
        (lambda net: clip.run("/nowhere", "ViT-B-32"), "data='/nowhere': no such folder"),
        (lambda net: common.load_model("int8"), "dtype='int8' is unknown"),
        (lambda net: sheet([], "nothing"), "a sheet takes at least one picture"),
    ],
)
def test_options(call, message):
    with pytest.raises(vtc.VTCError, match=message):
        call(model("timm-vit-dynamic"))


def test_tokens_that_a_method_cannot_use():
    x = torch.randn(1, 6, 4)
    pool = vtc.Downsample(keep=0.5)
    with pytest.raises(vtc.OptionError, match="downsample needs the patches' rows and columns"):
        pool.decide(Tokens(x), 3)
    padding = torch.tensor([[False, False, True, True, True, True]])
    with pytest.raises(vtc.OptionError, match="needs the padding behind the patches"):
        pool.decide(Tokens(x, mask=padding, grid=((2, 2),)), torch.tensor([2]))
    with pytest.raises(vtc.InputError, match=r"prompt_attention\) must be \(1, 6\), not \(1, 3\)"):
        vtc.FastV(keep=0.5).decide(Tokens(x, prompt_attention=torch.ones(1, 3)), 2)


def test_a_backend_that_is_not_there(monkeypatch):
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setenv("VTC_NO_EXT", "1")
    with pytest.raises(vtc.OptionError, match="backend 'cpp' is not there: VTC_NO_EXT is set"):
        vtc.ops.set_backend("cpp")


# -- encoders -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_calls_of_an_encoder():
    net = model("timm-vit-dynamic")
    with vtc.compress(net, "tome", keep=0.8) as handle:
        net(pixels(1))
        with pytest.raises(vtc.VTCError, match="kept speaks of prompts"):
            _ = handle.kept
        with pytest.raises(vtc.VTCError, match="block 1 of the model ran without the blocks before"):
            net.blocks[1](torch.zeros(1, 65, 192))
        for module in net.modules():  # somebody took all hooks off
            module._forward_hooks.clear()
        with pytest.raises(vtc.VTCError, match="block 0 of .* attended without showing its keys, which tome compares"):
            net(pixels(1))
    with vtc.compress(net, "downsample", keep=65, mode="resize"):
        with pytest.raises(vtc.OptionError, match="keep=65 is more than the image's 64 tokens"):
            net(pixels(1))


@pytest.mark.parametrize(
    ("mode", "message"),
    [("pool", r"downsample needs all patches of the image, but \d+ of the grid"), ("resize", "resized to 5x5 patches")],
)
@torch.no_grad()
def test_patches_that_were_dropped(mode, message):
    net = copy.deepcopy(model("timm-vit-dynamic"))
    net.norm_pre = nn.Identity()
    net.norm_pre.forward = lambda x: x[:, :-3]
    with vtc.compress(net, "downsample", keep=26, mode=mode), pytest.raises(vtc.VTCError, match=message):
        net(pixels(1))


def test_an_attention_that_does_not_say_how_wide_it_is():
    class Other(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.out_features = [inner], inner.out_features

        def forward(self, x):
            return self.inner[0](x)

    net = copy.deepcopy(model("timm-vit-dynamic"))
    net.blocks[0].attn.qkv, net.blocks[0].attn.proj = Other(net.blocks[0].attn.qkv), Other(net.blocks[0].attn.proj)
    with pytest.raises(vtc.UnsupportedModelError, match="no layer of its attention says how many features it takes"):
        vtc.compress(net, "tome", keep=0.9)


# -- multimodal LLMs ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_calls_of_a_multimodal_llm():
    llava, inputs = mllm_zoo.build("llava"), mllm_zoo.inputs("llava", "single")
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeds = llava.get_input_embeddings()(inputs["input_ids"])
    with vtc.compress(llava, "cdpruner", keep=0.5), pytest.raises(vtc.InputError, match="cdpruner reads the prompt's"):
        llava(inputs_embeds=embeds, **rest)
    with vtc.compress(llava, "random", keep=0.5):
        cache = llava(**inputs)[mllm_zoo.CACHE]
        more = {"input_ids": torch.tensor([[7, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        length = inputs["input_ids"].shape[1] + 2
        with pytest.raises(vtc.InputError, match=f"attention_mask has 3 columns, but the conversation has {length}"):
            llava(**more, **{mllm_zoo.CACHE: cache})
    with vtc.compress(llava, "hiprune", keep=0.5, pooled=True):
        with pytest.raises(vtc.InputError, match="hiprune needs every image to fill a grid"):
            llava(**inputs)


@torch.no_grad()
def test_models_that_work_otherwise_than_vtc_knows(monkeypatch):
    llava, inputs = mllm_zoo.build("llava"), mllm_zoo.inputs("llava", "single")
    with vtc.compress(llava, "visionzip", keep=0.5), monkeypatch.context() as patch:
        patch.setattr(evidence.Capture, "stop", lambda self: {"attention": [], "middle": []})
        with pytest.raises(vtc.VTCError, match="LlavaModel: its tower attended past transformers' attention interface"):
            llava(**inputs)
    with vtc.compress(llava, "zoo_prune", keep=0.5), monkeypatch.context() as patch:
        patch.setattr(evidence.Capture, "saw_projected", lambda *given: None)
        with pytest.raises(vtc.VTCError, match="LlavaModel: its projector did not run as a module, so"):
            llava(**inputs)
    with pytest.raises(vtc.VTCError, match="3 rows of the tower for 4 image tokens: this model"):
        evidence._at(torch.zeros(3, 2), None, 4)
    anyres, inputs = mllm_zoo.build("llava_next"), mllm_zoo.inputs("llava_next", "single")
    with vtc.compress(anyres, "random", keep=0.5), monkeypatch.context() as patch:
        pack = LlavaNext.pack
        patch.setattr(LlavaNext, "pack", lambda *given: [each[1:] for each in pack(*given)])
        with pytest.raises(vtc.VTCError, match=r"image 0 has (\d+) tokens, but \d+ by its size: LlavaNextModel lays"):
            anyres(**inputs)


def test_rotary_columns_that_turn_in_no_known_pairs():
    class Mirrored(nn.Module):
        """Pairs are the first column and the last, the second and the last but one."""

        def forward(self, x, ids):
            angle = ids[..., None] * torch.tensor([1.0, 0.1, 0.1, 1.0])
            return angle.cos(), angle.sin()

    with pytest.raises(vtc.OptionError, match=r"Mirrored turns column c together with neither column c \+ 2 nor its"):
        axes(Mirrored())


# -- models by name -------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_made(tmp_path, monkeypatch):
    for name, size, message in [
        ("open_clip:ViT-B-33", None, "open_clip has no model 'ViT-B-33': did you mean 'ViT-B-32"),
        (f"hf:{tmp_path}", None, f"hf:{tmp_path}: no configuration found .* or add --download"),
        ("timm:resnet18", 64, "timm:resnet18 cannot be made .*; try it at its own size"),
    ]:
        with pytest.raises(ModelError, match=message):
            named(name, size)
    with pytest.raises(ModelError, match="open_clip:ViT-B-32: which weights is not said here"):
        named("open_clip:ViT-B-32", weights=True)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModelError, match=r'open_clip is not installed: pip install "vtc-torch\[open-clip\]"'):
        named("open_clip:ViT-B-32")


def test_configurations_that_cannot_be_made(monkeypatch):
    config = mllm_zoo.FAMILIES["llava"].config()
    monkeypatch.setattr(multimodal, "picture", lambda config, side: None)
    with pytest.raises(ModelError, match="llava: nobody here knows how its prompts are laid out"):
        multimodal.sample(config)
    config.text_config.num_attention_heads = 0
    with pytest.raises(ModelError, match="llava: cannot be made from its configuration"):
        multimodal.sketch(config)


def test_models_without_a_gate():
    class Unknown(nn.Module):
        """Looks like a multimodal LLM of transformers, of no family that is known."""

        config, get_placeholder_mask = transformers.PreTrainedConfig(), None

        def get_image_features(self, pixel_values):
            raise NotImplementedError

    with pytest.raises(vtc.UnsupportedModelError, match="^Unknown: Unknown has no decoder of layers"):
        prefill.site_of(Unknown())
    with pytest.raises(vtc.UnsupportedModelError, match="^VisionTransformer is no multimodal LLM that vtc knows"):
        prefill.site_of(model("timm-vit"))


def test_commands(tmp_path, capsys, monkeypatch):
    from vtc.cli import command as cli

    assert cli.main(["bench", "--self-check", "--model", "dinov2-small"]) == 2
    assert "--self-check needs --images" in capsys.readouterr().err
    monkeypatch.setattr(models, "_LARGE", 1)
    assert cli.main(["bench", "--model", "timm:vit_tiny_patch16_224"]) == 2
    assert "--model timm:vit_tiny_patch16_224: too large" in capsys.readouterr().err
    mllm_processor.picture(0).save(tmp_path / "a.png")
    with pytest.raises(vtc.OptionError, match="--prompt is for multimodal LLMs"):
        opened("dinov2-small", str(tmp_path), "what ?", None)


def test_outputs_without_features():
    class Text(nn.Module):
        """Wraps an encoder, and says nothing of its features."""

        def __init__(self):
            super().__init__()
            self.inside = copy.deepcopy(model("timm-vit"))

        def forward(self, x):
            return {"text": self.inside(x)}

    with pytest.raises(vtc.InputError, match="the model returns a dict: give call="):
        check.check(Text(), pixels(1), [vtc.ToMe(keep=0.8)], 1)


# -- processors, pictures, checkpoints ------------------------------------------------------------------------------


def test_processors(tmp_path, monkeypatch):
    import transformers

    image, folder = mllm_processor.picture(0), mllm_processor.save("llava", tmp_path)
    alone = transformers.AutoProcessor.from_pretrained(folder).tokenizer
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *given, **options: alone)
    with pytest.raises(llms.ChatError, match=r"\(\w+\) has no image processor; .* or preprocessor_config.json"):
        llms.load(folder, vtc.Random(keep=0.5))
    with pytest.raises(llms.ChatError, match="no chat template and names no image token"):
        llms.build_inputs(SimpleNamespace(tokenizer=alone), [image], "what ?")
    with pytest.raises(llms.ChatError, match="no picture: the tokens of these images fill no rectangle"):
        chat.picture(image, SimpleNamespace(grids=(None,)))


def test_a_picture_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()

    def refuse(*given, **options):
        raise PermissionError

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match=r"a.png': no permission to read it"):
        load_image(tmp_path / "a.png")


def test_tiny_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "place", lambda name: tmp_path / name)
    (tmp_path / "tiny_qwen").mkdir()
    with pytest.raises(CheckpointError, match="checkpoint tiny_qwen is incomplete .*SHA256.json"):
        tiny.folder("tiny_qwen")
    (tmp_path / "tiny_qwen" / "SHA256.json").write_text('{"SHA256.json": "0123456789abcdef"}')
    with pytest.raises(CheckpointError, match="SHA256.json is damaged .its SHA-256 is not 0123456789ab…"):
        tiny.folder("tiny_qwen")
    mllm_processor.save("llava", tmp_path / "llava")
    monkeypatch.setattr(tiny, "folder", lambda name: tmp_path / "llava")
    monkeypatch.setattr("safetensors.torch.load_file", lambda path: {"strange": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"tiny_qwen does not fit this transformers: missing .* \['strange'\]"):
        checkpoints.tiny_qwen()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match="tiny_qwen needs transformers: pip install"):
        checkpoints.tiny_qwen()
