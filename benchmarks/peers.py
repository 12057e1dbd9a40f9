"""The reference repositories' own matching and selection functions beside vtc's: same inputs, one process, in turns.

    python benchmarks/peers.py --tome PATH --pitome PATH --angelslim PATH [--out FILE.md] [--repeats N]

PATH is a checkout (facebookresearch/ToMe, hchautran/PiToMe, Tencent/AngelSlim) that you made. Nothing of theirs is in
this project: their files are loaded from there when this runs, without the packages around them.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtc import functional, ops
from vtc.bench import environment, interleave
from vtc.methods import VisionZip, VisPruner
from vtc.methods.base import Tokens

BATCH, METRIC, WIDTH, KEEP, MARGIN = 16, 64, 384, 0.9, 0.5  # of an encoder's tokens, the CLS token first
ENCODER = (197, 257, 1370)
SELECTION = ((576, 1024, 64), (2691, 2048, 269))  # N, D, K of one image
SECONDS = 30.0  # a row that would take longer gets fewer rounds, but three

PEERS = {  # where its modules lie in a checkout, and a file that must be among them
    "ToMe": ("tome", "merge.py"),
    "PiToMe": ("algo/pitome", "merge.py"),
    "AngelSlim": ("angelslim/compressor/token_compressor", "base/context.py"),
}
# Their function, its options beside ratio and margin (None: it takes r), and what does the same here.
Matcher = tuple[str, "dict[str, Any] | None", Callable[..., Any]]
MATCHERS: dict[str, tuple[Matcher, ...]] = {
    "ToMe": (("bipartite_soft_matching", None, functional.tome),),
    "PiToMe": (
        ("pitome_vision", {}, partial(functional.pitome, margin=MARGIN)),
        ("pitome_vision", {"use_bsm_pitome": True}, partial(functional.pitome, margin=MARGIN, protect=False)),
        ("pitome_text", {}, partial(functional.pitome, margin=MARGIN, energy="gaussian", split="half")),
    ),
}
# Module: its function, and what does the same here with (tokens and evidence, count).
SELECTORS: dict[str, tuple[str, Callable[[Tokens, int], Any]]] = {
    "idpruner": ("idpruner", lambda t, k: functional.mmr(t.features, t.attention, keep=k)),  # type: ignore[arg-type]
    "divprune": ("divprune", lambda t, k: functional.max_min(t.features, keep=k)),
    "scope": ("scope_pruning", lambda t, k: functional.coverage(t.features, t.attention, keep=k)),  # type: ignore[arg-type]
    "vispruner": ("vispruner_pruning", lambda t, k: VisPruner(keep=k).decide(t, t.features.shape[1] - k)),
    "visionzip": ("visionzip", lambda t, k: VisionZip(keep=k).decide(t, t.features.shape[1] - k)),
}
HEADS = "peer | their function | inputs | agreement | theirs, ms | vtc torch | vtc C++ | theirs / torch | theirs / C++"
NOTES = """
- Times are medians over rounds in turns, ratios the medians of the rounds' own: above 1, vtc is faster.
- Tokens are drawn: twelve centres, noise around them, and something common to all.
- Merging: groups, and features merged by sizes of 1 to 3; 10 % of the tokens go. Selecting: which tokens of one image
  stay. The scorer of IDPruner and the tower's attention and keys are not timed: both sides get the same drawn ones.
- Where groups differ, those that their code finds in float64 tell what float32 can decide. Where picks differ,
  coverage is the mean over all tokens of the highest cosine to one that stays.
