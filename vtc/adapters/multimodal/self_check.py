"""A multimodal model that no family file describes is tried before it is patched: on made-up image features, a copy of
it with the first layers of its decoder must compute with the patch what the decoder computes when called directly.

Three things are tried: every feature lands at its own placeholder; nothing changes if all tokens stay; and on fewer
tokens, prefill and decoding are the decoder's own on the embeddings of the columns that stay, at their original
positions. These are the model's own, read where it enters its decoder; and once more with a leap between them, since
some decoders use far positions in other ways than near ones.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vtc.adapters.encoders.copies import bare_copy
from vtc.adapters.multimodal import trial
from vtc.adapters.multimodal.cache import cache_name
from vtc.adapters.multimodal.families.base import Family
from vtc.adapters.multimodal.families.generic import Generic
from vtc.adapters.multimodal.families.prompts import beside
from vtc.adapters.multimodal.find import MultimodalSite
from vtc.adapters.multimodal.forwards import word_readers
from vtc.adapters.multimodal.owners import Owners
from vtc.adapters.multimodal.patch import MultimodalPatch
from vtc.adapters.multimodal.support import planes
from vtc.layout import Grid
from vtc.methods import make

STEPS = 3
SEED = 3  # by which the first tokens of an image go: those behind may be read together with the words before it
GRIDS: tuple[Grid, ...] = ((3, 4), (2, 6))  # rows and columns of the tokens of two images
_APART = {"attention_mask", "use_cache", "cache_position", "position_ids", "return_dict"}  # given in other ways
# How an encoder's features, and those for DeepStack, are handed on: one tensor of all images, or a tensor for each.
_FORMS: tuple[tuple[Callable, Callable], ...] = (
    (torch.clone, tuple),
    (tuple, tuple),
    (tuple, lambda x: x.flatten(0, 1)),
)
_checked: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()


class Wrong(Exception):
    """What came out other than it should."""


class _Entered(Exception):
    """The decoder was called."""


def failed(site: MultimodalSite) -> str:
    """Why a model without a family file of its own is refused after a trial; "" = it is not."""
    if not isinstance(site.family, Generic):
        return ""
    wrong, untried = self_check(site)
    if wrong:
        return f"tried on made-up image features, {wrong}"
    if untried and not site.family.proven:  # what was proven on its class holds without a trial
        return f"vtc has not been tried on this class, and could not try it here: {untried}"
    return ""


def self_check(site: MultimodalSite) -> tuple[str, str]:
    """(what is wrong, why it could not be tried); both are "" if all is right."""
    if site.inner not in _checked:
        _checked[site.inner] = _check(site)
    return _checked[site.inner]


def _check(site: MultimodalSite) -> tuple[str, str]:
    try:
        rehearsal = Rehearsal(site.family, site.inner)
        with torch.no_grad(), torch.autocast(rehearsal.device.type, enabled=False):
            rehearsal.run()
    except Wrong as error:
        return str(error), ""
    except Exception as error:  # a foreign model may raise anything
        return "", " ".join(str(error).split()) or type(error).__name__
    return "", ""


class Rehearsal:
    """A small copy of a model that shares its weights, and a prompt for it with two images."""

    form = _FORMS[0]

    def __init__(self, family: Family, inner: Any) -> None:
        self.family, self.image = family, family.modalities[0]
        self.inner = _small(family, inner)
        self.text = getattr(self.inner, family.decoder)
        self.device, self.dtype = trial.place(self.text)
        self.weights = trial.weights(self.inner)
        self.token = family.token(self.inner, self.image, None)
        self.prompt = {name: x.to(self.device) for name, x in _prompt(self.inner, self.token).items()}
        self.visual = (self.prompt["input_ids"] == self.token)[0]
        generator = torch.Generator().manual_seed(0)
        shape = (len(GRIDS), int(self.visual.sum()) // len(GRIDS), self.text.config.hidden_size)
        self.features = torch.randn(shape, generator=generator).to(self.device, self.dtype)
        self.planes = [self.features * (2 + n) for n in range(planes(self.inner, self.text) or 0)]
        self.inner.__dict__[self.image.encode] = _Encoder(self, self.image.encode)

    def run(self) -> None:
        """Raises Wrong, and what the model raises."""
        whole, dense = self.taken(), self.entry()
        self.placed(dense["inputs_embeds"])
        self.readers = dict(self.words())
        with self.patched(1.0):
            if not torch.equal(self.call(**self.prompt).last_hidden_state, whole):
                raise Wrong("with all tokens kept, its output is not what it is without vtc")
        length = len(self.visual)
        positions = dense.get("position_ids")
        if positions is None:  # then the decoder counts columns
            positions = torch.arange(length, device=self.device)[None]
        self.gaps(dense, positions, given=False)
        far = torch.arange(length, device=self.device) > int(self.visual.nonzero().max())
        leap = positions + trial.FAR * far
        try:
            self.call(**self.prompt, position_ids=leap)
        except (IndexError, RuntimeError):  # its table of positions ends before these
            return
        self.gaps(dense, leap, given=True)

    # -- the model ----------------------------------------------------------------------------------------------

    def taken(self) -> Tensor:
        """The output for the prompt, with features in the first form that the class takes."""
        for self.form in _FORMS:
            try:
                return self.call(**self.prompt).last_hidden_state
            except (AttributeError, TypeError) as error:
                failed = error
        raise failed

    def call(self, **given: Any) -> Any:
        if bool((given["input_ids"] == self.token).any()):
            given[self.image.pixels] = torch.empty(1, 0)  # the encoder is not run
        given = {"use_cache": False, "return_dict": True, **given}
        return torch.func.functional_call(self.inner, self.weights, (), given)

    def entry(self, moved: Tensor | None = None) -> dict[str, Any]:
        """What the decoder is handed for the prompt; moved: [tokens] bool, the features to change."""
        seen: dict[str, Any] = {}

        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)
            raise _Entered

        hook, before = self.text.register_forward_pre_hook(record, with_kwargs=True), self.features
        if moved is not None:
            self.features = before + moved.view(*before.shape[:2], 1)
        try:
            self.call(**self.prompt)
        except _Entered:
            pass
        finally:
            self.features = before
            hook.remove()
        return seen

    def words(self) -> Iterator[tuple[nn.Module, Tensor]]:
        """The parts that read words together with those before them, and what they are handed for the prompt."""
        for part in word_readers(self.text):
            seen: list[Tensor] = []
            hook = part.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            try:
                self.call(**self.prompt)
            finally:
                hook.remove()
            yield part, seen[0]

    @contextmanager
    def reading(self, columns: Tensor) -> Iterator[None]:
        """These parts read all words of the prompt, while the decoder is called with the columns that stay."""
        hooks = []
        for part, words in self.readers.items():
            hooks.append(part.register_forward_pre_hook(lambda module, args, words=words: (words, *args[1:])))
            hooks.append(part.register_forward_hook(lambda module, args, made: made[:, columns]))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def patched(self, keep: float) -> Iterator[MultimodalPatch]:
        method = make("random", keep=keep, seed=SEED)
        patch = MultimodalPatch.at(MultimodalSite("", self.family, self.inner, Owners()), method)
        patch.install(self.inner)
        try:
            yield patch
        finally:
            for each in reversed(patch.patched):
                each.remove()

    # -- what is tried ------------------------------------------------------------------------------------------

    def placed(self, embeds: Tensor) -> None:
        """Change every second feature, every second pair and so on: each time the placeholders of these change."""
        places = self.visual.nonzero()[:, 0]
        index = torch.arange(len(places), device=self.device)
        for bit in range(len(places).bit_length()):
            moved = (index >> bit) % 2 == 1
            changed = (self.entry(moved)["inputs_embeds"] != embeds).any(-1)[0].nonzero()[:, 0]
            if not torch.equal(changed, places[moved]):
                raise Wrong("its image features do not land at the placeholders one by one, in order")

    def gaps(self, dense: dict[str, Any], positions: Tensor, given: bool) -> None:
        """Prefill and decoding on half of the tokens. given: the call says the positions, instead of the model."""
        prompt, length = self.prompt, len(self.visual)
        steps = [torch.tensor([[word]], device=self.device) for word in prompt["input_ids"][0, -STEPS:].tolist()]
        after = [positions[..., -1:] + 1 + step for step in range(STEPS)]
        whole = torch.ones(1, length + STEPS, dtype=torch.long, device=self.device)
        whole[:, :length] = prompt["attention_mask"]

        def decode(cache: Any, before: int, told: bool) -> Iterator[Tensor]:
            for step, (word, places) in enumerate(zip(steps, after, strict=True)):
                mask = whole[:, length - before :][:, : before + 1 + step]
                more = {"position_ids": places} if told else {}
                out = self.call(input_ids=word, attention_mask=mask, **more, **self.cached(cache))
                yield out.last_hidden_state[:, -1]

        with self.patched(0.5) as patch:
            cache = self.cache()
            more = {"position_ids": positions} if given else {}
            out = self.call(**prompt, **more, **self.cached(cache)).last_hidden_state[0]
            assert patch.record is not None and patch.record.columns is not None
            columns = patch.record.columns[0]
            got = list(decode(cache, length, given))
        real = prompt["attention_mask"][0, columns] == 1
        columns = columns[real]
        cache = self.cache()
        self.same(out[real], self.directly(dense, columns, positions, cache), "its prefill")
        for one, other in zip(got, decode(cache, len(columns), True), strict=True):
            self.same(one, other, "its decoding")

    def directly(self, dense: dict[str, Any], columns: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """[S, C]: the decoder on the columns that stay of what it is handed for the whole prompt."""
        length = len(self.visual)
        given: dict[str, Any] = {}
        for name, value in dense.items():
            if name in _APART or name == cache_name():
                continue
            if isinstance(value, Tensor) and tuple(value.shape[:2]) == (1, length):
                value = value[:, columns]
            elif isinstance(value, (list, tuple)) and len(value) == len(self.planes):
                number = self.visual.long().cumsum(0) - 1
                value = [plane[number[columns[self.visual[columns]]]] for plane in value]
            given[name] = value
        mask = _cut(dense.get("attention_mask"), columns, self.text.config)
        given["attention_mask"] = torch.ones_like(columns)[None] if mask is None else mask
        here = f"{self.family.decoder}."
        weights = {n.removeprefix(here): w for n, w in self.weights.items() if n.startswith(here)}
        given |= {"position_ids": positions[..., columns], **self.cached(cache)}
        with self.reading(columns):
            return torch.func.functional_call(self.text, weights, (), given).last_hidden_state[0]

    def same(self, one: Tensor, other: Tensor, what: str) -> None:
        if not float((one - other).abs().max()) <= 4 * trial.rounding(other):
            raise Wrong(f"on fewer tokens {what} is not what its decoder computes from them when called directly")

    def cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.text.config)

    def cached(self, cache: Any) -> dict[str, Any]:
        return {cache_name(): cache, "use_cache": True}


class _Encoder:
    """Stands for a model's encoder, and returns the made-up features."""

    def __init__(self, rehearsal: Rehearsal, name: str) -> None:
        self.rehearsal, self.__signature__ = rehearsal, inspect.signature(getattr(rehearsal.inner, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows, level = self.rehearsal.form
        each = [level(plane) for plane in self.rehearsal.planes]
        return SimpleNamespace(pooler_output=rows(self.rehearsal.features), deepstack_features=each)


def _small(family: Family, inner: Any) -> Any:
    """The model with the first layers of its decoder, one of every kind at least: weights shared, all else copied."""
    cut, text = trial.bare(inner), getattr(inner, family.decoder)
    text = trial.bare(getattr(text, "_orig_mod", text))  # as it was before torch.compile
    text._modules["layers"] = trial.first(text.layers)
    if getattr(text, "rotary_emb", None) is not None:
        text._modules["rotary_emb"] = trial.on_hand(text.rotary_emb)
    cut._modules[family.decoder] = text
    known: dict[int, Any] = {id(tensor): tensor for tensor in [*cut.parameters(), *cut.buffers()]}
    config = copy.deepcopy(inner.config, known)
    small = bare_copy(cut, lambda name, old: old, known)
    for part in (config, config.get_text_config()):
        if part._attn_implementation not in ("eager", "sdpa"):
            part._attn_implementation = "sdpa"
    if "rope_deltas" in vars(small):  # of the model's last call
        small.rope_deltas = None
    trial.remember(getattr(small, family.decoder), getattr(inner, family.decoder))
    return small


def _prompt(inner: Any, token: int) -> dict[str, Tensor]:
    """One row, padded on the left: words, an image, words, an image, words; with what the model's forward reads of it
    apart from pixels."""
    special = {value for value in vars(inner.config).values() if isinstance(value, int)} | {token}
    words = [word for word in range(5, 99) if word not in special]
    ids = words[:3]
    for number, (high, wide) in enumerate(GRIDS, start=1):
        ids += [token] * (high * wide) + words[3 * number : 3 * number + 4]
    out = beside(inner, torch.tensor([ids]), token)
    out["attention_mask"][:, 0] = 0
    if "image_grid_thw" in inspect.signature(type(inner).forward).parameters:
        edge = getattr(getattr(inner.config, "vision_config", None), "spatial_merge_size", 1)
        out["image_grid_thw"] = torch.tensor([[1, high * edge, wide * edge] for high, wide in GRIDS])
    return out


def _cut(mask: Any, columns: Tensor, config: Any) -> Any:
    """A mask [1, 1, L, L] that the model makes in front of its decoder, or one for each kind of layer, for the columns
    that stay: which see each other both ways is kept, and a window counts the tokens that are there. None = it makes
    none."""
    if isinstance(mask, dict):
        found = {kind: _cut(one, columns, config if "sliding" in kind else None) for kind, one in mask.items()}
        return None if all(one is None for one in found.values()) else found
    if mask is None or mask.ndim < 4:
        return None
    seen = mask[0, 0][columns][:, columns]
    seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    place = torch.arange(len(columns), device=columns.device)
    allowed = place[None] <= place[:, None]
    window = getattr(config, "sliding_window", None)
    if window:
        allowed &= place[None] > place[:, None] - window
    ahead = seen & (place[None] > place[:, None])
    allowed = allowed | ahead | ahead.T
    if mask.dtype == torch.bool:
        return allowed[None, None]
    return mask.new_zeros(allowed.shape).masked_fill(~allowed, torch.finfo(mask.dtype).min)[None, None]
