"""Code shared by several commands."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any


def positions_given(args: argparse.Namespace) -> dict[str, Any]:
    """The method's option `positions`, if it was given."""
    from vtc.errors import OptionError
    from vtc.positions import PPE

    if args.slots is None:
        return {} if args.positions is None else {"positions": args.positions}
    if args.positions != "ppe":
        raise OptionError(f"--slots {args.slots} says how many positions PPE carries: add --positions ppe")
    return {"positions": PPE(args.slots)}


def served_method(args: argparse.Namespace) -> Any:
    """The method that a server runs."""
    from vtc.methods import make

    options = {} if args.importance is None else {"importance": args.importance}
    return make(args.method, keep=args.tokens if args.keep is None else args.keep, **options)


def split_names(given: list[str] | None, default: list[str]) -> list[str]:
    """Names separated by spaces or commas."""
    return [name.strip() for part in given or default for name in part.split(",") if name.strip()]


def not_here(args: argparse.Namespace, *options: str, what: str) -> None:
    """Raise OptionError if one of `options`, which apply only to `what`, was given."""
    from vtc.errors import OptionError

    for option in options:
        if getattr(args, option[2:].replace("-", "_")) not in (None, False):
            raise OptionError(f"{option} is for {what}")


def progress_bar(args: argparse.Namespace, total: int, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="run", leave=False, disable=True if args.json else None)  # None: no TTY


def print_json(args: argparse.Namespace, data: dict[str, Any]) -> int:
    if args.json:
        # JSON has neither NaN nor infinity: they become null
        text = json.dumps(
            json.loads(json.dumps(data, default=asdict), parse_constant=lambda name: None), indent=2, ensure_ascii=False
        )
        sys.stdout.write(text + "\n")
    return 0
