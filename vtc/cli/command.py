"""The command `vtc`. Nothing heavy is imported before the arguments are understood."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vtc.cli.arguments import fail, parser

EXTRAS = dict.fromkeys(("rich", "tqdm", "PIL", "matplotlib", "numpy"), "cli")
EXTRAS |= {"timm": "timm", "open_clip": "open-clip", "transformers": "hf", "sklearn": "eval", "skimage": "eval"}
EXTRAS |= {"gradio": "demo"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's). Returns the exit code: 1 = not supported, 2 = bad input."""
    try:
        args = parser(_COMMANDS).parse_args(argv)
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


_OF_ENCODERS = ("--flops", "--size")
_OF_LLMS = (
    "--prompt",
    "--where",
    "--pooled",
    "--positions",
    "--slots",
    "--max-new-tokens",
    "--dtype",
    "--device",
    "--trust-remote-code",
)


def _run(args: argparse.Namespace) -> int:
    return _run_encoder(args) if args.model in (None, "dinov2-small") else _run_llm(args)


def _run_llm(args: argparse.Namespace) -> int:
    from vtc.bench.environment import environment
    from vtc.methods import make
    from vtc.models.images import example_photo, load_image

    _not_here(args, *_OF_ENCODERS, what="an encoder alone, without --model")
    given = {"preset": args.preset, "where": args.where, "pooled": args.pooled or None, **_positions(args)}
    given["keep"] = args.tokens if args.tokens is not None else args.keep or 0.25
    method = make(args.method or "idpruner", **{key: value for key, value in given.items() if value is not None})
    if args.out is not None:
        from vtc.viz import check_target

        check_target(args.out)
    paths = args.image or [str(example_photo())]
    images = [load_image(path) for path in paths]
    prompt, repeats = args.prompt or "Describe this image.", args.repeats or 3

    from vtc.bench.answer import compare
    from vtc.models.llms import build_inputs, load

    more = {"dtype": args.dtype or "auto", "device": args.device or "cpu", "trust_remote_code": args.trust_remote_code}
    with _bar(args, 2 * (repeats + 2), "loading the model") as bar:
        processor, model = load(args.model, method, **more)
        inputs = build_inputs(processor, images, prompt)
        ready = model()
        bar.set_description("dense and compressed in turns")
        found = compare(ready, processor, inputs, method, args.max_new_tokens or 64, repeats, tick=bar.update)
    result = {"model": args.model, "images": paths, "prompt": prompt, **found.to_dict()}
    dtype = str(ready.dtype).removeprefix("torch.")
    result["environment"] = environment(batch=1, dtype=dtype, device=more["device"], repeats=repeats)
    if args.out is not None:
        from vtc.bench.answer import picture
        from vtc.viz import save

        save(picture(images[0], found), args.out)
        result["picture"] = args.out
    if not args.json:
        from vtc.cli.tables import show_chat

        show_chat(found, result)
    return _json(args, result)


