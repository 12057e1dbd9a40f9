"""`vtc bench`."""

from __future__ import annotations

import argparse
from typing import Any

from vtc.cli.common import not_here, positions_given, print_json, progress_bar, served_method, split_names


def bench(args: argparse.Namespace) -> int:
    from vtc.models.configs import find_config

    if args.self_check:
        return _self_check(args)
    not_here(args, "--images", "--prompt", what="vtc bench --self-check")
    config = find_config(args.model, download=args.download)
    return _bench_encoder(args) if config is None else _bench_prefill(args, config)


def _self_check(args: argparse.Namespace) -> int:
    from vtc.bench import environment
    from vtc.bench.fidelity import check
    from vtc.bench.opened import opened
    from vtc.errors import OptionError
    from vtc.methods import budgeted, make

    others = ("--batch", "--warmup", "--positions", "--slots")
    not_here(args, *others, what="vtc bench without --self-check, where one picture is a batch")
    if args.images is None:
        raise OptionError("--self-check needs --images, a folder of your own pictures")
    repeats = args.repeats or 3
    with progress_bar(args, 1, "loading the model") as bar:
        found = opened(args.model, args.images, args.prompt, args.size, download=args.download)
        if found.budget == "keep":
            not_here(args, "--flops", what="an encoder alone; here --keep or --tokens say what stays")
        else:
            not_here(args, "--keep", what="a multimodal LLM; here --flops or --tokens say what stays")
        budgets = [args.flops] if args.flops else args.keep or found.budgets
        given = [{"keep": args.tokens}] if args.tokens else [{found.budget: budget} for budget in budgets]
        names = dict.fromkeys(["random", "downsample", *split_names(args.methods, found.methods)])
        methods = [make(name, **budget) for budget in given for name in names if budgeted(name)]
        methods += [make(name) for name in names if not budgeted(name)]
        bar.reset((1 + len(methods)) * (repeats + 1))
        bar.set_description("dense and compressed in turns")
        rows = check(found.model, found.inputs, methods, repeats, call=found.call, tick=bar.update)
    result = {"model": args.model, "images": len(found.inputs), "rows": [row.to_dict() for row in rows]}
    dtype = str(next(found.model.parameters()).dtype).removeprefix("torch.")
    result["environment"] = environment(batch=1, dtype=dtype, repeats=repeats)
    if not args.json:
        from vtc.cli.tables import show_check

        show_check(rows, result)
    return print_json(args, result)


def _bench_prefill(args: argparse.Namespace, config: Any) -> int:
    from vtc.bench import environment, measure_prefill, methods_at
    from vtc.models.configs import fill, sample

    not_here(args, "--flops", "--batch", what="an encoder alone")
    names = split_names(args.methods, ["idpruner", "zoo_prune", "tome", "random"])
    budgets = [args.tokens] if args.tokens else args.keep or [1.0, 0.5, 0.25, 0.1]
    positions = positions_given(args)
    methods = methods_at(names, budgets, **positions)
    shown = sample(config, args.size)
    repeats, warmup = args.repeats or 3, 1 if args.warmup is None else args.warmup
    with progress_bar(args, (1 + 2 * len(methods)) * (repeats + warmup), "making the model") as bar:
        model = fill(config)
        bar.set_description("dense and compressed in turns")
        dense, rows = measure_prefill(model, shown.inputs(model), methods, repeats, warmup, tick=bar.update)
    stamp = environment(batch=1, dtype="float32", repeats=repeats)
    result = {"model": args.model, **positions, "dense": dense.to_dict(), "rows": [row.to_dict() for row in rows]}
    result["environment"] = stamp
    if not args.json:
        from vtc.cli.tables import show_prefill

        show_prefill(dense, rows, result)
    return print_json(args, result)


def _bench_encoder(args: argparse.Namespace) -> int:
    import torch

    from vtc.bench import environment, measure, named, runs
    from vtc.errors import OptionError
    from vtc.methods import budgeted, make

    not_here(args, "--keep", "--tokens", what="a multimodal LLM; here --flops F says what stays")
    flops, batch, repeats = args.flops or 0.55, args.batch or 16, args.repeats or 9
    warmup = 2 if args.warmup is None else args.warmup
    methods = [
        make(name, **({"flops": flops} if budgeted(name) else {}), **positions_given(args))
        for name in split_names(args.methods, ["tome", "pitome"])
    ]
    found = named(args.model, args.size, download=args.download)
    if found.sketch:
        raise OptionError(f"--model {args.model}: too large to be run with random weights; choose a smaller one")
    pixels = torch.randn((batch, 3, found.size, found.size), generator=torch.Generator().manual_seed(0))
    with progress_bar(args, runs(len(methods), repeats, warmup), "dense and compressed in turns") as bar:
        rows = measure(found.model, pixels, methods, repeats, warmup, call=found.call, tick=bar.update)
    stamp = environment(batch=batch, image_size=found.size, dtype="float32", repeats=repeats)
    result = {"model": args.model, "flops": flops, "rows": [row.to_dict() for row in rows], "environment": stamp}
    if not args.json:
        from vtc.cli.tables import show_bench

        show_bench(rows, result)
    return print_json(args, result)


def bench_serve(args: argparse.Namespace) -> int:
    from vtc.bench import environment
    from vtc.bench.served import Load, served

    load = Load(args.concurrency, args.requests, args.picture, args.words, args.rounds)
    method = served_method(args)
    with progress_bar(args, 2 * len(args.concurrency) * args.rounds, "dense and compressed in turns") as bar:
        rows = served(args.model, method, args.positions, load, args.rest, tick=bar.update)
    result = {"model": args.model, "method": method.name, **method.options(), "rows": [row.to_dict() for row in rows]}
    result["load"] = {k: v for k, v in vars(load).items() if k != "concurrency"}
    result["environment"] = environment(repeats=args.rounds)
    if not args.json:
        from vtc.cli.tables import show_served

        show_served(rows, result)
    return print_json(args, result)
