"""Says of each class what runs: `python -m mllm_classes [name ...]`, with `tests` on the path."""

from __future__ import annotations

import sys
import time
import traceback

import torch
import transformers
from mllm_zoo import PROMPTS
from torch import Tensor

from . import CASES, CLASSES, alone, build, inputs


def _last(model: torch.nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The logits behind the last token of each row, whichever side the padding is on."""
    with torch.no_grad():
        logits = model(**given).logits
    assert torch.isfinite(logits[given["attention_mask"].bool()]).all(), "not finite"
    last = (given["attention_mask"] * torch.arange(given["attention_mask"].shape[1])).argmax(1)
    return logits[torch.arange(len(logits)), last]


def _first(model: torch.nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The logits behind a prompt as `generate` runs it, which counts positions by the mask."""
    out = model.generate(
        **given, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, use_cache=True
    )
    return out.logits[0]


def _answers(name: str, model: torch.nn.Module) -> str:
    """How far the answer moves with two words changing places, and with the pixels turned round."""
    given = inputs(name, "single")
    before = _last(model, given)
    other = dict(given)
    other["input_ids"] = given["input_ids"].clone()
    other["input_ids"][0, [-3, -5]] = given["input_ids"][0, [-5, -3]]
    order = (_last(model, other) - before).abs().max()
    said = [f"order {order:.1e}"]
    for case in ("single", "video")[: 2 if "video" in CASES[name] else 1]:
        given = inputs(name, case)
        pixels = {key: value.flip(-1) if "pixel_values" in key else value for key, value in given.items()}
        said.append(f"{case} pixels {(_last(model, pixels) - _last(model, given)).abs().max():.1e}")
    return " ".join(said)


def check(name: str) -> str:
    torch.manual_seed(0)
    start = time.time()
    model = build(name, fresh=True)
    said = [f"{name:22} build {time.time() - start:4.1f}s {sum(p.numel() for p in model.parameters()) / 1e3:5.0f}k"]
    for case in CASES[name]:
        _last(model, inputs(name, case))
    said.append("forward " + "/".join(str(inputs(name, case)["input_ids"].shape[1]) for case in CASES[name]))
    for case in ("single", "ragged"):
        given = inputs(name, case)
        out = model.generate(**given, max_new_tokens=3, do_sample=False)
        assert out.shape[1] in (3, given["input_ids"].shape[1] + 3), out.shape
    said.append("generate ok")
    for how, answer in (("forward", _last), ("generate", _first)):
        for case in ("ragged", "mixed", "ragged_right")[: 3 if how == "forward" else 2]:
            together = answer(model, inputs(name, case))
            single = torch.cat([answer(model, alone(name, case, row)) for row in range(len(PROMPTS[case]))])
            worst = (together - single).abs().amax(1)
            if worst.max() > 1e-4:
                said.append(f"{how} {case} UNEQUAL " + " ".join(f"{value:.1e}" for value in worst))
    said.append(_answers(name, model))
    if CLASSES[name].eager:
        eager = build(name, "eager", fresh=True)
        worst = float((_last(eager, inputs(name, "single")) - _last(model, inputs(name, "single"))).abs().max())
        said.append(f"eager {worst:.0e}")
    else:
        said.append("no eager")
    return " | ".join(said)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for wanted in sys.argv[1:] or CLASSES:
        began = time.time()
        try:
            print(check(wanted), f"| {time.time() - began:.1f}s", flush=True)
        except Exception as error:
            print(f"{wanted:22} FAILS {type(error).__name__}: {error}"[:300], flush=True)
            if len(sys.argv) == 2:
                traceback.print_exc()
