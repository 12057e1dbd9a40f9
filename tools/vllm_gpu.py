#!/usr/bin/env python3
"""What no processor can show of vtc in vLLM: both of its runners on a GPU, CUDA graphs, two ranks of a GPU each.

    pip install vllm==0.32.0 pytest && pip install . && python tools/vllm_gpu.py        # on a machine with a GPU

Every line is an engine in a process of its own, asked what tests/test_vllm_engine.py asks, in float32, beside
Transformers on the processor: the largest difference of a log-probability. Exit code 1 = one is too large.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
MOST = 1e-3  # a GPU's attention in float32 adds in another order than a processor's
EAGER = {"enforce_eager": True}
CASES = [
    (runner, family, method, options)
    for runner in ("0", "1")
    for family, method, options in (
        ("qwen2_5_vl", "divprune", EAGER),
        ("qwen2_5_vl", "visionzip", EAGER),
        ("qwen2_5_vl", "tome", {"enforce_eager": False}),  # compiled, CUDA graphs
        ("qwen3_vl", "idpruner", {"enforce_eager": False}),
        ("glm4v", "pitome", EAGER),
        ("llava", "hiprune", EAGER),
        ("internvl", "dpc_knn", EAGER),
        ("qwen2_5_vl", "divprune", {**EAGER, "tensor_parallel_size": 2}),
        ("qwen2_5_vl", "visionzip", {**EAGER, "tensor_parallel_size": 2}),
    )
]


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("vllm_gpu: there is no GPU here", file=sys.stderr)
        return 1
    print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}", flush=True)
    bad = 0
    for runner, family, method, options in CASES:
        about = f"runner V{int(runner) + 1}, {family}, {method}, {json.dumps(options)}"
        if options.get("tensor_parallel_size", 1) > torch.cuda.device_count():
            print(f"{about}: not run, it takes two GPUs", flush=True)
            continue
        code = "import sys, vllm_ranks\nif __name__ == '__main__': vllm_ranks.main(*sys.argv[1:])"
        env = os.environ | {"PYTHONPATH": str(TESTS), "VLLM_USE_V2_MODEL_RUNNER": runner}
        command = [sys.executable, "-c", code, family, method, json.dumps({"block_size": 16, **options})]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        off = float(done.stdout.split()[-1]) if done.returncode == 0 else float("inf")
        bad += off > MOST
        print(f"{about}: {off:.1e}{' TOO FAR' if off > MOST else ''}", flush=True)
        if done.returncode:
            print("\n".join(done.stderr.splitlines()[-15:]), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
