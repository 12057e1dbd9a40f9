"""The trained scorer of VisionSelector, which IDPruner reads too (arXiv 2602.13315), and its soft top-k.

    w_i = mean_j q_i . k_j / sqrt(h),   q = Wq x + bq,   k = Wk x + bk

Weights are in vtc's own file format: safetensors with the tensors `query.weight` [h, D], `query.bias` [h], `key.weight`
[h, D], `key.bias` [h] and metadata (format, version, model). vtc does not know the tensor names of published
checkpoints: rename their tensors and write them with `save_scorer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtc.checks import check_mask
from vtc.errors import InputError, OptionError

FORMAT, VERSION = "vtc-selector", 1
MAX_BYTES = 1 << 30  # the largest published scorer, 4096 x 2048 twice in float32, is 64 MiB
_DTYPES = ("F64", "F32", "F16", "BF16")


class Scorer(nn.Module):
    """Scores every visual token by its mean product with all of them. No softmax, no text, no N x N matrix.

    Args:
        width: D, the width of the LLM's input; hidden: h.
        model: the name of the model it was trained for, kept in the file and in messages.
    """

    def __init__(self, width: int, hidden: int, model: str = "") -> None:
        super().__init__()
        self.width, self.hidden, self.model = width, hidden, model
        self.query = nn.Linear(width, hidden)
        self.key = nn.Linear(width, hidden)

    def score(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Raw scores w. [B, N, D], mask [B, N] True = real -> [B, N] float32; padding gets 0 and has no influence.

        Both maps are linear, so the mean is taken first: O(N D + D h) instead of O(N D h).
        """
        if features.ndim != 3 or features.shape[-1] != self.width:
            of = f" (trained for {self.model})" if self.model else ""
            raise InputError(f"the scorer{of} reads [B, N, {self.width}], the features are {tuple(features.shape)}")
        check_mask(mask, features.shape[:2])
        with torch.autocast(features.device.type, enabled=False):
            x = features.float()
            if mask is not None:
                x = x.where(mask[..., None], 0.0)
            real = x.new_ones(x.shape[:2]) if mask is None else mask
            mean = x.sum(1) / real.sum(1, keepdim=True).clamp(min=1)
            key = mean @ self.key.weight.to(x).mT + self.key.bias.to(x)  # [B, h]
            along = key @ self.query.weight.to(x)  # [B, D]
            score = ((x @ along[..., None])[..., 0] + key @ self.query.bias.to(x)[:, None]) / self.hidden**0.5
        return score if mask is None else score.where(mask, 0.0)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.score(features, mask)


def diff_top_k(w: Tensor, keep: float | int, mask: Tensor | None = None) -> Tensor:
    """VisionSelector's DiffTopK: weights `sigmoid(w_i + t)` that sum to the budget, differentiable in w.

    t comes from 64 bisection steps. Its derivative is that of the constraint `sum_i s(w_i + t) = K`, which is
    `dt/dw_i = -s'_i / sum_j s'_j`; one Newton step at the root, which does not change t, provides this derivative.

    Args:
        w: [B, N] scores.
        keep: a fraction in (0, 1] of the real tokens, or a count. K is kept 1e-4 away from 0 and from all.
        mask: [B, N], True = real; padding weighs 0.

    Returns:
        [B, N] in [0, 1], float32 (float64 for float64 scores). Monotone in w.
    """
    if isinstance(keep, bool) or not (0 < keep <= 1 if isinstance(keep, float) else keep >= 1):
        raise OptionError(f"keep={keep!r}: it takes a fraction in (0, 1] or a whole number of tokens >= 1")
    check_mask(mask, w.shape)
    w = w if w.dtype == torch.float64 else w.float()
    real = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    count = real.sum(1, keepdim=True).to(w.dtype)
    wanted = keep * count if isinstance(keep, float) else torch.full_like(count, keep)
    wanted = torch.minimum(wanted.clamp(min=1e-4), count - 1e-4)

    def weigh(t: Tensor) -> Tensor:
        return torch.sigmoid(w + t).where(real, 0.0)

    with torch.no_grad():
        # With a margin of 20 a sigmoid is within 1e-8 of its limits, so the root lies inside for any budget.
        low = -w.masked_fill(~real, float("-inf")).amax(1, keepdim=True) - 20
        high = -w.masked_fill(~real, float("inf")).amin(1, keepdim=True) + 20
        low, high = low.nan_to_num(posinf=0.0), high.nan_to_num(neginf=0.0)  # an image that is all padding
        for _ in range(64):
            t = (low + high) / 2
            above = weigh(t).sum(1, keepdim=True) > wanted
            low, high = torch.where(above, low, t), torch.where(above, t, high)
        s = weigh((low + high) / 2)
        slope = (s * (1 - s)).sum(1, keepdim=True).clamp(min=1e-12)
    t = (low + high) / 2
    total = weigh(t).sum(1, keepdim=True)
    return weigh(t - (total - total.detach()) / slope)


