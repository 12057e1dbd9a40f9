"""Which cases of a product of parameters are run each time: enough for every pair of values; all with `make matrix`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest


def every_pair(case: Sequence[Any]) -> set[Hashable]:
    return set(combinations(enumerate(map(repr, case)), 2))


def matrix(names: str, cases: Iterable[Sequence[Any]], covers: Callable[..., set[Hashable]] = every_pair) -> Any:
    """`pytest.mark.parametrize`, with the mark `matrix` on the cases that add nothing to those before them.

    covers: what a case shows; a case runs always if it shows something that no case before it did, those that show the
    most first. The default: every pair of its values.
    """
    cases = [tuple(case) for case in cases]
    left = [(set(covers(case)), at) for at, case in enumerate(cases)]
    missing: set[Hashable] = set().union(*(shows for shows, _ in left))
    chosen = set()
    while missing:
        shows, at = max(left, key=lambda entry: (len(entry[0] & missing), -entry[1]))
        missing -= shows
        chosen.add(at)
    marked = [c if at in chosen else pytest.param(*c, marks=pytest.mark.matrix) for at, c in enumerate(cases)]
    return pytest.mark.parametrize(names.split(", "), marked)
