"""Which tokens of an image stay, and what they become: vtc's deciding floor on the rows that a tower of vLLM made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vtc.checks import check_finite
from vtc.decide import Units, decide
from vtc.errors import InputError
from vtc.layout import Grid, Unit
from vtc.methods.base import Method
from vtc.token_map import TokenMap


def reduce(
    method: Method,
    images: Sequence[Tensor],
    kept: Sequence[int],
    grids: Sequence[Grid | None],
    width: int,
    evidence: Sequence[Mapping[str, Tensor]] = (),
    agreed: Callable[[TokenMap], TokenMap] = lambda token_map: token_map,
) -> list[tuple[Tensor, Tensor]]:
    """The tokens that stay of every image, and which they are.

    Args:
        images: of every image its tokens [n, C], of which the first `width` channels are read (behind them are
            DeepStack's planes, which are reduced alike).
        kept: how many tokens of each stay.
        evidence: of every image the other fields of `Tokens` that the method reads, [n] or [n, D].
        agreed: makes of a decision the one that all processes of a model take.

    Returns:
        For every image [k, C], rows or means of rows, and [k] long, their places among the n, ascending.

    Raises:
        InputError: not finite, or another number of tokens than announced to the scheduler.
    """
    rows = torch.cat(list(images))
    check_finite(rows, "image tokens")
    starts = torch.tensor([0, *map(len, images)]).cumsum(0).tolist()
    units = Units(
        rows[:, :width],
        [Unit(torch.arange(starts[i], starts[i + 1]), i, grids[i]) for i in range(len(images))],
    )
    gone = [len(image) - k for image, k in zip(images, kept, strict=True)]
    if not any(gone):
        return [(image, torch.arange(len(image), device=image.device)) for image in images]
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        even = len(set(units.lengths)) == 1 and len(set(gone)) == 1
        fields = {name: units.packed(torch.cat([each[name] for each in evidence])) for name in (evidence or [{}])[0]}
        removed = gone[0] if even else torch.tensor(gone, device=rows.device)
        token_map = agreed(decide(method, units.tokens(method, **fields), removed))
        packed = units.packed(rows)
        small = token_map.merge(packed).to(rows.dtype) if method.merges else token_map.gather(packed)
    found = []
    for i, (image, k) in enumerate(zip(images, kept, strict=True)):
        stays = token_map.anchor[i] >= 0
        places = token_map.anchor[i][stays]
        if len(places) != k:
            raise InputError(
                f"{method.name} kept {len(places)} of {len(image)} tokens, not the {k} that were announced"
            )
        whole = len(image) == k
        found.append((image if whole else small[i][stays], places))
    return found
