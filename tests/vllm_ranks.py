"""Two ranks of tensor parallelism beside Transformers: prints the largest difference of a log-probability."""

import vllm_zoo as zoo
from vllm_server import Served, distance

from vtc.methods import make


def main(folder: str, name: str) -> None:
    method, reference = make(name, keep=0.25), zoo.Reference(folder)
    engine = Served(folder, method, tensor_parallel_size=2, distributed_executor_backend="mp")
    cases = list(zoo.cases("qwen2_5_vl").values())
    answers = engine.answers(cases)
    engine.close()
    print(max(distance(answer, *reference.answer(case, method)) for case, answer in zip(cases, answers, strict=True)))
