"""What is particular to open_clip: encode_image, zero-shot classification, its odd attentions."""

import pytest
import torch
from open_clip.model import CLIP
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from zoo import model, pixels, randomise

import vtc

VISION = {"image_size": 64, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


@torch.no_grad()
def test_encode_image_and_zero_shot_classification():
    net = model("open_clip-vit")

    def tokenizer(texts):
        return torch.tensor([[1, 2 + len(text) % 40, 49, 0, 0, 0, 0, 0] for text in texts])

    def classify():
        names = build_zero_shot_classifier(
            net, tokenizer, ["a", "bcd", "efghij"], [lambda c: f"a {c}", lambda c: f"the {c} there"]
        )
        return names, net.encode_image(pixels(2), normalize=True) @ names

    names, dense = classify()
    with vtc.compress(net, "pitome", keep=0.8) as handle:
        same, scores = classify()
        assert handle.report.after == (34, 34)
        assert torch.equal(same, names)  # the text tower is left alone
        assert scores.shape == dense.shape and not torch.equal(scores, dense)
    assert torch.equal(classify()[1], dense)
    assert [encoder.path for encoder in vtc.explain(net).encoders] == ["visual"]


@torch.no_grad()
def test_size_bias_reaches_multihead_attention():
    """The fused attention with our key bias is attention with log size added to the logits, written out."""
    net = model("open_clip-vit").visual
    attn = net.transformer.resblocks[1].attn
    x, size = torch.randn(2, 9, 64), torch.rand(2, 9) * 5 + 0.5
    ours = attn(x, x, x, need_weights=False, key_padding_mask=size.log())[0]
    q, k, v = torch.nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, 4, 16)).unbind(2)
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / 4 + size.log()[:, None, None]
    expected = attn.out_proj(torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v).flatten(2))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_coca_and_trunks_are_found_once():
    assert [e.adapter for e in vtc.explain(model("open_clip-coca")).encoders] == ["open_clip"]
    trunk = vtc.explain(model("open_clip-timm-trunk")).encoders
    assert [(e.adapter, e.path) for e in trunk] == [("timm", "visual.trunk")]


def test_what_cannot_be_reduced_is_refused():
    resnet = CLIP(32, {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}, TEXT)
    assert "convolutional" in str(vtc.explain(resnet))
    with pytest.raises(vtc.UnsupportedModelError, match="convolutional"):
        vtc.compress(resnet, "tome", keep=0.9)
    cosine = randomise(CLIP(32, {**VISION, "scaled_cosine_attn": True}, TEXT))
    assert not vtc.explain(cosine).ok
