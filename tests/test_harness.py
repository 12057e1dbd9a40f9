"""The world's harnesses run on vtc: timm's scripts and clip_benchmark, each by its own code.

clip_benchmark is in the extra `harness`; `make harness-check` runs this file where it is installed.
"""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec

import pytest
import timm
import torch
from open_clip.model import CLIP
from PIL import Image
from zoo import randomise

import vtc
import vtc.harness.timm
from vtc.errors import OptionError

ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


needs = pytest.mark.skipif(
    find_spec("clip_benchmark") is None,
    reason="clip_benchmark is not installed (extra harness); run make harness-check",
)

# -- timm -----------------------------------------------------------------------------------------------------------

SMALL = {"img_size": 64, "num_classes": 5, "depth": 3, "embed_dim": 48, "num_heads": 3}

# What timm's validate.py does, with timm's own parts; TIMM_VALIDATE names the real one.
SCRIPT = """
import argparse
import timm, torch
from timm.data import create_dataset, create_loader
from timm.models import load_checkpoint
from timm.utils import ParseKwargs, accuracy
parser = argparse.ArgumentParser()
for name in ("--model", "--checkpoint", "--device", "-b", "-j", "--img-size"):
    parser.add_argument(name)
parser.add_argument("data")
parser.add_argument("--num-classes", type=int)
parser.add_argument("--no-prefetcher", action="store_true")
parser.add_argument("--model-kwargs", nargs="*", action=ParseKwargs)
args = parser.parse_args()
model = timm.create_model(args.model, num_classes=args.num_classes, scriptable=False, **args.model_kwargs).eval()
load_checkpoint(model, args.checkpoint)
size = (3, int(args.img_size), int(args.img_size))
loader = create_loader(create_dataset("", args.data), size, 8, use_prefetcher=False, num_workers=0)
with torch.inference_mode():
    top = [accuracy(model(images), target)[0].item() * len(target) for images, target in loader]
print(f"Acc@1 {sum(top) / 20:.3f}")
"""


def picture(seed):
    noise = torch.rand(9, 8, 3, generator=torch.Generator().manual_seed(seed)).mul(255).byte()
    return Image.fromarray(noise.numpy()).resize((64, 72))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """20 pictures in 5 folders, and the weights of a small DeiT."""
    folder = tmp_path_factory.mktemp("timm")
    for number in range(20):
        (folder / "data" / "abcde"[number % 5]).mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / "data" / "abcde"[number % 5] / f"{number}.png")
    model = randomise(timm.create_model("deit_tiny_patch16_224", **SMALL))
    torch.save(model.state_dict(), folder / "deit.pth")
    (folder / "validate.py").write_text(SCRIPT)
    return folder


def validate(folder, *arguments):
    script = os.environ.get("TIMM_VALIDATE", folder / "validate.py")
    command = [sys.executable, "-m", "vtc.harness.timm", script, folder / "data", "--checkpoint", folder / "deit.pth"]
    command += [
        "--num-classes",
        "5",
        "--device",
        "cpu",
        "--img-size",
        "64",
        "-b",
        "8",
        "-j",
        "0",
        "--no-prefetcher",
        *arguments,
    ]
    command += [f"{key}={value}" for key, value in SMALL.items() if key != "num_classes"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENV, timeout=300)


def accuracy(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return float((done.stdout + done.stderr).split("Acc@1")[-1].split()[0])


def test_timm_entry():
    """The same weights, fewer tokens; what begins with vtc_ is the method's."""
    model = timm.create_model("vtc", vtc_model="deit_tiny_patch16_224", vtc_method="tome", vtc_keep=0.5, **SMALL).eval()
    plain = timm.create_model("deit_tiny_patch16_224", **SMALL).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        less = model(x)
        vtc.remove(model)
        assert torch.equal(model(x), plain(x)) and not torch.equal(less, plain(x))
        with vtc.compress(plain, "tome", keep=0.5):
            assert torch.equal(plain(x), less)


def test_timm_entry_refuses():
    for options, message in (
        ({"vtc_method": "tome", "vtc_keep": 0.5}, "vtc_model=None"),
        ({"vtc_model": "deit_tiny_patch16_224"}, "method=None"),
        ({"vtc_model": "deit_tiny_patch16_224", "vtc_method": "tone", "vtc_keep": 0.5}, "did you mean 'tome'"),
        ({"vtc_model": "deit_tiny_patch16_224", "vtc_method": "tome", "vtc_keep": 2.5}, "keep"),
    ):
        with pytest.raises(OptionError, match=message):
            timm.create_model("vtc", **options, **SMALL)
    with pytest.raises(vtc.UnsupportedModelError):
        timm.create_model("vtc", vtc_model="resnet18", vtc_method="tome", vtc_keep=0.5)


@pytest.mark.slow
def test_timm_validates(classes, capsys, monkeypatch):
    """timm's script on a folder of images, from its command line: at keep=1 the dense model's accuracy."""
    kwargs = ("vtc_model=deit_tiny_patch16_224", "vtc_method=tome")
    dense = accuracy(validate(classes, "--model", "deit_tiny_patch16_224", "--model-kwargs"))
    assert accuracy(validate(classes, "--model", "vtc", "--model-kwargs", *kwargs, "vtc_keep=1.0")) == dense
    done = validate(classes, "--model", "vtc", "--model-kwargs", *kwargs, "vtc_kept=0.5")
    assert done.returncode and "tome has no option 'kept'" in done.stderr
    monkeypatch.setattr(sys, "argv", ["vtc.harness.timm", "nowhere.py"])
    assert vtc.harness.timm.main() == 2 and "usage" in capsys.readouterr().err


# -- clip_benchmark -------------------------------------------------------------------------------------------------

CLIP_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
NAMES = ["red", "green", "blue", "yellow", "grey"]


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """A CLIP with random weights, large ones, so that its answers differ from picture to picture."""
    folder, generator = tmp_path_factory.mktemp("clip"), torch.Generator().manual_seed(0)
    weights = CLIP(**CLIP_CONFIG).state_dict()
    for weight in weights.values():
        if weight.ndim > 1:
            weight.normal_(std=2 * weight[0].numel() ** -0.5, generator=generator)
    weights["visual.class_embedding"].zero_()
    weights["visual.positional_embedding"].mul_(0.3)
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": PREPROCESS}))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """20 pictures of 5 classes as a webdataset."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "test").mkdir()
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} thing\n{c}")
    (folder / "test" / "nshards.txt").write_text("1")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number in range(20):
            data = io.BytesIO()
            picture(number).save(data, "PNG")
            for name, content in ((f"{number:04}.png", data.getvalue()), (f"{number:04}.cls", b"%d" % (number % 5))):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return folder