def save_scorer(scorer: Scorer, path: str | Path) -> None:
    """Write the weights as safetensors, with the format, its version and the model's name in the metadata."""
    metadata = {"format": FORMAT, "version": str(VERSION), "model": scorer.model}
    tensors = {name: tensor.detach().contiguous() for name, tensor in scorer.state_dict().items()}
    _safetensors().torch.save_file(tensors, str(path), metadata=metadata)


def load_scorer(path: str | Path) -> Scorer:
    """Read what `save_scorer` wrote. Nothing in the file is executed: any other format is refused, pickles too."""
    path = Path(path)
    if not path.is_file():
        raise OptionError(f"{path}: there is no such file; a scorer is a file that vtc.scores.save_scorer wrote")
    if path.stat().st_size > MAX_BYTES:
        raise OptionError(f"{path} has {path.stat().st_size} bytes; a scorer has at most {MAX_BYTES}")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            scorer = _described(path, file)
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise OptionError(f"{path} is no safetensors file ({error}); no other format is read") from None
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: tensor {name!r} holds NaN or infinity")
    scorer.load_state_dict(tensors, assign=True)
    return scorer.requires_grad_(False).eval()


def _described(path: Path, file: Any) -> Scorer:
    """An empty scorer with the sizes in the header, or OptionError, before any tensor is read."""
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise OptionError(
            f"{path}: the metadata says format {metadata.get('format')!r}, not {FORMAT!r}: load the tensors yourself, "
            "put them into vtc.scores.Scorer and write it with save_scorer"
        )
    if metadata.get("version") != str(VERSION):
        raise OptionError(f"{path} is of version {metadata.get('version')!r}, this vtc reads {VERSION}: update vtc")
    header = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    shapes = {name: tuple(part.get_shape()) for name, part in header.items()}
    hidden, width = shapes.get("query.weight", (0, 0)) if len(shapes.get("query.weight", (0, 0))) == 2 else (0, 0)
    if not hidden or not width:
        raise OptionError(f"{path}: tensor 'query.weight' is {shapes.get('query.weight', 'missing')}, expected [h, D]")
    with torch.device("meta"):
        scorer = Scorer(width, hidden, metadata.get("model", ""))
    expected = {name: tuple(tensor.shape) for name, tensor in scorer.state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in expected:
            raise OptionError(f"{path}: tensor {name!r} does not belong to a scorer ({', '.join(expected)})")
        if shapes.get(name) != expected[name]:
            raise OptionError(f"{path}: tensor {name!r} is {shapes.get(name, 'missing')}, expected {expected[name]}")
        if header[name].get_dtype() not in _DTYPES:
            raise OptionError(f"{path}: tensor {name!r} is {header[name].get_dtype()}, expected a float type")
    return scorer


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise OptionError("files of scorers need safetensors: pip install 'vtc-torch[hf]'") from None
    return safetensors
