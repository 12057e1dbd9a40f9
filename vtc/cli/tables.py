"""The tables that the command line prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtc.bench.fidelity import Checked
from vtc.bench.photo import PhotoComparison
from vtc.bench.prefill import Dense, Prefill
from vtc.bench.served import Served
from vtc.bench.timing import Row


def show_run(found: PhotoComparison, result: Mapping[str, Any]) -> None:
    """The tables of `vtc run`."""
    console = Console(highlight=False)
    report, name = found.report, type(found.method).__name__
    options = ", ".join(f"{key}={value}" for key, value in found.method.options().items())
    console.print(f"\n[bold]{name}[/bold]({options}) in {result['model']}")
    console.print(f"[dim]{escape(result['image'])}, {result['size']} x {result['size']} pixels[/dim]", soft_wrap=True)

    layers = _table("Tokens per layer", "layer", "attention", "MLP", left=(3,))
    layers.add_column("", no_wrap=True)
    most = max(1, report.tokens[0][0])
    for index, (attended, fed) in enumerate(report.tokens):
        layers.add_row(str(index), str(attended), str(fed), f"[cyan]{'█' * max(1, round(32 * fed / most))}[/cyan]")
    console.print(layers)

    sums = _table("Dense against compressed", "", "dense", name, "", left=(0,))
    before, after = report.before[0], report.after[0]
    sums.add_row("image tokens at the end", str(before), str(after), f"{after / before:.0%} left")
    sums.add_row(
        "multiply-adds",
        f"{report.macs_before / 1e9:.2f} G",
        f"{report.macs_after / 1e9:.2f} G",
        f"{report.macs_ratio:.1%} left",
    )
    dense, less = found.seconds
    faster = f"{found.speedup:.2f} x as fast"
    sums.add_row("encoder, one image, median", f"{1e3 * dense:.1f} ms", f"{1e3 * less:.1f} ms", faster)
    sums.add_row("cosine to dense, CLS", "1", f"{found.cosine_cls:.4f}", "")
    sums.add_row("cosine to dense, mean patch", "1", f"{found.cosine_patches:.4f}", "")
    sums.add_row("saliency map, correlation", "1", f"{found.correlation:.4f}", "")
    console.print(sums)
    _stamp(console, result["environment"])
    console.print(f"Picture: [bold]{escape(result['picture'])}[/bold]\n", soft_wrap=True)


def show_bench(rows: Sequence[Row], result: Mapping[str, Any]) -> None:
    """The table of `vtc bench`."""
    console = Console(highlight=False)
    about = result["environment"]
    images = f"{about['batch']} image{'s' * (about['batch'] != 1)} of {about['image_size']} x {about['image_size']}"
    console.print(f"\n[bold]{escape(result['model'])}[/bold], {images}")
    heads = ("method", "tokens", "MACs", "ms", "ideal", "limit", "realised", "quartiles", "of limit", "keep=1")
    table = _table("Speed-up, medians over rounds", *heads, left=(0,), gap=(0, 0))
    if rows:
        table.add_row("dense", str(rows[0].tokens[0]), "100.0%", f"{1e3 * rows[0].dense_seconds:.0f}", "1", "1", "1")
    for row in rows:
        table.add_row(
            row.method,
            str(row.tokens[1]),
            f"{row.macs_ratio:.1%}",
            f"{1e3 * row.seconds:.0f}",
            f"{row.ideal:.2f}",
            "" if row.limit is None else f"{row.limit:.2f}",
            f"{row.realised:.2f}",
            f"{row.low:.2f}-{row.high:.2f}",
            "" if row.of_limit is None else f"{row.of_limit:.2f}",
            f"{row.overhead:+.1%}",
        )
    console.print(table)
    note = f"realised: times as fast as dense in the same round, median and quartiles of {about['repeats']} rounds."
    note += " ideal: by multiply-adds; limit: the same model with its tokens cut by plain slicing to the same counts."
    console.print(f"[dim]{note} keep=1: what the patched model costs that keeps every token.[/dim]")
    _stamp(console, about)
    console.print()


def show_served(rows: Sequence[Served], result: Mapping[str, Any]) -> None:
    """The table of `vtc bench serve`."""
    console, load = Console(highlight=False), result["load"]
    before, after = rows[0].prompt
    about = f"pictures of {load['size'][0]} x {load['size'][1]}, answers of {load['words']} tokens"
    console.print(f"\n[bold]{escape(result['model'])}[/bold] in vLLM, {result['method']}, {about}")
    heads = ("at once", "dense", result["method"], "times", "extremes", "dense", result["method"], "times")
    title = f"Requests a second, then ms to the first token; prompts of {before} and {after} tokens"
    table = _table(title, *heads, left=())
    for row in rows:
        table.add_row(
            str(row.concurrency),
            *(f"{rate:.2f}" for rate in row.rate),
            f"{row.faster:.2f}",
            f"{row.low:.2f}-{row.high:.2f}",
            *(f"{1e3 * seconds:.0f}" for seconds in row.first),
            f"{row.sooner:.2f}",
        )
    console.print(table)
    slower = [str(row.concurrency) for row in rows if row.faster < 1]
    if slower:
        console.print(
            f"[bold]Slower than dense at {', '.join(slower)} at once[/bold]: choosing {after} tokens took longer there "
            f"than reading {before - after} more. The tower's work and the answers' stay as they are."
        )
    _stamp(console, result["environment"])
    console.print()


def show_names(tables: Mapping[str, Mapping[str, str]]) -> None:
    """The tables of `vtc list`."""
    console = Console(highlight=False)
    for title, names in tables.items():
        console.print(f"[bold]{title}[/bold]")
        table = Table(box=None, show_header=False, padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for name, text in names.items():
            table.add_row(name, text)
        console.print(table)
        console.print()


def show_models(found: Mapping[str, Any]) -> None:
    """The tables of `vtc list-models`."""
    from vtc.methods import METHODS

    console = Console(highlight=False)
    versions = ", ".join(f"{library} {version}" for library, version in found["versions"].items())
    inside = ", ".join(name for name, method in METHODS.items() if method.encoder)
    llms = _table("Multimodal LLMs of transformers (all: every method)", "model type", "video", "methods", left=(0,))
    encoders = _table(f"Vision encoders of {versions} (all: {inside})", "library", "models", "methods", left=(0, 2))
    refused = _table("Refused", "because", "models", left=())
    reasons: dict[str, list[str]] = {}
    for row in found["models"]:
        name, names, encoder = row["class"], row["names"], row["kind"] == "encoder"
        if row["reason"]:
            reasons.setdefault(row["reason"], []).append(name if encoder else names[0])
        elif encoder:
            listed = "" if names == [name] else f": {', '.join(names[:3])}"
            more = f" and {len(names) - 3} more" * (len(names) > 3)
            encoders.add_row(row["library"], f"[bold]{name}[/bold]{listed}{more}", _working(row["methods"]))
        else:
            llms.add_row(names[0], "yes" if row["video"] else "no", _working(row["methods"]))
    for reason, names in reasons.items():
        refused.add_row(escape(reason), ", ".join(dict.fromkeys(names)))
    for table in (llms, encoders, refused):
        table.padding = (0, 1)
        for column in table.columns:
            column.justify, column.overflow = "left", "fold"
        if table.row_count:
            console.print(table)


def _working(answers: Mapping[str, str]) -> str:
    """Which methods work, or which do not: whichever are fewer."""
    from vtc.methods import METHODS

    works = [name for name in METHODS if answers.get(name) == ""]
    not_these = [name for name in METHODS if answers.get(name)]
    if len(not_these) > len(works):
        return ", ".join(works)
    return "all" + (f" but {', '.join(not_these)}" if not_these else "")


def _table(title: str, *columns: str, left: Sequence[int], gap: tuple[int, int] = (0, 1)) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=gap)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index in left else "right", no_wrap=index in left)
    return table


def _stamp(console: Console, about: Mapping[str, Any]) -> None:
    shown = [f"{key} {value}" for key, value in about.items() if value is not None]
    console.print(f"[dim]{', '.join(shown)}[/dim]")
    if (about["load"] or 0) > (about["cores"] or 1) + 0.5:
        load = f"load {about['load']} on {about['cores']} cores"
        console.print(f"[yellow]Other programs are busy here ({load}): do not trust these times.[/yellow]")


def show_prefill(dense: Dense, rows: Sequence[Prefill], result: Mapping[str, Any]) -> None:
    """The tables of `vtc bench` on a multimodal LLM."""
    console = Console(highlight=False)
    about = f"{dense.visual} visual tokens in a prompt of {dense.prompt}; random weights"
    console.print(f"\n[bold]{escape(result['model'])}[/bold], {about}")
    heads = ("method", "keep", "visual", "method", "after projector", "whole", "KV MB")
    times = _table("Pixels to first token in ms, medians over rounds", *heads, left=(0,), gap=(0, 0))
    after, whole = _ms(dense.after_seconds, dense.total_seconds)
    times.add_row("dense", "", str(dense.visual), "", after, whole, _mb(dense.kv_bytes))
    marks = ("method", "keep", "ideal", "realised", "quartiles", "of ideal", "of short", "whole", "method in layers")
    ratios = _table("Times as fast as dense in the same round", *marks, left=(0,), gap=(0, 0))
    for row in rows:
        name = (row.method, f"{row.keep:g}")
        seconds = _ms(row.method_seconds, row.after_seconds, row.total_seconds)
        times.add_row(*name, str(row.visual[1]), *seconds, _mb(row.kv_bytes[1]))
        spread, layers = f"{row.low:.2f}-{row.high:.2f}", f"{row.method_seconds / dense.layer_seconds:.2f}"
        shares = [f"{x:.2f}" for x in (row.ideal, row.realised, row.efficiency, row.of_short, row.whole)]
        ratios.add_row(*name, *shares[:2], spread, *shares[2:], layers)
    console.print(times, ratios)
    console.print(
        "[dim]method: evidence, selection, shortening of the prompt. after projector: that, and the decoder up to the "
        f"first token's logits. whole: with tower and projector, {1e3 * dense.tower_seconds:.0f} ms dense. ideal: from "
        "the decoder's multiply-adds. of short: beside a prompt that was as short from the start. method in layers: "
        f"beside one decoder layer's prefill of the whole prompt, {1e3 * dense.layer_seconds:.1f} ms.[/dim]"
    )
    for note in dict.fromkeys(f"{row.method}: {row.notes}" for row in rows if row.notes):
        console.print(f"[dim]{escape(note)}[/dim]")
    _stamp(console, result["environment"])
    console.print()


def show_check(rows: Sequence[Checked], result: Mapping[str, Any]) -> None:
    """The table of `vtc bench --self-check`."""
    console = Console(highlight=False)
    console.print(f"\n[bold]{escape(result['model'])}[/bold], {result['images']} pictures, one at a time")
    heads = ("method", "budget", "image tokens", "ms", "times as fast", "fidelity")
    table = _table("Dense and compressed in turns, medians over rounds", *heads, left=(0,), gap=(0, 0))
    for row in rows:
        method, budget = "dense", ""
        if row.method is not None:
            options = row.method.options()
            method = row.method.label
            budget = " ".join(f"{k} {options[k]:g}" for k in ("keep", "flops") if options.get(k))
        found = (f"{1e3 * row.seconds:.0f}", f"{row.faster:.2f}", f"{row.fidelity:.3f}")
        table.add_row(method, budget, str(row.tokens[1]), *found)
    console.print(table)
    console.print(
        "[dim]ms: to the first token of every answer, or an encoder's calls, all pictures together. fidelity: how much "
        "of the dense answer is repeated before another word comes; of an encoder, the cosine to the dense features."
        "[/dim]"
    )
    _stamp(console, result["environment"])
    console.print()


def _ms(*seconds: float) -> list[str]:
    return [f"{1e3 * s:.0f}" if s >= 0.1 else f"{1e3 * s:.1f}" for s in seconds]


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f}"


def show_chat(found: Any, result: Mapping[str, Any]) -> None:
    """The answers and the table of `vtc run` on a multimodal LLM."""
    console = Console(highlight=False)
    name = type(found.method).__name__
    options = ", ".join(f"{key}={value}" for key, value in found.method.options().items())
    console.print(f"\n[bold]{name}[/bold]({options}) in {escape(result['model'])}")
    pictures = ", ".join(result["images"])
    console.print(f"[dim]{escape(pictures)}: {escape(result['prompt'])}[/dim]", soft_wrap=True)
    answers = Table(box=SIMPLE_HEAD, expand=True, pad_edge=False)
    for head in ("dense", name):
        answers.add_column(head, ratio=1, overflow="fold")
    dense, less = found.dense, found.less
    answers.add_row(escape(dense.answer) or "[dim](nothing)[/dim]", escape(less.answer) or "[dim](nothing)[/dim]")
    console.print(answers)

    sums = _table("Dense against compressed", "", "dense", name, "", left=(0,))
    sums.add_row("visual tokens", str(dense.visual), str(less.visual), f"{less.visual / dense.visual:.1%} left")
    sums.add_row("prompt, tokens", str(dense.prompt), str(less.prompt), f"{less.prompt / dense.prompt:.1%} left")
    first = [f"{1e3 * side.first_seconds:.1f} ms" for side in (dense, less)]
    sums.add_row("time to first token, median", *first, f"{found.faster:.2f} x as fast")
    if found.method_seconds is not None:
        share = found.method_seconds / less.first_seconds
        sums.add_row("of it, the method", "", f"{1e3 * found.method_seconds:.1f} ms", f"{share:.1%} of it")
    rates = [side.decode_rate for side in (dense, less)]
    if None not in rates:
        sums.add_row("tokens per second after it", *[f"{r:.1f}" for r in rates], f"{rates[1] / rates[0]:.2f} x as fast")
    size = [f"{side.kv_bytes / 1e6:.2f} MB" for side in (dense, less)]
    sums.add_row("KV cache after the prompt", *size, f"{less.kv_bytes / dense.kv_bytes:.1%} left")
    console.print(sums)
    if found.report.notes:
        console.print(f"[dim]{escape(found.report.notes)}[/dim]")
    _stamp(console, result["environment"])
    console.print()