def by_hand(name, method=None):
    """Logits of the 20 pictures, with open_clip alone."""
    import open_clip

    net, _, transform = open_clip.create_model_and_transforms(name)
    net.eval()
    tokenizer = open_clip.get_tokenizer(name)
    unit = torch.nn.functional.normalize
    with torch.no_grad():
        texts = [unit(net.encode_text(tokenizer([f"a {c} thing", c])), dim=-1).mean(0) for c in NAMES]
        if method is not None:
            vtc.compress(net, method)
        images = unit(net.encode_image(torch.stack([transform(picture(i)) for i in range(20)])), dim=-1)
    return images @ unit(torch.stack(texts), dim=-1).T


@needs
@pytest.mark.filterwarnings("ignore")
def test_clip_benchmark(clip_model, shards, tmp_path):
    """The rows hold what open_clip gives by hand; batches do not matter."""
    from vtc.eval import clip

    found = clip.run(shards, clip_model, methods=("tome", "downsample"), levels=(0.6,), out=tmp_path, batch=7)
    dense = by_hand(clip_model).argmax(1)
    target = torch.arange(20) % 5
    assert len(dense.unique()) > 1  # else nothing here says anything
    for row, method in zip(found.rows, (None, vtc.ToMe(flops=0.6), vtc.Downsample(flops=0.6)), strict=True):
        logits = by_hand(clip_model, method)
        right = logits.argmax(1) == target
        assert row["images"] == 20 and row["acc1"] == pytest.approx(right.double().mean().item())
        recall = [right[target == c].double().mean().item() for c in range(5)]
        assert row["mean_per_class_recall"] == pytest.approx(sum(recall) / 5) and row["acc5"] == 1
        assert row["fidelity"] == (logits.argmax(1) == dense).double().mean().item()
    assert found.rows[1]["macs_saved"] == pytest.approx(0.4, abs=0.05)
    with (tmp_path / "clip.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["dense", "tome", "downsample"]
    assert (tmp_path / "clip.png").stat().st_size > 5_000
    few = clip.run(shards, clip_model, methods=("tome",), levels=(0.6,), images=9, batch=4)
    assert [row["images"] for row in few.rows] == [9, 9]


@needs
@pytest.mark.filterwarnings("ignore")
def test_clip_benchmark_refuses(clip_model, shards, tmp_path):
    from vtc.eval import clip

    for options, message in (
        ({"data": tmp_path / "nowhere"}, "no such folder"),
        ({"data": ""}, "no such folder"),
        ({"split": "train"}, "no train split"),
        ({"dataset": "cifar10"}, "finds no test split of cifar10"),
        ({"model": "ViT-B-32"}, "without weights"),
        ({"model": "local-dir:/nowhere"}, "open_clip cannot load it"),
        ({"methods": ("tone",)}, "did you mean 'tome'"),
        ({"levels": (2.0,)}, "levels"),
        ({"images": 0}, "images=0"),
    ):
        with pytest.raises(OptionError, match=message):
            clip.run(**{"data": shards, "model": clip_model, "levels": (0.5,), **options})
    with pytest.raises(vtc.UnsupportedModelError, match="idpruner is for multimodal LLMs"):
        clip.run(shards, clip_model, methods=("idpruner",))


@needs
def test_several_labels_per_image():
    from sklearn.metrics import average_precision_score

    from vtc.eval.clip import score

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 4, generator=generator)
    target = (torch.rand(30, 4, generator=generator) < 0.4).long()
    wanted = average_precision_score(target, logits, average="macro")
    assert score(logits, target) == {"mean_average_precision": pytest.approx(wanted, rel=1e-5)}


@needs
def test_clip_command(clip_model, shards):
    command = [sys.executable, "-W", "ignore", "-m", "vtc", "eval", "clip", "--data", str(shards)]
    command += ["--model", clip_model, "--methods", "tome", "--levels", "0.5", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["method"] for row in json.loads(done.stdout)["rows"]] == ["dense", "tome"]


@pytest.mark.skipif(find_spec("clip_benchmark") is not None, reason="clip_benchmark is installed")
def test_without_clip_benchmark(tmp_path):
    from vtc.eval import clip
    from vtc.eval.common import MissingDataError

    with pytest.raises(MissingDataError, match="harness"):
        clip.run(tmp_path, pretrained="openai")