"""


class Pair(NamedTuple):
    """What both sides do with the same inputs, and what two results have in common."""

    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    compare: Callable[[Any, Any], str]


def load(folder: Path, module: str) -> Any:
    """A module of a checkout, by file: relative imports find their files, no `__init__` above them runs."""
    path = folder / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    package = ModuleType("peer_" + re.sub(r"\W", "_", str(folder)))
    package.__path__ = [str(folder)]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{module}")


def rows(peer: str, folder: Path) -> Iterator[tuple[str, str, Callable[[], Pair]]]:
    """Their function, the inputs, and what makes both."""
    for name, size in product(SELECTORS if peer == "AngelSlim" else (), SELECTION):
        yield SELECTORS[name][0], "N {}, D {}, K {}".format(*size), partial(selecting, folder, name, size)
    for matcher, tokens in product(MATCHERS.get(peer, ()), ENCODER):
        what, inputs = [matcher[0], *(matcher[1] or ()), "merge_wavg"], f"B {BATCH}, N {tokens}, D {METRIC}, C {WIDTH}"
        yield ", ".join(what), inputs, partial(merging, folder, matcher, tokens)


def draw(generator: torch.Generator, batch: int, tokens: int, width: int) -> Tensor:
    """Tokens [B, N, D]: twelve centres, noise around them, and something common to all."""
    centres, common = (torch.randn(batch, n, width, generator=generator) for n in (12, 1))
    kind = torch.randint(12, (batch, tokens, 1), generator=generator).expand(-1, -1, width)
    return centres.gather(1, kind) + common + torch.randn(batch, tokens, width, generator=generator)


def merging(folder: Path, matcher: Matcher, tokens: int) -> Pair:
    (function, options, decide), module = matcher, load(folder, "merge")
    generator = torch.Generator().manual_seed(0)
    metric, x = (draw(generator, BATCH, tokens, width) for width in (METRIC, WIDTH))
    size = torch.randint(1, 4, (BATCH, tokens), generator=generator).float()
    r = int(tokens - 1 - (tokens - 1) * KEEP)  # as PiToMe rounds
    budget = {"r": r} if options is None else {"ratio": KEEP, "margin": MARGIN, **options}

    def match(metric: Tensor) -> Any:
        made = getattr(module, function)(metric, class_token=True, **budget)
        return made[0] if isinstance(made, tuple) else made  # ToMe's comes with an unmerge

    def theirs() -> tuple[Any, Tensor]:
        merge = match(metric)
        return merge, module.merge_wavg(merge, x, size[..., None])[0]

    def ours() -> tuple[Any, Tensor]:
        plan = decide(metric, r=r, prefix=1, size=size)
        return plan, plan.merge(x)

    def compare(found: tuple[Any, Tensor], mine: tuple[Any, Tensor]) -> str:
        slot, group = module.merge_source(found[0], x).argmax(1), mine[0].group
        apart = partition(slot) != partition(group)
        same = ~apart.any(1)
        said = f"groups of {int(same.sum())}/{BATCH} images"
        if same.any():
            values = found[1].gather(1, slot[..., None].expand_as(x)) - mine[0].unmerge(mine[1])
            said += f", values within {max(1e-5, float(values[same].abs().max())):.0e}"
        if same.all():
            return said
        exact = partition(module.merge_source(match(metric.double()), x).argmax(1))
        hits = [int((partition(g) == exact).all(1).sum()) for g in (slot, group)]
        said += f" ({int(apart.sum())} of {apart.numel()} tokens apart; "
        return f"{said}as in float64: theirs {hits[0]}, vtc {hits[1]})"

    return Pair(theirs, ours, compare)


def partition(group: Tensor) -> Tensor:
    """Every token's group, named after its first member. [B, N]"""
    index = torch.arange(group.shape[1]).expand_as(group)
    return torch.full_like(group, group.shape[1]).scatter_reduce(1, group, index, "amin").gather(1, group)


def selecting(folder: Path, name: str, size: tuple[int, int, int]) -> Pair:
    (function, decide), (tokens, width, count) = SELECTORS[name], size
    module, generator = load(folder, f"algorithm.{name}"), torch.Generator().manual_seed(0)
    x, keys = (draw(generator, 1, tokens, wide) for wide in (width, METRIC))
    importance, ids = torch.rand(1, tokens, generator=generator), torch.ones(1, tokens, dtype=torch.long)
    module.get_universal_selector_scores = lambda **_: importance
    module._recompute_attention_maps_for_all_images = lambda *_: ([importance], [keys])
    model = {"model_type": "llava", "image_token_id": 1}
    context = load(folder, "base.context").PruningContext(ids, x, model_config=model)
    context.vit_q[0] = context.vit_k[0] = keys
    options = {"ratio": 1 - count / tokens, "layer_idx": 0, "selector_path": ""}

    def compare(found: Any, plan: Any) -> str:
        if name == "visionzip":  # weights [slots, tokens], slots in the order of the tokens, as ours
            return f"groups of {int((found[0][0].argmax(0) == plan.group[0]).sum())}/{tokens} tokens"
        mask, kept, unit = found[0], plan.group[0] >= 0, ops.normalize(x[0])
        cover = [float((unit @ unit[stays].T).amax(1).mean()) for stays in (mask, kept)]
        why = "" if torch.equal(mask, kept) else f" (coverage: theirs {cover[0]:.4f}, vtc {cover[1]:.4f})"
        return f"{int((mask & kept).sum())}/{int(mask.sum())} picks{why}"

    evidence = Tokens(x, keys=keys, attention=importance)
    return Pair(lambda: getattr(module, function)(context, **options), lambda: decide(evidence, count), compare)