def _run_encoder(args: argparse.Namespace) -> int:
    from vtc.bench.environment import environment
    from vtc.errors import OptionError
    from vtc.methods import make
    from vtc.models.images import example_photo, load_image, preprocess
    from vtc.viz import check_target, save

    _not_here(args, *_OF_LLMS, what="a multimodal LLM: name one with --model")
    if len(args.image or []) > 1:
        raise OptionError(
            "--image was given more than once: an encoder takes one; a multimodal LLM is named by --model"
        )
    size, repeats = args.size or 224, args.repeats or 5
    options: dict[str, Any] = {"keep": args.tokens if args.keep is None else args.keep, "flops": args.flops}
    if options == {"keep": None, "flops": None}:
        options["flops"] = 0.5
    if args.preset is not None:
        options["preset"] = args.preset
    method = make(args.method or "pitome", **{key: value for key, value in options.items() if value is not None})
    if args.keep is not None and args.keep < 0.5 and not method.one_shot:
        raise OptionError(f"--keep {args.keep:g}: every layer keeps at least half; give --tokens N or --flops F")
    if size % 14:
        near = max(14, 14 * round(size / 14))
        raise OptionError(f"--size {size}: the model's patches are 14 pixels wide, give a multiple such as {near}")
    out = check_target(args.out or "vtc-run.png")
    path = args.image[0] if args.image else str(example_photo())
    photo = load_image(path)
    pixels = preprocess(photo, size)
    with _bar(args, 2 * (repeats + 1), "loading the model") as bar:
        from PIL import ImageOps

        from vtc.bench.photo import compare, picture
        from vtc.checkpoints import dinov2_saliency

        model = dinov2_saliency()
        bar.set_description("dense and compressed in turns")
        found = compare(model, pixels, method, repeats, tick=bar.update)
    square = ImageOps.fit(photo, (min(photo.size),) * 2)
    save(picture(square, found, (size // 14,) * 2), out)
    about = {"image": path, "size": size, "model": "DINOv2 ViT-S/14 with a saliency decoder"}
    result = {**about, **found.to_dict(), "picture": str(out)}
    result["environment"] = environment(batch=1, dtype="float32", repeats=repeats)
    if not args.json:
        from vtc.cli.tables import show_run

        show_run(found, result)
    return _json(args, result)


def _list(args: argparse.Namespace) -> int:
    import vtc

    data = {"methods": vtc.list_methods(), "adapters": vtc.list_adapters()}
    if not args.json:
        from vtc.cli.tables import show_names

        show_names({"Methods (--method NAME)": data["methods"], "Adapters and the models they know": data["adapters"]})
    return _json(args, data)


def _explain(args: argparse.Namespace) -> int:
    import vtc
    from vtc.errors import OptionError
    from vtc.methods import make
    from vtc.models.configs import find_config
    from vtc.models.encoders import named

    positions = _positions(args)
    if args.method is not None:
        make(args.method, keep=1.0, **positions)  # what no model can do needs no model
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
    _json(args, {"name": args.model, **plan.to_dict(), "tried": plan.ok and not found.sketch})
    return 0 if plan.ok else 1


def _positions(args: argparse.Namespace) -> dict[str, Any]:
    """The method's option `positions`, if it was given."""
    from vtc.errors import OptionError
    from vtc.positions import PPE

    if args.slots is None:
        return {} if args.positions is None else {"positions": args.positions}
    if args.positions != "ppe":
        raise OptionError(f"--slots {args.slots} says how many positions PPE carries: add --positions ppe")
    return {"positions": PPE(args.slots)}


def _explain_llm(args: argparse.Namespace, config: Any, positions: dict[str, Any]) -> int:
    import vtc
    from vtc.bench.estimate import estimate
    from vtc.models.configs import sketch

    model = sketch(config)
    plan = vtc.explain(model, args.method, **positions)
    cost = estimate(config, model) if plan.ok else None
    if not args.json:
        sys.stdout.write(f"{plan}\n" + (f"{cost}\n" if cost is not None else ""))
    _json(args, {"name": args.model, **plan.to_dict(), "tried": False, "cost": cost and cost.to_dict()})
    return 0 if plan.ok else 1


def _bench(args: argparse.Namespace) -> int:
    from vtc.models.configs import find_config

    if args.self_check:
        return _self_check(args)
    _not_here(args, "--images", "--prompt", what="vtc bench --self-check")
    config = find_config(args.model, download=args.download)
    return _bench_encoder(args) if config is None else _bench_prefill(args, config)


def _self_check(args: argparse.Namespace) -> int:
    from vtc.bench import environment
    from vtc.bench.fidelity import check, opened
    from vtc.errors import OptionError
    from vtc.methods import make

    others = ("--batch", "--warmup", "--positions", "--slots")
    _not_here(args, *others, what="vtc bench without --self-check, where one picture is a batch")
    if args.images is None:
        raise OptionError("--self-check needs --images, a folder of your own pictures")
    repeats = args.repeats or 3
    with _bar(args, 1, "loading the model") as bar:
        found = opened(args.model, args.images, args.prompt, args.size, download=args.download)
        if found.budget == "keep":
            _not_here(args, "--flops", what="an encoder alone; here --keep or --tokens say what stays")
        else:
            _not_here(args, "--keep", what="a multimodal LLM; here --flops or --tokens say what stays")
        budgets = [args.flops] if args.flops else args.keep or found.budgets
        given = [{"keep": args.tokens}] if args.tokens else [{found.budget: budget} for budget in budgets]
        names = dict.fromkeys(["random", "downsample", *_names(args.methods, found.methods)])
        methods = [make(name, **budget) for budget in given for name in names]
        bar.reset((1 + len(methods)) * (repeats + 1))
        bar.set_description("dense and compressed in turns")
        rows = check(found.model, found.inputs, methods, repeats, call=found.call, tick=bar.update)
    result = {"model": args.model, "images": len(found.inputs), "rows": [row.to_dict() for row in rows]}
    dtype = str(next(found.model.parameters()).dtype).removeprefix("torch.")
    result["environment"] = environment(batch=1, dtype=dtype, repeats=repeats)
    if not args.json:
        from vtc.cli.tables import show_check

        show_check(rows, result)
    return _json(args, result)


def _bench_prefill(args: argparse.Namespace, config: Any) -> int:
    from vtc.bench import environment, measure_prefill, methods_at
    from vtc.models.configs import fill, sample

    _not_here(args, "--flops", "--batch", what="an encoder alone")
    names = _names(args.methods, ["idpruner", "zoo_prune", "tome", "random"])
    budgets = [args.tokens] if args.tokens else args.keep or [1.0, 0.5, 0.25, 0.1]
    positions = _positions(args)
    methods = methods_at(names, budgets, **positions)
    inputs = sample(config, args.size).inputs(config)
    repeats, warmup = args.repeats or 3, 1 if args.warmup is None else args.warmup
    with _bar(args, (1 + len(methods)) * (repeats + warmup), "making the model") as bar:
        model = fill(config)
        bar.set_description("dense and compressed in turns")
        dense, rows = measure_prefill(model, inputs, methods, repeats, warmup, tick=bar.update)
    stamp = environment(batch=1, dtype="float32", repeats=repeats)
    result = {"model": args.model, **positions, "dense": dense.to_dict(), "rows": [row.to_dict() for row in rows]}
    result["environment"] = stamp
    if not args.json:
        from vtc.cli.tables import show_prefill

        show_prefill(dense, rows, result)
    return _json(args, result)


def _bench_encoder(args: argparse.Namespace) -> int:
    import torch

    from vtc.bench import environment, measure, named, runs
    from vtc.errors import OptionError
    from vtc.methods import make

    _not_here(args, "--keep", "--tokens", what="a multimodal LLM; here --flops F says what stays")
    flops, batch, repeats = args.flops or 0.55, args.batch or 16, args.repeats or 9
    warmup = 2 if args.warmup is None else args.warmup
    methods = [make(name, flops=flops, **_positions(args)) for name in _names(args.methods, ["tome", "pitome"])]
    found = named(args.model, args.size, download=args.download)
    if found.sketch:
        raise OptionError(f"--model {args.model}: too large to be run with random weights; choose a smaller one")
    pixels = torch.randn((batch, 3, found.size, found.size), generator=torch.Generator().manual_seed(0))
    with _bar(args, runs(len(methods), repeats, warmup), "dense and compressed in turns") as bar:
        rows = measure(found.model, pixels, methods, repeats, warmup, call=found.call, tick=bar.update)
    stamp = environment(batch=batch, image_size=found.size, dtype="float32", repeats=repeats)
    result = {"model": args.model, "flops": flops, "rows": [row.to_dict() for row in rows], "environment": stamp}
    if not args.json:
        from vtc.cli.tables import show_bench

        show_bench(rows, result)
    return _json(args, result)


# The options that each measurement takes beside --out.
_MEASURES = {
    "elpv": ("images", "levels", "dtype"),
    "photos": ("images", "levels", "dtype"),
    "spectral": ("images", "levels"),  # always in float32 or better, as the next
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
        "split",
        "size",
        "canvas",
        "pictures",
        "full",
    ),
    "clip": ("images", "levels", "model", "methods", "split", "data", "dataset", "pretrained"),
}


def _eval(args: argparse.Namespace) -> int:
    from importlib import import_module

    for name in dict.fromkeys(name for names in _MEASURES.values() for name in names):
        if name not in _MEASURES[args.task]:
            takers = " or ".join(task for task, names in _MEASURES.items() if name in names)
            _not_here(args, f"--{name}", what=f"vtc eval {takers}, not {args.task}")
    names = ("out", *_MEASURES[args.task])
    options = {key: value for key in names if (value := getattr(args, key)) is not None}
    if "methods" in options:
        options["methods"] = _names(options["methods"], [])
    task = import_module("vtc.eval.answers" if args.task == "scenes" else f"vtc.eval.{args.task}")
    found = task.run(progress=not args.json and sys.stderr.isatty(), **options)
    if not args.json:
        sys.stdout.write(f"{found}\n" + (f"\nWritten to {options['out']}\n" if "out" in options else ""))
    return _json(args, {"task": args.task, **found.to_dict()})


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
    code = _json(args, {"url": url})
    sys.stdout.flush()
    demo.block_thread()
    return code


def _names(given: list[str] | None, default: list[str]) -> list[str]:
    """Names given with spaces or commas between them."""
    return [name.strip() for part in given or default for name in part.split(",") if name.strip()]


def _not_here(args: argparse.Namespace, *options: str, what: str) -> None:
    """Raise OptionError if one of `options` was given: they are for `what`."""
    from vtc.errors import OptionError

    for option in options:
        if getattr(args, option[2:].replace("-", "_")) not in (None, False):
            raise OptionError(f"{option} is for {what}")


def _bar(args: argparse.Namespace, total: int, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="run", leave=False, disable=True if args.json else None)  # None: no TTY


def _json(args: argparse.Namespace, data: dict[str, Any]) -> int:
    if args.json:
        # JSON knows neither NaN nor infinity: they become null
        text = json.dumps(
            json.loads(json.dumps(data, default=asdict), parse_constant=lambda name: None), indent=2, ensure_ascii=False
        )
        sys.stdout.write(text + "\n")
    return 0


_COMMANDS = {"run": _run, "list": _list, "explain": _explain, "bench": _bench, "eval": _eval, "demo": _demo}

if __name__ == "__main__":
    sys.exit(main())
