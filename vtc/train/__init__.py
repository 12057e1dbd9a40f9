"""Train IDPruner's scorer of visual tokens, VisionSelector's two linear maps, for a multimodal LLM that is itself not
changed.

The scores decide which image tokens the model sees, under a budget that shrinks from all tokens to `keep`; the loss on
the answers is backpropagated into the scorer alone.

    python -m vtc.train --model FOLDER --data data.jsonl --out scorer.safetensors --keep 0.2 --steps 1000

Every line of the data is {"image": "a.jpg" or ["a.jpg", "b.jpg"], "prompt": "...", "answer": "..."}.
"""

from typing import Any

from vtc.checks import renamed
from vtc.train.data import open_examples
from vtc.train.loop import train_scorer

__all__ = ["open_examples", "train_scorer"]


def __getattr__(name: str) -> Any:
    if name != "train_selector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    renamed("vtc.train.train_selector", "train_scorer")
    return train_scorer
