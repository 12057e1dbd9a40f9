"""The table of docs/serving.md: `vtc bench serve` on a decoder that weighs more than its tower, with random weights.

python tools/serve_table.py --out /tmp/wide [OPTIONS OF vLLM ...]      # in an environment with vLLM; minutes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from vtc.checkpoints import tiny
from vtc.eval import common

ROOT = Path(__file__).resolve().parent.parent
LOAD = ["--concurrency", "1", "8", "32", "--requests", "8", "--rounds", "2", "--words", "8"]


def make(folder: Path) -> str:
    """tiny_qwen's tower and words, with a decoder of 16 layers of width 384: 30 million parameters."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(tiny.place("tiny_qwen"))
    text, config.architectures = config.text_config, ["Qwen2_5_VLForConditionalGeneration"]
    text.hidden_size = config.vision_config.out_hidden_size = 384
    text.intermediate_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 1024, 16, 6, 2
    text.head_dim, text.layer_types = 64, ["full_attention"] * 16
    text.rope_parameters["mrope_section"] = [8, 12, 12]
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    transformers.AutoProcessor.from_pretrained(tiny.place("tiny_qwen")).save_pretrained(folder)
    return str(folder)


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parse.add_argument("--out", type=Path, required=True, help="folder for the model")
    args, more = parse.parse_known_args()
    model, body = make(args.out), []
    command = [sys.executable, "-m", "vtc", "bench", "serve", model, "--method", "divprune", "--keep", "0.25"]
    done = subprocess.run([*command, *LOAD, "--json", *more], stdout=subprocess.PIPE, text=True, check=True)
    for row in json.loads(done.stdout)["rows"]:
        dense, kept = row["prompt"]
        spread = f"{row['faster']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        body.append(["divprune", f"{dense} to {kept}", str(row["concurrency"]), spread, f"{row['sooner']:.2f}"])
    head = [
        "method",
        "prompt",
        "at once",
        "requests a second, times dense's",
        "time to first token, dense's above ours",
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    about = (
        "A decoder of 16 layers of width 384 with random weights behind tiny_qwen's tower, pictures of 448x448, "
        f"answers of {LOAD[-1]} tokens, medians of {LOAD[-3]} rounds (extremes). {common.environment()}."
    )
    common.put(ROOT / "docs" / "serving.md", "served", "\n".join([*lines, "", about]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
