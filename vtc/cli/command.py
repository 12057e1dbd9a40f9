"""The command `vtc`. Nothing heavy is imported before the arguments are parsed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from vtc.cli.arguments import fail, parser
from vtc.cli.bench import bench, bench_serve
from vtc.cli.common import not_here, positions_given, print_json, served_method, split_names
from vtc.cli.run import run

EXTRAS = dict.fromkeys(("rich", "tqdm", "PIL", "matplotlib", "numpy"), "cli")
EXTRAS |= {"timm": "timm", "open_clip": "open-clip", "transformers": "hf", "sklearn": "eval", "skimage": "eval"}
EXTRAS |= {"gradio": "demo"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's). Returns the exit code: 1 = not supported, 2 = bad input."""
    try:
        commands = parser(_COMMANDS)
        args, rest = commands.parse_known_args(argv)
        if rest and not getattr(args, "others", False):
            commands.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
    except SystemExit as end:  # --help, --version, and invalid arguments
        return end.code if isinstance(end.code, int) else 2
    try:
        if getattr(args, "threads", None) is not None:
            import torch

            torch.set_num_threads(args.threads)
        code = args.run(args)
        sys.stdout.flush()  # a closed pipe raises here, not when Python exits
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if (message := _message(error)) is None:
            raise
        fail(message)
        return 2


def _message(error: Exception) -> str | None:
    """One line for an error that the user can do something about; None = a bug, whose traceback is needed."""
    from vtc.errors import VTCError

    if isinstance(error, VTCError):
        return str(error)
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in EXTRAS:
        package = str(error.name).partition(".")[0]
        return f'{package} is not installed, and this command needs it: pip install "vtc-torch[{EXTRAS[package]}]"'
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


# -- commands -------------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    import vtc

    data = {"methods": vtc.list_methods(), "adapters": vtc.list_adapters()}
    if not args.json:
        from vtc.cli.tables import show_names

        show_names({"Methods (--method NAME)": data["methods"], "Adapters and the models they know": data["adapters"]})
    return print_json(args, data)


def _list_models(args: argparse.Namespace) -> int:
    from vtc.models.known import known

    found = known(args.word)
    if not args.json:
        from vtc.cli.tables import show_models

        show_models(found)
    return print_json(args, found)


def _explain(args: argparse.Namespace) -> int:
    import vtc
    from vtc.errors import OptionError
    from vtc.methods import make
    from vtc.models.configs import find_config
    from vtc.models.encoders import named

    positions = positions_given(args)
    if args.method is not None:
        make(args.method, keep=1.0, **positions)  # what fails for every model is reported without loading one
    elif positions:
        raise OptionError(f"--positions {args.positions} is an option of a method: add --method NAME")
    config = find_config(args.model, download=args.download)
    if config is not None:
        return _explain_llm(args, config, positions)
    found = named(args.model, download=args.download)
    plan = vtc.explain(found.model, args.method, **positions)
    if not args.json:
        note = "\nToo large to be tried out here: only its structure was looked at." if found.sketch else ""
        sys.stdout.write(f"{plan}{note}\n")
    print_json(args, {"name": args.model, **plan.to_dict(), "tried": plan.ok and not found.sketch})
    return 0 if plan.ok else 1


def _explain_llm(args: argparse.Namespace, config: Any, positions: dict[str, Any]) -> int:
    import vtc
    from vtc.bench.estimate import estimate
    from vtc.models.configs import sketch

    model = sketch(config)
    plan = vtc.explain(model, args.method, **positions)
    cost = estimate(config, model) if plan.ok else None
    if not args.json:
        sys.stdout.write(f"{plan}\n" + (f"{cost}\n" if cost is not None else ""))
    print_json(args, {"name": args.model, **plan.to_dict(), "tried": False, "cost": cost and cost.to_dict()})
    return 0 if plan.ok else 1


# The options that each measurement takes besides --out.
_MEASURES = {
    "elpv": ("images", "levels", "dtype"),
    "photos": ("images", "levels", "dtype"),
    "spectral": ("images", "levels"),  # always in float32 or better, like the next one
    "positions": ("images", "levels"),
    "scenes": (
        "model",
        "methods",
        "keep",
        "limit",
        "seeds",
        "balances",
        "scorer",
        "frames",
        "changes",
        "split",
        "size",
        "canvas",
        "pictures",
        "full",
    ),
    "clip": ("images", "levels", "model", "methods", "split", "data", "dataset", "pretrained"),
    "retrieval": ("pages", "queries", "methods", "factors", "keep", "embeddings"),
}


def _eval(args: argparse.Namespace) -> int:
    from importlib import import_module

    for name in dict.fromkeys(name for names in _MEASURES.values() for name in names):
        if name not in _MEASURES[args.task]:
            takers = " or ".join(task for task, names in _MEASURES.items() if name in names)
            not_here(args, f"--{name}", what=f"vtc eval {takers}, not {args.task}")
    names = ("out", *_MEASURES[args.task])
    options = {key: value for key in names if (value := getattr(args, key)) is not None}
    if "methods" in options:
        options["methods"] = split_names(options["methods"], [])
    task = import_module("vtc.eval.answers" if args.task == "scenes" else f"vtc.eval.{args.task}")
    found = task.run(progress=not args.json and sys.stderr.isatty(), **options)
    if not args.json:
        sys.stdout.write(f"{found}\n" + (f"\nWritten to {options['out']}\n" if "out" in options else ""))
    return print_json(args, {"task": args.task, **found.to_dict()})


def _demo(args: argparse.Namespace) -> int:
    from vtc.demo import LAUNCH, create_demo
    from vtc.errors import OptionError

    demo, host = create_demo(), args.host or "127.0.0.1"
    try:
        _, url, _ = demo.launch(server_name=host, server_port=args.port, prevent_thread_lock=True, **LAUNCH)
    except (OSError, OverflowError, ValueError) as error:
        raise OptionError(f"--host {host}, --port {args.port or 'any'}: cannot be opened; choose others") from error
    if not args.json:
        sys.stdout.write(f"The demo is at {url} (Ctrl+C ends it)\n")
    code = print_json(args, {"url": url})
    sys.stdout.flush()
    demo.block_thread()
    return code


def _serve(args: argparse.Namespace) -> int:
    from vtc.vllm.serve import serve

    serve(args.model, served_method(args), args.positions, args.rest)
    return 0


_COMMANDS = {"run": run, "list": _list, "list-models": _list_models, "explain": _explain, "bench": bench}
_COMMANDS |= {"eval": _eval, "demo": _demo, "serve": _serve, "bench serve": bench_serve}
