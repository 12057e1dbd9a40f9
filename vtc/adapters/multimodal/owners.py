"""The models that wrap a multimodal one: what they do with ids, masks and labels once it returns fewer columns.

Known wrappers pass the call on, or slice and project the output, or pool each row's last token. A retrieval model's own
forward runs on the shorter prompt (retrievers.py), and a pipeline of sentence-transformers gets its mask and ids cut.
Any other may index the output by columns of the full prompt, so it is refused with an error that names it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtc.adapters.multimodal.kinds import foreign, known_as
from vtc.adapters.multimodal.retrievers import Retriever, retriever

# Modules that pass the call on unchanged.
_WRAPPERS = {"torch.OptimizedModule", "torch.DataParallel", "torch.DistributedDataParallel"}
_WRAPPERS |= {"torch.FullyShardedDataParallel", "peft.PeftModel", "peft.PeftMixedModel", "peft.BaseTuner"}
_CLASSIFIERS = {"GenericForSequenceClassification", "Gemma3ForSequenceClassification"}
_READERS = {"ShieldGemma2ForImageClassification"}  # it reads the last column of the logits, which is still the last
# Of sentence-transformers: what holds the modules of a pipeline, which hand on a dictionary of features.
_PIPELINES = {"SentenceTransformer", "MultiVectorEncoder"}
_REASONS = {
    "PI0Model": "puts the image features into the embeddings itself, past what vtc patches",
    "XLoraModel": "runs it twice and weighs its columns",
}


@dataclass(frozen=True)
class Owners:
    """The known wrappers of one model: those with a language head, those that pool each row's last token, the retrieval
    model around it (it may be one itself), and the modules of sentence-transformers that call it."""

    heads: tuple[nn.Module, ...] = ()
    classifiers: tuple[nn.Module, ...] = ()
    retriever: Retriever | None = None
    callers: tuple[nn.Module, ...] = ()

    def outer(self, inner: Any) -> Any:
        """The model whose own forward runs on the shorter prompt."""
        return inner if self.retriever is None else self.retriever.module


def around(root: nn.Module, inner: nn.Module, families: Collection[str], head: str = "") -> Owners | str:
    """The models in `root` that contain `inner`; or why one of them is not known. `families`: the class names of
    possible inner models; their heads have similar names and come from transformers, or from the package of `inner`."""
    names = {f"{name.removesuffix('Model')}ForConditionalGeneration" for name in families} | ({head} - {""})
    home = type(inner).__module__.split(".")[0]
    heads: list[nn.Module] = []
    classifiers, callers = [], []
    outer = retriever(inner, inner)
    if isinstance(outer, str):
        return outer
    for owner, path in _holders(root, inner):
        found = retriever(owner, inner) if outer is None else None
        if isinstance(found, str):
            return found
        if found is not None:
            outer, heads = found, []  # what lies between runs on the shorter prompt
            continue
        kind, who = known_as(owner, {*names, *_CLASSIFIERS, *_READERS}, home), type(owner).__name__
        way = f"; compress model.{path} itself if {who} only calls it"
        if who in _REASONS:
            return f"{who} holds it and {_REASONS[who]}; compress model.{path} itself, and call that"
        if kind and foreign(owner, kind):
            return f"{who} holds it, with a forward that is not that of transformers' {kind}{way}"
        if known_as(owner, {"Transformer"}, "sentence_transformers") and not foreign(owner, "Transformer"):
            callers.append(owner)
            continue
        if not kind and not _hands_on(owner):
            return f"{who} holds it, and vtc does not know what {who} does with ids, masks and labels behind it{way}"
        if kind and outer is not None:
            return f"{who} holds the retrieval model {type(outer.module).__name__}, and vtc does not know what for{way}"
        if kind in names:
            heads.append(owner)
        elif kind in _CLASSIFIERS:
            classifiers.append(owner)
    return Owners(tuple(heads), tuple(classifiers), outer, tuple(callers))


def _holders(root: nn.Module, inner: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module in `root` that holds `inner`, the nearest first, each with the path in `root` of what holds it."""
    seen: set[nn.Module] = set()
    for path, module in root.named_modules(remove_duplicate=False):
        parts = path.split(".") if path else []
        for end in range(len(parts) - 1, -1, -1) if module is inner else ():
            owner = root.get_submodule(".".join(parts[:end]))
            if owner not in seen:
                seen.add(owner)
                yield owner, ".".join(parts[: end + 1])


def _hands_on(owner: nn.Module) -> bool:
    """Whether a module calls its inner module with its own arguments, and returns the result."""
    if type(owner) is nn.Sequential:
        return len(owner) == 1
    if type(owner) in (nn.ModuleList, nn.ModuleDict):  # these are never called themselves
        return True
    pipeline = known_as(owner, _PIPELINES, "sentence_transformers")
    if pipeline and not foreign(owner, pipeline):
        return True
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(owner).__mro__}
    return bool(names & _WRAPPERS) and type(owner).forward.__module__.split(".")[0] in ("torch", "peft")  # type: ignore[attr-defined]
