"""Train IDPruner's scorer of visual tokens, VisionSelector's two linear maps, for a multimodal LLM that stays as it is.

The scores decide, under a budget that shrinks from all image tokens to `keep`, which of them the model sees; the loss
of the answers goes back into the scorer alone.

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