@torch.inference_mode()
def cells(build: Callable[[], Pair], repeats: int) -> list[str]:
    """A row from the agreement on; a single cell that says why, where their code does not run."""
    try:
        pair, start = build(), time.perf_counter()
        found = pair.theirs()
    except Exception as error:  # whatever their code raises
        return [f"not run: {type(error).__name__}: {error}".splitlines()[0]]

    def ours(backend: str) -> Any:
        ops.set_backend(backend)
        return pair.ours()

    backends = ("torch", "cpp") if ops.backend() == "cpp" else ("torch",)
    try:
        said = [pair.compare(found, ours(name)) for name in backends]
        rounds = min(repeats, max(3, int(SECONDS / (time.perf_counter() - start))))
        took = interleave({"theirs": pair.theirs} | {name: partial(ours, name) for name in backends}, rounds)
    finally:
        ops.set_backend(None)
    shown = [1e3 * median(seconds) for seconds in took.values()]
    shown += [median(t / s for t, s in zip(took["theirs"], took[name], strict=True)) for name in backends]
    agreement = said[0] if len(set(said)) == 1 else f"torch: {said[0]}; C++: {said[1]}"
    numbers = [f"{number:.3g}" if number < 100 else f"{number:.0f}" for number in shown]
    return [agreement, *numbers] if len(backends) > 1 else [agreement, *numbers[:2], "not built", numbers[2], ""]


def commit(root: Path) -> str:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    told = subprocess.run(command, capture_output=True, text=True) if (root / ".git").exists() else None
    return told.stdout.strip() if told and told.stdout else "without a commit"


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for peer in PEERS:
        parser.add_argument(f"--{peer.lower()}", type=Path, metavar="PATH", help=f"a checkout of {peer}")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="where to write the table, beside printing it")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds at most (default: 9)")
    args = parser.parse_args(argv)
    roots = {peer: getattr(args, peer.lower()) for peer in PEERS if getattr(args, peer.lower()) is not None}
    if not roots or args.repeats < 1:
        sys.exit("peers: name a checkout (--tome, --pitome, --angelslim) and at least one of --repeats")
    for peer, root in roots.items():
        if not (expected := root.joinpath(*PEERS[peer])).is_file():
            sys.exit(f"peers: --{peer.lower()}: {expected if root.is_dir() else root} is not there")
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    say(f"# vtc beside the reference repositories\n\n`python benchmarks/peers.py {shlex.join(argv)}`\n")
    say("{date}, {processor}, {cores} cores, {threads} threads, load {load}; torch {torch}.".format(**environment()))
    say(", ".join(f"{n} {commit(root)}" for n, root in {"vtc": Path(__file__).parents[1], **roots}.items()) + ".\n")
    say(f"| {HEADS} |\n|{'---|' * (HEADS.count('|') + 1)}")
    ran = dict.fromkeys(roots, 0)
    torch.empty(30 << 20, dtype=torch.uint8)  # malloc keeps what is freed from now on, else small rows time page faults
    for peer, root in roots.items():
        for what, inputs, build in rows(peer, root / PEERS[peer][0]):
            found = cells(build, args.repeats)
            ran[peer] += len(found) > 1
            row = [peer, what, inputs, *found, *[""] * (6 - len(found))]
            say(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |")
    say(NOTES.rstrip())
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if silent := [f"--{peer.lower()} {roots[peer]}" for peer, count in ran.items() if not count]:
        sys.exit(f"peers: none of their functions ran of {', '.join(silent)}")


if __name__ == "__main__":
    main()
