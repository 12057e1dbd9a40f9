"""The command `vtc`: run, list, explain, bench, eval. Nothing heavy is imported before the arguments are understood."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

EXTRAS = dict.fromkeys(("rich", "tqdm", "PIL", "matplotlib", "numpy"), "cli")
EXTRAS |= {"timm": "timm", "open_clip": "open-clip", "transformers": "hf", "sklearn": "eval", "skimage": "eval"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's). Returns the exit code: 1 = not supported, 2 = bad input."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as end:  # --help, --version, and arguments that make no sense
        return end.code if isinstance(end.code, int) else 2
    try:
        if getattr(args, "threads", None) is not None:
            import torch

            torch.set_num_threads(args.threads)
        code = args.run(args)
        sys.stdout.flush()  # a closed pipe shows here, not when Python ends
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if (message := _message(error)) is None:
            raise
        _fail(message)
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


def _fail(message: str) -> None:
    sys.stderr.write("vtc: error: " + " ".join(message.split()) + "\n")


# -- commands -------------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    from vtc.bench.environment import environment
    from vtc.errors import OptionError
    from vtc.images import example_photo, load_image, preprocess
    from vtc.methods import make
    from vtc.viz import check_target, save

    options: dict[str, Any] = {"keep": args.tokens if args.keep is None else args.keep, "flops": args.flops}
    if options == {"keep": None, "flops": None}:
        options["flops"] = 0.5
    if args.preset is not None:
        options["preset"] = args.preset
    method = make(args.method, **{key: value for key, value in options.items() if value is not None})
    if args.keep is not None and args.keep < 0.5 and not method.one_shot:
        raise OptionError(f"--keep {args.keep:g}: every layer keeps at least half; give --tokens N or --flops F")
    if args.size % 14:
        near = max(14, 14 * round(args.size / 14))
        raise OptionError(f"--size {args.size}: the model's patches are 14 pixels wide, give a multiple such as {near}")
    out = check_target(args.out)
    path = args.image or str(example_photo())
    photo = load_image(path)
    pixels = preprocess(photo, args.size)
    with _bar(args, 2 * (args.repeats + 1), "loading the model") as bar:
        from PIL import ImageOps

        from vtc.bench.photo import compare, picture
        from vtc.checkpoints import dinov2_saliency

        model = dinov2_saliency()
        bar.set_description("dense and compressed in turns")
        found = compare(model, pixels, method, args.repeats, tick=bar.update)
    square = ImageOps.fit(photo, (min(photo.size),) * 2)
    save(picture(square, found, (args.size // 14,) * 2), out)
    about = {"image": path, "size": args.size, "model": "DINOv2 ViT-S/14 with a saliency decoder"}
    result = {**about, **found.to_dict(), "picture": str(out)}
    result["environment"] = environment(batch=1, dtype="float32", repeats=args.repeats)
    if not args.json:
        from vtc.bench.tables import show_run

        show_run(found, result)
    return _json(args, result)


def _list(args: argparse.Namespace) -> int:
    import vtc

    data = {"methods": vtc.list_methods(), "adapters": vtc.list_adapters()}
    if not args.json:
        from vtc.bench.tables import show_names

        show_names({"Methods (--method NAME)": data["methods"], "Adapters and the models they know": data["adapters"]})
    return _json(args, data)


def _explain(args: argparse.Namespace) -> int:
    import vtc
    from vtc.bench.models import named
    from vtc.methods import make

    if args.method is not None:
        make(args.method, keep=1.0)  # an unknown method needs no model
    found = named(args.model, download=args.download)
    plan = vtc.explain(found.model, args.method)
    if not args.json:
        note = "\nToo large to be tried out here: only its structure was looked at." if found.sketch else ""
        sys.stdout.write(f"{plan}{note}\n")
    _json(args, {"name": args.model, **plan.to_dict(), "tried": plan.ok and not found.sketch})
    return 0 if plan.ok else 1


def _bench(args: argparse.Namespace) -> int:
    import torch

    from vtc.bench import environment, measure, named, runs
    from vtc.errors import OptionError
    from vtc.methods import make

    methods = [make(name.strip(), flops=args.flops) for name in args.methods.split(",")]
    found = named(args.model, args.size)
    if found.sketch:
        raise OptionError(f"--model {args.model}: too large to be run with random weights; choose a smaller one")
    pixels = torch.randn((args.batch, 3, found.size, found.size), generator=torch.Generator().manual_seed(0))
    with _bar(args, runs(len(methods), args.repeats, args.warmup), "dense and compressed in turns") as bar:
        rows = measure(found.model, pixels, methods, args.repeats, args.warmup, call=found.call, tick=bar.update)
    stamp = environment(batch=args.batch, image_size=found.size, dtype="float32", repeats=args.repeats)
    result = {"model": args.model, "flops": args.flops, "rows": [row.to_dict() for row in rows], "environment": stamp}
    if not args.json:
        from vtc.bench.tables import show_bench

        show_bench(rows, result)
    return _json(args, result)


def _eval(args: argparse.Namespace) -> int:
    from importlib import import_module

    if args.task == "spectral" and args.dtype is not None:
        from vtc.errors import OptionError

        raise OptionError(f"--dtype {args.dtype}: the spectrum is always computed in float32 and float64; leave it out")
    given = ("images", "out", "levels", "dtype")
    options = {key: getattr(args, key) for key in given if getattr(args, key) is not None}
    task = import_module(f"vtc.eval.{args.task}")
    found = task.run(progress=not args.json and sys.stderr.isatty(), **options)
    if not args.json:
        sys.stdout.write(f"{found}\n" + (f"\nWritten to {args.out}\n" if args.out else ""))
    return _json(args, {"task": args.task, **found.to_dict()})


def _bar(args: argparse.Namespace, total: int, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="run", leave=False, disable=True if args.json else None)  # None: no TTY


def _json(args: argparse.Namespace, data: dict[str, Any]) -> int:
    if args.json:
        # JSON knows neither NaN nor infinity: they become null
        text = json.dumps(json.loads(json.dumps(data), parse_constant=lambda name: None), indent=2, ensure_ascii=False)
        sys.stdout.write(text + "\n")
    return 0


# -- arguments ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number: give a fraction such as 0.9, what stays")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: give a fraction above 0 and at most 1, what stays")
    return value


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: give a whole number of at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    from vtc import __version__

    parser = _Parser(
        prog="vtc",
        description="Fewer visual tokens for the vision encoders you already have.",
        epilog="Example: vtc run --image photo.jpg --method tome --flops 0.6\nEvery command has its own --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vtc {__version__}")
    parser.set_defaults(run=lambda args: sys.stdout.write(parser.format_help()) and 0)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable, brief: str, text: str, example: str) -> argparse.ArgumentParser:
        words: dict[str, Any] = {"help": brief, "description": text, "epilog": f"Example: {example}"}
        added = commands.add_parser(name, **words, formatter_class=argparse.RawDescriptionHelpFormatter)
        added.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        if name in ("run", "bench"):
            added.add_argument("--threads", type=_count, metavar="N", help="processor threads (default: as torch says)")
        added.set_defaults(run=run)
        return added

    add = command(
        "run",
        _run,
        "compress a real encoder on a photograph",
        "Sends a photograph through DINOv2 ViT-S/14 (real weights, no network) as it is and with fewer tokens.\n"
        "Prints tokens, multiply-adds, time and how near the features stay, and draws a picture of it.",
        "vtc run --image photo.jpg --method tome --keep 0.9 --out tome.png",
    ).add_argument
    add("--image", metavar="PATH", help="a photograph, its central square is used (default: one that comes along)")
    add("--method", default="pitome", metavar="NAME", help="see `vtc list` (default: %(default)s)")
    one = commands.choices["run"].add_mutually_exclusive_group().add_argument
    one("--keep", type=_fraction, metavar="Q", help="fraction of the tokens that every layer keeps; 1 = all")
    one("--tokens", type=_count, metavar="N", help="number of image tokens left at the end")
    one("--flops", type=_fraction, metavar="F", help="fraction of the arithmetic that remains (default: 0.5)")
    add("--preset", metavar="NAME", help="a preset of PiToMe")
    add("--size", type=_count, default=224, metavar="PX", help="side of the image in pixels (default: %(default)s)")
    add("--out", default="vtc-run.png", metavar="PNG", help="the picture to write (default: %(default)s)")
    add("--repeats", type=_count, default=5, metavar="N", help="timed runs of each (default: %(default)s)")

    command("list", _list, "methods and model families", "Lists the methods and the model families.", "vtc list --json")
    models = "dinov2-small, timm:NAME, open_clip:NAME or hf:FOLDER_OR_ID"
    add = command(
        "explain",
        _explain,
        "say what would be patched in a model, or why not",
        "Says which layers of a model would get fewer tokens, and what cannot and why. Loads no weights.\n"
        "Ends with 0 if the model can be compressed and with 1 if not.",
        "vtc explain --model timm:vit_base_patch16_224 --method pitome",
    ).add_argument
    add("--model", required=True, metavar="NAME", help=models)
    add("--method", metavar="NAME", help="also ask whether this method fits (see `vtc list`)")
    add("--download", action="store_true", help="let Hugging Face fetch a configuration that is not here yet")

    add = command(
        "bench",
        _bench,
        "measure the speed-up on this machine",
        "Runs a model dense and compressed in turns and compares the speed-up with what the multiply-adds promise.\n"
        "Also measures what a patched model costs that keeps all its tokens.",
        "vtc bench --methods tome,pitome --batch 16 --size 224",
    ).add_argument
    add("--model", default="dinov2-small", metavar="NAME", help=f"{models}; all but the first with random weights")
    add("--methods", default="tome,pitome", metavar="A,B", help="methods, with commas (default: %(default)s)")
    add("--flops", type=_fraction, default=0.55, metavar="F", help="fraction of the arithmetic left (default: 0.55)")
    add("--batch", type=_count, default=16, metavar="N", help="images at once (default: %(default)s)")
    add("--size", type=_count, metavar="PX", help="side of the images (default: the model's own; 224 for dinov2-small)")
    add("--repeats", type=_count, default=9, metavar="N", help="rounds that count (default: %(default)s)")
    add("--warmup", type=_count, default=2, metavar="N", help="rounds before that (default: %(default)s)")

    add = command(
        "eval",
        _eval,
        "measure what compression costs in quality",
        "elpv      accuracy of a linear probe and of nearest neighbours on real images of solar cells\n"
        "photos    how near the features of real photographs stay to the dense ones\n"
        "spectral  how much the token graph's spectrum changes, layer by layer",
        "vtc eval elpv --images 200 --out results",
    ).add_argument
    add("task", choices=("elpv", "photos", "spectral"), help="what to measure")
    add("--images", type=_count, metavar="N", help="how many images (default: all, or what is enough)")
    add("--levels", type=_fraction, nargs="+", metavar="F", help="fractions of the multiply-adds that remain")
    add("--dtype", choices=("float32", "bfloat16"), help="of the model (default: float32)")
    add("--out", metavar="FOLDER", help="write CSV, table and figure there (default: only print)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
