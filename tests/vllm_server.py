"""An engine of vLLM in this process, with vtc, whose method can be changed: to start one takes ten seconds."""

from __future__ import annotations

import os
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
import torch  # noqa: E402
import vllm_zoo as zoo  # noqa: E402

import vtc.vllm  # noqa: E402
from vtc.methods import Method  # noqa: E402
from vtc.vllm.settings import Settings  # noqa: E402

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 8,
    "max_logprobs": 20,
    "max_model_len": 512,
    "block_size": 32,
}


class Served:
    """A folder's model; method None = vtc is not configured."""

    def __init__(self, folder: str, method: Method | None, positions: str = "keep", **more: Any) -> None:
        from vllm import LLM

        if method is None:
            vtc.vllm.disable()
        else:
            vtc.vllm.enable(method, positions=positions)
        self.positions = positions
        self.llm = LLM(folder, **{**ENGINE, "max_num_batched_tokens": 2048, "disable_log_stats": False, **more})

    def use(self, method: Method) -> None:
        """Another method from here on."""
        processor = self.llm.llm_engine.renderer.mm_processor
        type(processor).settings = Settings(method, self.positions)
        self.llm.apply_model(lambda model: model.vtc_use(method))

    def model(self) -> Any:
        return self.llm.apply_model(lambda model: model)[0]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    @property
    def preempted(self) -> int:
        """How many times a request was thrown out."""
        return sum(each.value for each in self.llm.get_metrics() if each.name == "vllm:num_preemptions")

    def answers(self, cases: list[Any], keeps: list[Any] | None = None, **more: Any) -> list[Any]:
        """(tokens, {token: log-probability} of each step, length of the prompt) of every case, all at once."""
        from vllm import SamplingParams

        options = {"temperature": 0, "max_tokens": zoo.STEPS, "min_tokens": zoo.STEPS, "logprobs": 20, **more}
        prompts: list[Any] = []
        for i, (words, pictures) in enumerate(cases):
            prompts.append({"prompt": words})
            if pictures:
                prompts[-1]["multi_modal_data"] = {"image": pictures}
            if keeps is not None and keeps[i] is not None:
                prompts[-1]["mm_processor_kwargs"] = {"vtc": {"keep": keeps[i]}}
        found = []
        self.cached = 0  # tokens of these prompts that a cache held
        for out in self.llm.generate(prompts, SamplingParams(**options), use_tqdm=False):
            self.cached += out.num_cached_tokens or 0
            steps = [{token: each.logprob for token, each in step.items()} for step in out.outputs[0].logprobs]
            found.append((list(out.outputs[0].token_ids), steps, len(out.prompt_token_ids)))
        return found


def distance(answer: Any, tokens: list[int], logits: torch.Tensor) -> float:
    """The largest difference of a log-probability, over the 20 likeliest tokens of every step; infinite if the tokens
    are others."""
    mine, steps, _ = answer
    if mine != tokens:
        return float("inf")
    return max(abs(value - float(logits[i, token])) for i, step in enumerate(steps) for token, value in step.items())
