"""What docs/answers.md and docs/frame.md are made of: runs of `vtc eval scenes`.

    python tools/answers_runs.py                     # the commands
    python tools/answers_runs.py --run               # run all; what was done before a stop is not done again
    python tools/answers_runs.py --run tiny_qwen     # those whose names begin so: two processes, two halves
    python tools/answers_runs.py --run --methods new # a new method alone, beside what is kept of the others

A cell is a method at a budget: five seeds of 18 scenes, about 480 questions, or of 40 clips with one each.
"""

from __future__ import annotations

import argparse
import sys

from vtc import cli
from vtc.methods import METHODS

PICTURES = "--full --limit 18 --seeds 5"
CLIPS = "--limit 40 --seeds 5"
CHOICE = "--split validation --full --limit 18 --seeds 3 --keep 0.25 0.1"
BALANCES = "--balances 0 0.25 0.75 1"
ALL = "--methods all"
# Elsewhere without what the large runs ask in any case: positions of merged tokens, and frames of the three methods
# for which every question needs a reading of its picture of its own, five times the work.
# But for those that compare frames, that have no budget, and that work in no multimodal LLM
BUDGETED = [name for name, kind in METHODS.items() if kind.budgeted and not kind.rectangle]
STILLS = [name for name in BUDGETED if "frames" not in METHODS[name](keep=0.5).needs]
MERGING = [name for name in STILLS if METHODS[name].merges]
FRAMES_OF = ("idpruner", "zoo_prune", "divprune", "scope", "vispruner", "hiprune", "norm")
PLUS = (*(f"{name}+proportional" for name in MERGING), *(f"{name}+frame" for name in FRAMES_OF), "idpruner+scorer")
MOST = "--methods " + " ".join((*STILLS, *PLUS))

# On the validation split: which share of a frame, which kind
FRAMED = ("divprune", "idpruner", "zoo_prune", "norm")
KINDS = ("", *(f"+frame={kind}" for kind in ("0.25", "0.5", "0.75", "1", "corners", "rotary", "rotary:0.5")))
FRAMES = "--methods " + " ".join(name + kind for name in FRAMED for kind in KINDS)
# Merged tokens at several positions or one, on what asks where things are
PPE = "--methods tome tome+ppe pitome pitome+ppe dpc_knn dpc_knn+ppe visionzip visionzip+ppe"

# The methods for videos, each frame with its own share, and shares by score
OVER_FRAMES = ("divprune", *(f"divprune+shares={score}" for score in ("uniform", "uniqueness", "change")))
VIDEOS = f"--methods evs vidcom2 flashvid {' '.join(OVER_FRAMES)} idpruner idpruner+shares=uniqueness dpc_knn tome"
CHANGES = f"--model tiny_qwen {VIDEOS} --changes --limit 18 --seeds 5 --keep 0.25 0.1"

RUNS = {
    "tiny_qwen": f"--model tiny_qwen {ALL} {PICTURES} {BALANCES}",
    "tiny_qwen-192": f"--model tiny_qwen {MOST} --size 192x192 --keep 0.25 0.1 {PICTURES}",
    "tiny_qwen-384": f"--model tiny_qwen {MOST} --size 384x384 --keep 0.25 0.1 {PICTURES}",
    "tiny_llava": f"--model tiny_llava {ALL} {PICTURES} {BALANCES}",
    "clips-2": f"--model tiny_qwen {MOST} --frames 2 {CLIPS}",
    "clips-4": f"--model tiny_qwen {MOST} --frames 4 --size 192x128 --keep 0.25 0.1 {CLIPS}",
    "video-2": f"{CHANGES} --frames 2",
    "video-8": f"{CHANGES} --frames 8",
    "video-32": f"{CHANGES} --frames 32 --size 128x128",
    "ppe-tiny_qwen": f"--model tiny_qwen {PPE} --full --limit 60 --seeds 5 --keep 0.25 0.1 0.05",
    "ppe-tiny_llava": f"--model tiny_llava {PPE} --full --limit 60 --seeds 5 --keep 0.25 0.1 0.05",
    "validation-tiny_qwen": f"--model tiny_qwen {MOST} {CHOICE} {BALANCES}",
    "validation-tiny_qwen-384": f"--model tiny_qwen {MOST} --size 384x384 {CHOICE} {BALANCES}",
    "validation-tiny_llava": f"--model tiny_llava {MOST} {CHOICE} {BALANCES}",
    "frame-tiny_qwen-192": f"--model tiny_qwen {FRAMES} --size 192x192 {CHOICE}",
    "frame-tiny_qwen": f"--model tiny_qwen {FRAMES} {CHOICE}",
    "frame-tiny_qwen-384": f"--model tiny_qwen {FRAMES} --size 384x384 {CHOICE}",
    "frame-tiny_qwen-448x224": f"--model tiny_qwen {FRAMES} --size 448x224 {CHOICE}",
    "frame-tiny_llava": f"--model tiny_llava {FRAMES} {CHOICE}",
}


def command(name: str, methods: str = "") -> str:
    """A run; with other methods than its own, it goes to a folder of its own, too."""
    words, folder = RUNS[name], f"out/answers/{name}"
    for own in (ALL, MOST, FRAMES, PPE, VIDEOS) if methods else ():
        words, folder = words.replace(own, f"--methods {methods}"), f"out/answers-some/{name}"
    return f"vtc eval scenes {words} --out {folder}"


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("names", nargs="*", help="only those whose names begin so")
    parse.add_argument("--run", action="store_true", help="run them instead of printing them")
    parse.add_argument("--methods", nargs="+", default=[], help="these, in the runs that ask all methods")
    args = parse.parse_args()
    for name in RUNS:
        if args.names and not name.startswith(tuple(args.names)):
            continue
        if args.methods and name.startswith(("frame", "ppe")):
            continue
        line = command(name, " ".join(args.methods))
        print(line, flush=True)
        if args.run and (code := cli.main(line.split()[1:])):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
