"""What fewer image tokens bring a server: requests a second and time to first token of an engine of vLLM, dense and
compressed in turns. One engine answers both: a request at keep=1 is vLLM's own."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from vtc.errors import OptionError, UnsupportedModelError
from vtc.methods import Method

Tick = Callable[[], Any]
_SEED = 5  # of what the pictures show


@dataclass(frozen=True)
class Load:
    """What is asked.

    Args:
        concurrency: requests under way at once. requests: in a round, at least as many as are under way.
        size: width and height of each picture, in pixels. words: tokens of every answer.
    """

    concurrency: Sequence[int] = (1, 8, 32)
    requests: int = 32
    size: tuple[int, int] = (448, 448)
    words: int = 16
    rounds: int = 3

    def __post_init__(self) -> None:
        numbers = (*self.concurrency, self.requests, *self.size, self.words, self.rounds)
        if not self.concurrency or min(numbers) < 1:
            raise OptionError(f"{self}: every number has to be at least 1")


@dataclass(frozen=True)
class Served:
    """One concurrency; medians over the rounds, ratios from the same round.

    Attributes:
        prompt: tokens of a prompt, (dense, compressed).
        rate: requests a second, (dense, compressed); faster: their ratio, low and high: its extremes.
        first: seconds to the first token, (dense, compressed), the median request; sooner: their ratio, dense above
            compressed.
    """

    concurrency: int
    prompt: tuple[int, int]
    rate: tuple[float, float]
    faster: float
    low: float
    high: float
    first: tuple[float, float]
    sooner: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def served(
    model: str, method: Method, positions: str, load: Load, arguments: Sequence[str] = (), tick: Tick = lambda: None
) -> list[Served]:
    """Ask an engine of `model`, made from vLLM's own `arguments`; one row per concurrency.

    Raises:
        OptionError, UnsupportedModelError: as `vtc.vllm.enable`, or the model has no chat template.
    """
    from vtc.vllm import enable

    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # what is measured goes to the other
    enable(method, positions=positions)
    return asyncio.run(_served(model, load, arguments, tick))


async def _served(model: str, load: Load, arguments: Sequence[str], tick: Tick) -> list[Served]:
    from vllm import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    given = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vtc bench serve"))
    args = AsyncEngineArgs.from_cli_args(given.parse_args(["--model", model, *arguments]))
    args.enable_prefix_caching, args.mm_processor_cache_gb = False, 0  # every request does its own work
    prompt = _prompt(model, args.trust_remote_code)
    engine = AsyncLLM.from_engine_args(args)
    try:
        rows = []
        for level in load.concurrency:
            await _round(engine, prompt, load, level, False, min(level, load.requests))  # warms up
            await _round(engine, prompt, load, level, True, min(level, load.requests))
            found: list[dict[bool, _Round]] = []
            for number in range(load.rounds):
                pair = {}
                for dense in (True, False) if number % 2 else (False, True):
                    pair[dense] = await _round(engine, prompt, load, level, dense, max(level, load.requests))
                    tick()
                found.append(pair)
            rows.append(_row(level, found))
        return rows
    finally:
        engine.shutdown()


@dataclass(frozen=True)
class _Round:
    rate: float
    first: float
    prompt: int


async def _round(engine: Any, prompt: str, load: Load, level: int, dense: bool, count: int) -> _Round:
    """`count` requests, `level` of them under way."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0, max_tokens=load.words, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    gate, firsts, prompts = asyncio.Semaphore(level), list[float](), list[int]()
    pictures = _pictures(load.size, count)

    async def ask(number: int) -> None:
        async with gate:
            began, answered = time.perf_counter(), False
            request: dict[str, Any] = {"prompt": prompt, "multi_modal_data": {"image": pictures[number]}}
            if dense:
                request["mm_processor_kwargs"] = {"vtc": {"keep": 1.0}}
            async for out in engine.generate(request, sampling, f"vtc-{time.perf_counter_ns()}-{number}"):
                if not answered and out.outputs and out.outputs[0].token_ids:
                    answered = True
                    firsts.append(time.perf_counter() - began)
                    prompts.append(len(out.prompt_token_ids))

    start = time.perf_counter()
    await asyncio.gather(*(ask(number) for number in range(count)))
    return _Round(count / (time.perf_counter() - start), median(firsts), prompts[0])


def _row(level: int, found: Sequence[dict[bool, _Round]]) -> Served:
    faster = [pair[False].rate / pair[True].rate for pair in found]

    def both(name: str) -> Any:
        return tuple(median(getattr(pair[dense], name) for pair in found) for dense in (True, False))

    prompt = found[0][True].prompt, found[0][False].prompt
    sooner = median(pair[True].first / pair[False].first for pair in found)
    return Served(level, prompt, both("rate"), median(faster), min(faster), max(faster), both("first"), sooner)


def _prompt(model: str, remote: bool) -> str:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model, trust_remote_code=remote)
    if not getattr(processor, "chat_template", None):
        raise UnsupportedModelError(f"{model} has no chat template, from which vtc bench serve would make its prompts")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def _pictures(size: tuple[int, int], count: int) -> list[Any]:
    """Cut-outs of the photograph that comes along, another for every number."""
    import numpy as np

    from vtc.models.images import example_photo, load_image

    photo, found = load_image(example_photo()), []
    for number in range(count):
        rng = np.random.default_rng([_SEED, number])
        side = rng.uniform(0.4, 1, 2) * photo.size
        left, top = rng.uniform(0, 1, 2) * (photo.size - side)
        found.append(photo.resize(size, box=(left, top, left + side[0], top + side[1])))
    return found
