"""The command line of `vtc`: its commands, their options and help texts."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn


def fail(message: str) -> None:
    """Print one line about what went wrong."""
    sys.stderr.write("vtc: error: " + " ".join(message.split()) + "\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number: give a fraction such as 0.9, what stays")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: give a fraction above 0 and at most 1, what stays")
    return value


def count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: give a whole number of at least 1")
    return value


def size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give width and height in pixels, such as 448x224")
    return int(found[1]), int(found[2])


def _positions(add: Callable[..., Any]) -> None:
    """Add a method's option `positions`, as two options."""
    add("--positions", choices=("original", "ppe"), help="of merged tokens: their anchor's, or their members' (PPE)")
    add("--slots", type=count, metavar="K", help="PPE: of how many members (default: the most that fit, up to 8)")


def parser(runs: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser of the whole command line; `runs` maps each command to the function it calls."""
    from vtc import __version__

    top = _Parser(
        prog="vtc",
        description="Fewer visual tokens for the vision encoders you already have.",
        epilog="Example: vtc run --image photo.jpg --method tome --flops 0.6\nEvery command has its own --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"vtc {__version__}")
    top.set_defaults(run=lambda args: sys.stdout.write(top.format_help()) and 0)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, brief: str, text: str, example: str) -> argparse.ArgumentParser:
        words: dict[str, Any] = {"help": brief, "description": text, "epilog": f"Example: {example}"}
        added = commands.add_parser(name, **words, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name != "serve":
            added.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        if name in ("run", "bench", "demo"):
            added.add_argument("--threads", type=count, metavar="N", help="processor threads (default: as torch says)")
        added.set_defaults(run=runs[name])
        return added

    add = command(
        "run",
        "compress a real encoder on a photograph, or ask a multimodal LLM about it",
        "Without --model: sends a photograph through DINOv2 ViT-S/14 (real weights, no network) as it is and with\n"
        "fewer tokens. Prints tokens, multiply-adds, time and how near the features stay, and draws a picture of it.\n"
        "With --model: asks a multimodal LLM about the images, as it is and with fewer visual tokens. Prints both\n"
        "answers, tokens, time to first token, tokens per second and the size of the KV cache.",
        "vtc run --image photo.jpg --method tome --keep 0.9 --out tome.png\n"
        '         vtc run --model FOLDER --image photo.jpg --prompt "What is this?" --method idpruner --keep 0.25',
    ).add_argument
    add("--model", metavar="PATH_OR_ID", help="a multimodal LLM: a folder, or an id on the Hub, which is downloaded")
    add(
        "--image",
        action="append",
        metavar="PATH",
        help="a picture (default: one that comes along); LLM: may be repeated",
    )
    add(
        "--method",
        metavar="NAME",
        help="see `vtc list` (default: pitome; LLM: idpruner); where it merges, +ppe or +proportional may follow",
    )
    one = commands.choices["run"].add_mutually_exclusive_group().add_argument
    one(
        "--keep",
        type=fraction,
        metavar="Q",
        help="fraction of the tokens that every layer keeps; LLM: that stays (0.25)",
    )
    one("--tokens", type=count, metavar="N", help="number of image tokens left at the end; LLM: of each image")
    one("--flops", type=fraction, metavar="F", help="encoder: fraction of the arithmetic that remains (default: 0.5)")
    add("--preset", metavar="NAME", help="a preset of PiToMe")
    add("--size", type=count, metavar="PX", help="encoder: side of the image in pixels (default: 224)")
    add(
        "--out",
        metavar="PNG",
        help="the picture to write (encoder: vtc-run.png by default; LLM: of its groups, if given)",
    )
    add("--repeats", type=count, metavar="N", help="timed runs of each (default: 5; LLM: 3)")
    add("--prompt", metavar="TEXT", help="LLM: the question (default: Describe this image.)")
    add("--where", choices=("llm", "tower"), help="LLM: tokens go at its input (default) or inside its vision tower")
    add("--pooled", action="store_true", help="LLM: one budget for all images together")
    _positions(add)
    add("--max-new-tokens", type=count, metavar="N", help="LLM: length of the answer (default: 64)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="LLM: of the weights (default: as they were saved)")
    add("--device", metavar="NAME", help="LLM: cpu (default), cuda, ...")
    add("--trust-remote-code", action="store_true", help="LLM: run code that comes with the model")

    command("list", "methods and model families", "Lists the methods and the model families.", "vtc list --json")
    command(
        "list-models",
        "which models are supported, by which methods, or why not",
        "Lists the models that vtc was asked of (all, or those with WORD in their name): the multimodal LLMs that the\n"
        "tests build, and the vision encoders of the registries of timm, open_clip and transformers.",
        "vtc list-models dinov2",
    ).add_argument("word", nargs="?", default="", metavar="WORD", help="a part of a name: of a class, type or model")
    models = "dinov2-small, timm:NAME, open_clip:NAME, hf:FOLDER_OR_ID"
    folder = "or the folder or id of a multimodal LLM"
    add = command(
        "explain",
        "say what would be patched in a model, or why not",
        "Says which layers of a model would get fewer tokens, and what cannot and why. Loads no weights.\n"
        "Ends with 0 if the model can be compressed and with 1 if not.",
        "vtc explain --model timm:vit_base_patch16_224 --method pitome",
    ).add_argument
    add("--model", required=True, metavar="NAME", help=f"{models}, {folder}")
    add("--method", metavar="NAME", help="also ask whether this method fits (see `vtc list`)")
    _positions(add)
    add("--download", action="store_true", help="let Hugging Face fetch a configuration that is not here yet")

    add = command(
        "bench",
        "measure the speed-up on this machine",
        "Runs a model dense and compressed in turns and compares the speed-up with what the multiply-adds promise.\n"
        "Also measures what a patched model costs that keeps all its tokens.\n"
        "A multimodal LLM is timed from the pixels to its first token, part by part.",
        "vtc bench --methods tome pitome --batch 16 --size 224\n"
        "         vtc bench --self-check --images FOLDER --model FOLDER_OR_ID --keep 0.5 0.25\n"
        "         vtc bench --model llava-0.5b --method idpruner zoo_prune --keep 1 0.5 0.25 0.1",
    ).add_argument
    add(
        "--model",
        default="dinov2-small",
        metavar="NAME",
        help=f"{models}, {folder}, llava-0.5b, qwen2.5-vl-0.5b; all but the first with random weights",
    )
    add("--methods", "--method", nargs="+", metavar="NAME", help="methods (default: two, or four for an LLM)")
    one = commands.choices["bench"].add_mutually_exclusive_group().add_argument
    one("--flops", type=fraction, metavar="F", help="encoder: fraction of the arithmetic left (default: 0.55)")
    one("--keep", type=fraction, nargs="+", metavar="Q", help="LLM: fractions that stay (default: 1 0.5 0.25 0.1)")
    one("--tokens", type=count, metavar="N", help="LLM: number of image tokens that stay")
    _positions(add)
    add("--batch", type=count, metavar="N", help="encoder: images at once (default: 16)")
    add("--size", type=count, metavar="PX", help="side of the images (default: the model's own; 224 for dinov2-small)")
    add("--repeats", type=count, metavar="N", help="rounds that count (default: 9; LLM: 3)")
    add("--warmup", type=count, metavar="N", help="rounds before that (default: 2; LLM: 1)")
    add(
        "--self-check", action="store_true", help="tokens, time and fidelity of your model on your own pictures instead"
    )
    add("--images", metavar="FOLDER", help="self-check: the pictures")
    add("--prompt", metavar="TEXT", help="self-check, LLM: the question (default: Describe this image.)")
    add("--download", action="store_true", help="let Hugging Face fetch what is not here yet (self-check: weights too)")
    _bench_serve(commands.choices["bench"], runs["bench serve"])

    add = command(
        "eval",
        "measure what compression costs in quality",
        "elpv      accuracy of a linear probe and of nearest neighbours on real images of solar cells\n"
        "photos    how near the features of real photographs stay to the dense ones\n"
        "spectral  how much the token graph's spectrum changes, layer by layer\n"
        "positions where things are, asked of merged tokens: PPE against the anchor's position\n"
        "scenes    whether a multimodal LLM still answers right: questions about drawn scenes\n"
        "clip      zero-shot accuracy of an open_clip model on a data set of clip_benchmark\n"
        "retrieval pages found by their words with fewer vectors, or how true a corpus of yours stays",
        "vtc eval elpv --images 200 --out results\n"
        "         vtc eval scenes --model FOLDER --methods all --keep 0.5 0.25 0.1 --out out/scenes",
    ).add_argument
    tasks = ("elpv", "photos", "spectral", "positions", "scenes", "clip", "retrieval")
    add("task", choices=tasks, help="what to measure")
    add("--images", type=count, metavar="N", help="how many images (default: all, or what is enough)")
    add(
        "--levels",
        type=fraction,
        nargs="+",
        metavar="F",
        help="fractions of the multiply-adds (positions: of the tokens) that remain",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of the model (default: float32)")
    add(
        "--out",
        "--output",
        metavar="FOLDER",
        help="write CSV, table and figure there (scenes: out/scenes, and goes on)",
    )
    add(
        "--model",
        metavar="NAME",
        help="scenes: the folder or id of a model; clip: as open_clip names it",
    )
    add(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="methods; scenes: or all (default), random and downsample always; clip: default those and tome, pitome; "
        "retrieval: poolings",
    )
    add(
        "--keep",
        type=fraction,
        nargs="+",
        metavar="Q",
        help="scenes: fractions that stay (default: 0.5 0.25 0.1 0.05); retrieval: when a page is encoded",
    )
    add("--limit", type=count, metavar="N", help="scenes: how many for every seed (default: 40)")
    add("--seeds", type=count, metavar="N", help="scenes: how many sets of scenes (default: 5)")
    add("--balances", type=float, nargs="+", metavar="B", help="scenes: IDPruner at these balances too")
    add("--scorer", metavar="SAFETENSORS", help="scenes: a scorer from vtc.train, for idpruner+scorer")
    add("--frames", type=count, metavar="N", help="scenes: clips of 2 to 8, 16 or 32 frames")
    add("--changes", action="store_true", default=None, help="scenes: of clips, also what comes and goes")
    add("--size", type=size, metavar="WxH", help="scenes: pixels of a picture (default: 256x256)")
    add("--canvas", type=size, metavar="WxH", help="scenes: letterboxed on so many pixels")
    add("--pictures", type=count, metavar="N", help="scenes: so many in a prompt, with a question about one of them")
    add("--full", action="store_true", default=None, help="scenes: with numbers to read and photographs behind, too")
    add("--split", choices=("validation", "test"), help="scenes, clip: to choose by, or to report (default)")
    add("--data", metavar="FOLDER", help="clip: the data set, by default a webdataset with the names of its classes")
    add("--dataset", metavar="NAME", help="clip: as clip_benchmark names it, if FOLDER is no webdataset: cifar10 ...")
    add("--pages", type=count, metavar="N", help="retrieval: how many are drawn (default: 160)")
    add("--queries", type=count, metavar="N", help="retrieval: how many (default: 500)")
    add("--factors", type=float, nargs="+", metavar="F", help="retrieval: how many times fewer vectors")
    add("--embeddings", metavar="SAFETENSORS", help="retrieval: a corpus of yours, a tensor [n, D] for each page")
    add("--pretrained", metavar="NAME", help="clip: the weights, as open_clip names them, or a file")

    add = command(
        "demo",
        "see, ask, watch and find in a browser",
        "Serves a page, which needs no network: a photograph through a real encoder, layer by layer, and questions to\n"
        "a multimodal LLM, as it is and with fewer visual tokens.",
        "vtc demo --port 7860",
    ).add_argument
    add(
        "--host", metavar="ADDRESS", help="where to listen (default: 127.0.0.1, this machine alone; 0.0.0.0: everybody)"
    )
    add("--port", type=count, metavar="N", help="default: the first free one from 7860 on")

    serving = command(
        "serve",
        "a server with fewer image tokens, by vLLM",
        "Starts vLLM's own server, whose requests spend fewer tokens on images. Everything else, such as --port, is\n"
        "for vLLM, and stands behind MODEL.",
        "vtc serve Qwen/Qwen2.5-VL-3B-Instruct --method divprune --keep 0.25 --max-model-len 8192",
    )
    _served(serving)
    return top


def _bench_serve(bench: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """`vtc bench serve`."""
    inside = bench.add_subparsers(title="another measurement", metavar="serve", parser_class=_Parser)
    served = inside.add_parser(
        "serve",
        help="requests a second and time to first token in vLLM; see vtc bench serve --help",
        description="Starts an engine of vLLM, asks it about pictures, dense and compressed in turns, and prints\n"
        "requests a second and time to first token. Everything else is for vLLM, and stands behind MODEL.",
        epilog="Example: vtc bench serve Qwen/Qwen2.5-VL-3B-Instruct --method divprune --keep 0.25",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    served.set_defaults(run=run)
    add = served.add_argument
    _served(served)
    add("--concurrency", type=count, nargs="+", default=[1, 8, 32], metavar="N", help="requests at once (1 8 32)")
    add("--requests", type=count, default=32, metavar="N", help="in a round, at least those at once (32)")
    add("--picture", type=size, default=(448, 448), metavar="WxH", help="size of each picture (448x448)")
    add("--words", type=count, default=16, metavar="N", help="tokens of every answer (16)")
    add("--rounds", type=count, default=3, metavar="N", help="rounds of each (3)")
    add("--json", action="store_true", help="print one JSON document and nothing else")


def _served(parser: argparse.ArgumentParser) -> None:
    """What is served, and how it is compressed; the rest of the line is vLLM's."""
    parser.allow_abbrev = False  # vLLM's options may begin like these
    parser.set_defaults(others=True)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, or an id on the Hub")
    add("--method", required=True, metavar="NAME", help="vtc list names them; those that cannot run in vLLM say why")
    some = parser.add_mutually_exclusive_group(required=True)
    some.add_argument("--keep", type=fraction, metavar="Q", help="the fraction of each image's tokens that stays")
    some.add_argument("--tokens", type=count, metavar="N", help="the number of each image's tokens that stays")
    add("--importance", metavar="NAME", help="for methods that rank: norm, attention ...")
    add("--positions", choices=("keep", "compact"), default="keep", help="compact: no gaps, of models with one axis")
