"""What the command line prints: tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtc.bench.photo import Comparison
from vtc.bench.timing import Row


def show_run(found: Comparison, result: Mapping[str, Any]) -> None:
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
    heads = ("method", "tokens", "MACs", "ms", "ideal", "realised", "quartiles", "of ideal", "keep=1")
    table = _table("Speed-up, medians over rounds", *heads, left=(0,), gap=(0, 0))
    if rows:
        table.add_row("dense", str(rows[0].tokens[0]), "100.0%", f"{1e3 * rows[0].dense_seconds:.0f}", "1", "1")
    for row in rows:
        table.add_row(
            row.method,
            str(row.tokens[1]),
            f"{row.macs_ratio:.1%}",
            f"{1e3 * row.seconds:.0f}",
            f"{row.ideal:.2f}",
            f"{row.realised:.2f}",
            f"{row.low:.2f}-{row.high:.2f}",
            f"{row.efficiency:.2f}",
            f"{row.overhead:+.1%}",
        )
    console.print(table)
    note = f"realised: times as fast as dense in the same round, median and quartiles of {about['repeats']} rounds."
    console.print(f"[dim]{note} keep=1: what the patched model costs that keeps every token.[/dim]")
    _stamp(console, about)
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


def _table(title: str, *columns: str, left: Sequence[int], gap: tuple[int, int] = (0, 1)) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=gap)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index in left else "right")
    return table


def _stamp(console: Console, about: Mapping[str, Any]) -> None:
    shown = [f"{key} {value}" for key, value in about.items() if value is not None]
    console.print(f"[dim]{', '.join(shown)}[/dim]")
    if (about["load"] or 0) > (about["cores"] or 1) + 0.5:
        load = f"load {about['load']} on {about['cores']} cores"
        console.print(f"[yellow]Other programs are busy here ({load}): do not trust these times.[/yellow]")
