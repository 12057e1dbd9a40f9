"""ZOO-Prune's sensitivity (arXiv 2509.24837): how much a small step at a token changes the projector's output."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vtc import ops
from vtc.checks import check_mask
from vtc.errors import InputError, OptionError
from vtc.scores.projector_form import in_type, own_dtype, recognize
from vtc.scores.simple import TILE, can_look
from vtc.scores.weights import put_away, unreadable

_logger = logging.getLogger(__name__)
FLAT = 1e-3


@torch.no_grad()
def sensitivity(
    projector: Any,
    inputs: Tensor,
    *,
    probes: int = 64,
    step: float = 0.01,
    exact: bool | str = "auto",
    seed: int = 0,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    hidden: Tensor | None = None,
    said: list[str] | None = None,
) -> Tensor:
    """`S_i = E_u |J(x_i) u|` over unit directions u, J the Jacobian of the projector.

    Computed in one of three ways, the first that applies:

    - The closed form `|J|_F / sqrt(V)`, about the cost of one more pass of the projector, no probes, no seed: for
      Linear - activation - Linear, also after a norm over all of a token's inputs (LLaVA, InternVL). It is the root
      mean square over u instead of the mean.
    - For mergers that normalise each of P > 1 patches (Qwen's) the same form, exact if the patches of a token have the
      same scale, otherwise approximate (see `vtc.scores.projector`); exact=True takes the exact Jacobian along the
      `probes` directions instead, which costs many passes.
    - The paper's central differences, 2 `probes` passes of the projector, for any other projector:
      `S_i = mean_j |M(x_i + h u_j) - M(x_i - h u_j)| / 2h`, the same directions for all tokens.

    Everything is float32 (float64 for float64 inputs), with autocast off, for any dtype of the projector. Central
    differences cancel digits: keep TF32 matrix products switched off in torch.

    Args:
        projector: a module that takes [B, N, V], or [B, N, P, V] with P consecutive patches to a token, or rows
            [B N P, V]; or a callable [B, N, P, V] -> [B, N, C], with the module as `module` if it has one.
        inputs: [B, N, V] or [B, N, P, V], the projector's inputs. All P patches of a token are shifted by the same u.
        probes, step: m, the number of directions, and h.
        exact: "auto"; True raises where the projector's form is unknown; False always takes central differences.
        seed: seed of the directions, drawn on the CPU so that every device has the same; `generator` takes precedence.
        mask: [B, N], True = real; padding scores 0 and may hold anything.
        hidden: [B, N, H], output of the projector's first linear map, if available; saves computing it again.
        said: a list that receives a sentence for everything that was done differently from what was requested.

    Returns:
        [B, N] float32, in units of |dz| / |dx|. All ones, with a warning, where S is flat (relative spread below 1e-3),
        as for a linear projector: the remaining differences are rounding, and a selector would rank by them.
    """
    _check(inputs, probes, step, exact)
    check_mask(mask, inputs.shape[:2])
    patches = inputs.shape[2] if inputs.ndim == 4 else None
    x = inputs if inputs.dtype == torch.float64 else inputs.float()
    if mask is not None:
        x = x.where(mask.view(*mask.shape, *[1] * (x.ndim - 2)), 0.0)
    if can_look(x) and not bool(torch.isfinite(x.sum())):  # a ReLU would hide NaN
        raise InputError("the projector's inputs hold NaN or infinity: check the images and the weights")
    with torch.autocast(x.device.type, enabled=False):
        form = None if exact is False else recognize(projector, patches, x.dtype)
        module = getattr(projector, "module", projector)
        if form is None and exact is not False:
            why = "" if put_away(module) else unreadable(module)
            why = why or f"{type(module).__name__} is not of the form [norm] - Linear - activation - Linear"
            if exact is True:
                raise OptionError(f"exact=True: {why}; exact='auto' takes central differences")
            _say(said, f"sensitivity by central differences: {why}")
        rows = x.reshape(-1, patches or 1, x.shape[-1])
        parts = list(rows.split(max(1, TILE // form.first[..., 0].numel()))) if form is not None else []
        if form is not None and (form.closed or exact == "auto"):
            at_hand = [None] * len(parts) if hidden is None else hidden.flatten(0, 1).split(len(parts[0]))
            score = torch.cat([form.frobenius(part, a) for part, a in zip(parts, at_hand, strict=True)])
        else:
            generator = generator or torch.Generator().manual_seed(seed)
            u = torch.nn.functional.normalize(_draw(probes, x.shape[-1], generator, x), dim=1)
            if form is not None:
                score = torch.cat([form.along(part, u) for part in parts])
            else:
                call = in_type(projector, x.dtype)
                step = max(step, _visible(module, x))
                score = central_differences(call, x, u[:2], step)
                # Two directions suffice to detect a linear projector; more would cost many passes for nothing.
                if not (can_look(score) and bool(_flat(score, mask).all())):
                    score = central_differences(call, x, u, step)
    return _even_out(score.view(x.shape[:2]).float(), mask, said)


def _visible(module: Any, x: Tensor) -> float:
    """The smallest step that matters to a projector with quantized weights, whose inputs are in half precision: eight
    roundings of the mean value, in every channel."""
    if put_away(module) or not unreadable(module):
        return 0.0
    return 8 * torch.finfo(own_dtype(module)).eps * float(x.abs().mean()) * x.shape[-1] ** 0.5


def _say(said: list[str] | None, what: str) -> None:
    if said is not None:
        said.append(what)


def central_differences(call: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, step: float) -> Tensor:
    """mean_j |M(x + h u_j) - M(x - h u_j)| / 2h. x [B, N, V] or [B, N, P, V], directions [m, V] -> [B, N].

    Probes are stacked along the batch, as many as fit the tile; images are not split.
    """
    total = x.new_zeros(x.shape[:2])
    chunk = max(1, TILE // max(1, 2 * x.numel()))
    for some in directions.split(chunk):
        moved = step * some.view(len(some), *[1] * (x.ndim - 1), -1)
        out = call(torch.cat([x + moved, x - moved]).flatten(0, 1)).unflatten(0, (2, len(some), len(x)))
        total += ops.probe_norms(out[0] - out[1], step) * len(some)
    return total / max(1, len(directions))


def _draw(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Normal values that depend on the generator alone, the same on every device."""
    return torch.randn(rows, columns, generator=generator, device=generator.device).to(like)


def _check(inputs: Tensor, probes: int, step: float, exact: bool | str) -> None:
    if inputs.ndim not in (3, 4) or not inputs.is_floating_point():
        raise InputError(
            f"inputs must be a float tensor [B, N, V] or [B, N, P, V], not {inputs.dtype} {tuple(inputs.shape)}"
        )
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise OptionError(f"probes={probes!r}: it takes a whole number of directions >= 1")
    if not 0 < step < float("inf"):
        raise OptionError(f"step={step!r}: it takes a length above 0")
    if exact not in (True, False, "auto"):
        raise OptionError(f"exact={exact!r}: choose 'auto', True or False")


def _flat(score: Tensor, mask: Tensor | None) -> Tensor:
    """[B, 1], True where the real tokens differ only by rounding."""
    most = score if mask is None else score.masked_fill(~mask, 0.0)
    least = score if mask is None else score.masked_fill(~mask, float("inf"))
    if not score.shape[1]:
        return score.new_ones(len(score), 1, dtype=torch.bool)
    highest = most.amax(1, keepdim=True)
    return highest - least.amin(1, keepdim=True) <= FLAT * highest


def _even_out(score: Tensor, mask: Tensor | None, said: list[str] | None = None) -> Tensor:
    """Set padding to 0, and flat images to ones; raise InputError on NaN."""
    real = torch.ones_like(score, dtype=torch.bool) if mask is None else mask
    if can_look(score) and not bool(torch.isfinite(score.where(real, 0.0)).all()):
        raise InputError("the sensitivity is NaN or infinite: check the projector's weights")
    flat = _flat(score, mask)
    if can_look(score) and bool((flat & (real.sum(1, keepdim=True) > 1)).any()):
        _warn_flat()
        _say(said, "the projector is equally sensitive to all tokens of an image: there, diversity alone")
    return score.masked_fill(flat, 1.0).where(real, 0.0)


@cache
def _warn_flat() -> None:
    _logger.warning(
        "the projector is as sensitive to one visual token as to any other (relative spread below %g), as a linear "
        "projector is: all sensitivities are set to 1, and the selection goes by diversity alone",
        FLAT,
    )
