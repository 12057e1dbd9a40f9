"""`python -m vtc.train`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vtc.errors import OptionError, VTCError
from vtc.scores.scorer import save_scorer
from vtc.train.data import open_examples
from vtc.train.loop import train_scorer
from vtc.train.selection import SELECTIONS


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m vtc.train`. Returns the exit code: 2 = bad input."""
    from vtc.cli.arguments import _Parser, count, fail, fraction

    parser = _Parser(prog="python -m vtc.train", description="Train IDPruner's scorer for a multimodal LLM.")
    add = parser.add_argument
    lines = '{"image": path or paths, "prompt": text, "answer": text}'
    add("--model", required=True, metavar="PATH_OR_ID", help="a multimodal LLM: a folder, or an id on the Hub")
    add("--data", required=True, type=Path, metavar="JSONL", help=f"lines of {lines}; paths as seen from its folder")
    add("--out", required=True, type=Path, metavar="SAFETENSORS", help="where the scorer goes")
    add("--keep", type=fraction, default=0.2, metavar="Q", help="fraction of the tokens to train for (default: 0.2)")
    add("--steps", type=count, default=1000, metavar="N", help="default: 1000")
    add("--accumulate", type=count, default=8, metavar="N", help="examples per step (default: 8)")
    add("--lr", type=float, default=1e-4, metavar="RATE", help="default: 1e-4")
    add(
        "--selection",
        choices=SELECTIONS,
        default="soft",
        help="weigh all, or hide some (default: soft)",
    )
    add("--hidden", type=count, metavar="N", help="width of the scorer's maps (default: half the decoder's)")
    add("--seed", type=int, default=0, metavar="N", help="of the first weights and the order of the data")
    add("--checkpoint", type=Path, metavar="SAFETENSORS", help="saved now and then; training goes on from it")
    add("--save-every", type=count, default=100, metavar="N", help="steps between checkpoints (default: 100)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: as the weights were saved")
    add("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, ...")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    try:
        return _command(parser.parse_args(argv))
    except SystemExit as end:  # --help, and invalid arguments
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except (VTCError, ImportError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return 2


def _command(args: argparse.Namespace) -> int:
    from vtc.methods import IDPruner

    for path in (args.out, args.checkpoint):
        if path is not None and not path.absolute().parent.is_dir():
            raise OptionError(f"{path.parent}: no such folder to write {path.name} to")
    more = {name: getattr(args, name) for name in ("dtype", "device", "trust_remote_code")}
    model, data = open_examples(args.model, args.data, IDPruner(keep=args.keep, importance="norm"), args.seed, **more)
    losses = list[float]()
    options = ("keep", "steps", "accumulate", "lr", "selection", "hidden", "seed", "checkpoint", "save_every")
    given = {name: getattr(args, name) for name in options}
    save_scorer(train_scorer(model, data, on_step=lambda _, loss: losses.append(loss), **given), args.out)
    part = max(1, len(losses) // 10)
    trend = f"loss {sum(losses[:part]) / part:.4f} -> {sum(losses[-part:]) / part:.4f}, " if losses else ""
    sys.stdout.write(f"{len(losses)} step{'s' * (len(losses) != 1)}, {trend}written to {args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
