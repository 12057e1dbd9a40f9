"""An engine of its own kind beside Transformers: prints the largest difference of a log-probability."""

import json
import tempfile
from pathlib import Path

import vllm_zoo as zoo
from vllm_server import Served, distance

from vtc.methods import make


def main(family: str, method: str, options: str) -> None:
    """options: of `vllm.LLM`, as JSON."""
    folder = zoo.save(family, Path(tempfile.mkdtemp()))
    chosen, reference = make(method, keep=0.25), zoo.Reference(folder)
    engine = Served(folder, chosen, **json.loads(options))
    cases = list(zoo.cases(family).values())
    answers = engine.answers(cases)
    engine.close()
    print(max(distance(answer, *reference.answer(case, chosen)) for case, answer in zip(cases, answers, strict=True)))
