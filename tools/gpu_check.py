"""`make gpu-check`: build the kernels for the GPU at hand, test them, run compute-sanitizer, time them against eager
torch, and whole models (tools/gpu_models.py). Writes benchmarks/results/<device>.json and tables in docs/kernels.md.
Needs no network.

python tools/gpu_check.py            all of that
python tools/gpu_check.py small      each operator once, small; what compute-sanitizer runs
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, BEGIN, END = ROOT / "docs" / "kernels.md", "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"
sys.path.insert(0, str(ROOT))


def fail(sentence: str) -> None:
    sys.exit(f"gpu-check: {sentence}")


def main() -> None:
    try:
        import torch
    except ModuleNotFoundError:
        fail(f"{sys.executable} has no torch; make PYTHON=... chooses another Python")
    if not torch.cuda.is_available():
        fail("there is no GPU here (torch.cuda.is_available() is False); nothing was measured")
    if sys.argv[1:] == ["small"]:
        load()
        for _, _, ours, _ in cases(small=True):
            ours()
        torch.cuda.synchronize()
        return
    for tool, what in (("nvcc", "to build the kernels"), ("compute-sanitizer", "to check their memory")):
        if shutil.which(tool) is None:
            fail(f"{tool} is missing; it is needed {what}")
    step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], VTC_REQUIRE_EXT="1")
    step("tests", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels_gpu.py"])
    # without torch's caching allocator an access behind a tensor is one behind an allocation
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", sys.executable, __file__, "small"]
    step("compute-sanitizer", sanitizer, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    load()
    rows = []
    for operator, shape, ours, eager in cases():
        row = {"operator": operator, "shape": shape, "vtc_ms": milliseconds(ours), "eager_ms": milliseconds(eager)}
        rows.append(row)
        print(f"{operator:24} {shape:34} vtc {row['vtc_ms']:9.4f} ms  eager {row['eager_ms']:9.4f} ms", flush=True)
    device = torch.cuda.get_device_name()
    sys.path.insert(0, str(ROOT / "tools"))
    import gpu_models

    models = (
        gpu_models.encoders("cuda", gpu_models.ENCODERS, gpu_models.BATCHES, 9),
        gpu_models.decoders("cuda", ("0.5b", "7b"), 5),
    )
    about = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "rows": rows}
    about |= {"encoders": models[0], "decoders": models[1], "tables": gpu_models.tables(*models)}
    to = ROOT / "benchmarks" / "results" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(about, indent=1) + "\n")
    write_table(about)
    print(f"gpu-check: passed; wrote {to.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")


def step(name: str, command: list[str], **environment: str) -> None:
    print(f"gpu-check: {name}", flush=True)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, **environment})
    if ran.returncode:
        fail(f"{name} failed with exit status {ran.returncode}; nothing was measured")


def load() -> None:
    import torch

    import vtc.ops  # noqa: F401  (defines the schemas)

    built = sorted((ROOT / "vtc").glob("_cuda.*so"))
    if not built:
        fail("vtc/_cuda.abi3.so is not built: python setup.py build_ext --inplace")
    torch.ops.load_library(built[0])


def milliseconds(call: Callable[[], Any]) -> float:
    """The median of 20 runs on the GPU's own clock, launches included."""
    import torch

    for _ in range(3):
        call()
    times = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def cases(small: bool = False) -> list[tuple[str, str, Callable[[], Any], Callable[[], Any]]]:
    """(operator, shape, with our kernels, in eager torch), at the sizes of the issue; `small` for the sanitizer."""
    import torch

    import vtc.ops
    from vtc.ops import definitions, selection
    from vtc.scores.attention import attention_received

    ops: Any = torch.ops.vtc
    found: list[tuple[str, str, Callable[[], Any], Callable[[], Any]]] = []
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", generator=generator)

    def encoder(batch: int, tokens: int, width: int, channels: int, dtype: Any) -> None:
        x, features = definitions.normalize(draw(batch, tokens, width)), draw(batch, tokens, channels).to(dtype)
        index = torch.arange(tokens, device="cuda").expand(batch, -1)
        a, b = index[:, ::2].contiguous(), index[:, 1::2].contiguous()
        group, slots = index // 2, (tokens + 1) // 2
        shape = f"B={batch} N={tokens} D={width}"
        found.append(
            (
                "energy (elu)",
                shape,
                lambda: ops.energy(x, 0, 0.5, 1.0, None),
                lambda: definitions.energy(x, "elu", 0.5),
            )
        )
        found.append(
            ("match", shape, lambda: ops.match(x, a, b, None), lambda: definitions.best_partner(x, a, b, None))
        )
        found.append(
            (
                "merge",
                f"B={batch} N={tokens} C={channels} {str(dtype)[6:]}",
                lambda: ops.merge(features, group, slots, None),
                lambda: definitions.merge(features, group, slots),
            )
        )
        for name, form in (("tome", None), ("pitome", ("nearest", 0.0, 1.0))):
            found.append(
                (
                    f"pair_round ({name})",
                    shape,
                    lambda form=form: vtc.ops.pair_round(x, None, tokens // 8, 1, form),  # type: ignore[misc]
                    lambda form=form: definitions.pair_round(x, None, tokens // 8, 1, form),  # type: ignore[misc]
                )
            )
        best, at = definitions.best_partner(x, a, b, None)
        pairs = (best, at, a, b, None, tokens // 4, None)
        found.append(("top_pairs", shape, lambda: ops.top_pairs(*pairs), lambda: definitions.top_pairs(*pairs)))
        found.append(("rows", shape, lambda: ops.rows(features, a), lambda: definitions.rows(features, a)))
        each, count = torch.full((batch,), tokens // 4, device="cuda"), tokens // 4
        found.append(
            (
                "dpc_knn",
                f"{shape} K={count}",
                lambda: ops.dpc_knn(x, each, count, 5, None),
                lambda: selection.dpc_knn(x, count),
            )
        )

    def selections(batch: int, tokens: int, width: int, count: int) -> None:
        x, importance = definitions.normalize(draw(batch, tokens, width)), draw(batch, tokens).abs()
        each, shape = torch.full((batch,), count, device="cuda"), f"B={batch} N={tokens} D={width} K={count}"
        for kind in selection.SELECTIONS:
            found.append(
                (
                    f"greedy_select ({kind})",
                    shape,
                    lambda kind=kind: ops.greedy_select(x, importance, each, count, kind, 0.5, 1, None),  # type: ignore[misc]
                    lambda kind=kind: selection.greedy_select(x, importance, count, kind),  # type: ignore[misc]
                )
            )
        found.append(
            (
                "dpp_select",
                shape,
                lambda: ops.dpp_select(x, importance, each, count, None),
                lambda: selection.dpp_select(x, importance, count),
            )
        )
        found.append(
            (
                "minmax",
                f"B={batch} N={tokens}",
                lambda: ops.minmax(importance, None, 1e-6, 0.0),
                lambda: definitions.minmax(importance, eps=1e-6),
            )
        )

    def scores(batch: int, heads: int, tokens: int, width: int, probes: int) -> None:
        query, key = draw(batch, heads, tokens, width), draw(batch, heads, tokens, width)
        difference = draw(probes, batch, tokens, width * heads)
        if hasattr(ops, "received"):
            found.append(
                (
                    "received",
                    f"B={batch} H={heads} N={tokens} D={width}",
                    lambda: ops.received(query, key, width**-0.5, None),
                    lambda: attention_received(query, key),
                )
            )
        if hasattr(ops, "probe_norms"):
            found.append(
                (
                    "probe_norms",
                    f"m={probes} B={batch} N={tokens} C={width * heads}",
                    lambda: ops.probe_norms(difference, 0.01),
                    lambda: difference.norm(dim=-1).sum(0) / (0.02 * probes),
                )
            )

    if small:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            encoder(2, 67, 19, 33, dtype)
        encoder(300, 9, 5, 7, torch.float32)
        selections(2, 67, 19, 9)
        selections(1, 4200, 3, 4)
        scores(2, 2, 67, 19, 3)
        return found
    for batch, tokens in ((1, 577), (16, 257), (16, 1370), (64, 577)):
        encoder(batch, tokens, 64, 1024, torch.bfloat16)
    selections(1, 576, 1024, 64)
    selections(1, 2880, 2048, 320)
    selections(16, 576, 1024, 64)
    scores(1, 16, 577, 64, 16)
    scores(4, 16, 2880, 64, 16)
    return found


def write_table(about: dict[str, Any]) -> None:
    lines = [
        f"{about['device']}, torch {about['torch']}, CUDA {about['cuda']}; medians of 20 runs by CUDA events, launches "
        "included.",
        "",
        "| operator | shape | vtc ms | eager torch ms | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in about["rows"]:
        ours, eager = row["vtc_ms"], row["eager_ms"]
        lines.append(f"| {row['operator']} | {row['shape']} | {ours:.4f} | {eager:.4f} | {eager / ours:.1f} |")
    lines += ["", "Whole models, random weights, bfloat16 (tools/gpu_models.py):", "", about["tables"]]
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    main()
