"""How a library file describes the encoders it finds: how their blocks work (`Block`), where they are
(`EncoderSite`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vtc.adapters.encoders.masks import given_mask
from vtc.errors import first_line
from vtc.layout import Grid
from vtc.macs import EncoderMACs

NOT_ROTARY = "its positions are not rotary, so a merged token has none to carry"


def plain_example(block: nn.Module, prefix: int) -> tuple[int, tuple, dict]:
    return prefix + 23, (), {}  # a length that is no number of heads, so that swapped axes of the keys are detected


@dataclass(frozen=True)
class Block:
    """How one kind of block works: x + attend(x), then x + feed(x), bit for bit what its own forward computes.

    Attributes:
        attend: (block, x, stage, args, kwargs) -> the attention branch. `args` and `kwargs` are the block's own. If
            `stage` is given, masks and positions must be indexed at `stage.total.anchor`, and `stage.bias` added to the
            logits.
        feed: (block, x) -> the MLP branch.
        keys: (block) -> the module whose output holds the keys, or None where `project` computes them.
        project: (block, x) -> [B, N, D] keys averaged over heads, from the block's input.
        heads: (block) -> number of key heads.
        width: (block) -> heads x head width.
        parts: (block) -> (attention module, MLP module), to count weights.
        example: (block, prefix) -> (tokens, args, kwargs) for a trial run, with every argument that the encoder passes
            to a block.
        relative: the attention mask is a relative position bias, never padding.
        wrapped: its forward gives the tokens in a tuple.
        taps: (block) -> the modules whose attention takes no mask, so that sizes go in at transformers' interface.
        mask: (block, x, args, kwargs) -> the caller's mask among them, as masks.py describes it.
    """

    attend: Callable[..., Tensor]
    feed: Callable[[nn.Module, Tensor], Tensor]
    parts: Callable[[Any], tuple[nn.Module, nn.Module]]
    width: Callable[[Any], int]
    heads: Callable[[Any], int]
    keys: Callable[[Any], nn.Module] | None = None
    project: Callable[[Any, Tensor], Tensor] | None = None
    example: Callable[[Any, int], tuple[int, tuple, dict]] = plain_example
    relative: bool = False
    wrapped: bool = False
    taps: Callable[[Any], list[nn.Module]] | None = None
    mask: Callable[..., Tensor | None] = given_mask


def spatial_shapes(module: Any, args: tuple, kwargs: dict) -> tuple[Grid, ...] | None:
    shapes = kwargs.get("spatial_shapes", args[1] if len(args) > 1 else None)
    return None if shapes is None else tuple((int(h), int(w)) for h, w in shapes.tolist())


@dataclass(frozen=True)
class EncoderSite:
    """One encoder found in a model.

    Attributes:
        path, type_name: where it is and what it is, for messages.
        blocks: the blocks in order; block: how they work.
        prefix: tokens that are not patches, in front of them; suffix: how many of these stand behind the patches in the
            model's own order, and are taken to the front where tokens are reduced.
        between: the model adds to its tokens between the blocks, so every block gives them at full length.
        patchify: the module that cuts the image into patches. Its output [B, C, h, w] shows the grid; that of a Linear
            (NaFlex) does not.
        naflex: the module that receives patches, if the images of a batch have different grids; grids: what these are,
            by the arguments it is given, None = unknown.
        resizable: finds the modules that receive the pixels and accept a smaller image, each with keyword arguments to
            add; or a sentence that says why this is not possible.
        shuffled: its embeddings reorder the patches, so a grid is meaningless.
        watched: objects with a `forward_intermediates` that returns every block's tokens.
        no_bias: why the attention cannot take a size bias, if it cannot.
        encoder, probe: the module whose call runs the blocks, and a function that calls it, or a copy of it on the meta
            device, with one image; None = the number of tokens at the first block is only known during a call.
        rectangle: the blocks run whole, on a rectangle of tokens [B, h, w, C] ("last": where the channels are) or
            [B, C, h, w] ("first"), which must stay one; "" = on rows of tokens.
        rotary: makes a rotary table, (table [rows x columns, C], (rows, columns), tables side by side); or why merged
            tokens cannot carry several of its rows.
    """

    path: str
    type_name: str
    blocks: tuple[nn.Module, ...]
    block: Block
    prefix: int
    patchify: nn.Module
    macs: EncoderMACs
    suffix: int = 0
    between: bool = False
    naflex: nn.Module | None = None
    grids: Callable[[Any, tuple, dict], tuple[Grid, ...] | None] = spatial_shapes
    resizable: Callable[[], tuple[tuple[nn.Module, dict], ...] | str] | str = ""
    shuffled: bool = False
    watched: tuple[nn.Module, ...] = ()
    no_bias: str = ""
    rectangle: str = ""
    rotary: Callable[[], tuple[Tensor, tuple[int, int], int]] | str = NOT_ROTARY
    encoder: nn.Module | None = None
    probe: Callable[[Any], Any] | None = None

    def resized(self) -> tuple[tuple[nn.Module, dict], ...] | str:
        """What `resizable` finds: only when it is asked for, since it tries the embeddings."""
        return self.resizable if isinstance(self.resizable, str) else self.resizable()


@dataclass(frozen=True)
class Refusal:
    """An encoder, or something that looks like one, that cannot be reduced, and why."""

    path: str
    type_name: str
    reason: str


def examined(path: str, model: nn.Module, look: Callable[[str, Any], EncoderSite | Refusal]) -> EncoderSite | Refusal:
    """`look(path, model)`, but an encoder that raises becomes a `Refusal`, so that others are still found."""
    try:
        return look(path, model)
    except Exception as error:  # from a model of unforeseen structure
        return Refusal(path, type(model).__name__, unforeseen(error))


def unforeseen(error: Exception) -> str:
    return f"vtc could not look at it ({type(error).__name__}: {first_line(error)}); please report the model"


def projected_keys(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Keys averaged over heads [B, N, D] float32, where one projection computes queries, keys and values without
    calling a module that could be hooked. Averaging the weights over the heads gives the mean key directly; packed
    (quantized) weights are applied as they are, not read."""
    rows = weight.shape[0] // 3
    if bias is not None:
        bias = bias[rows : 2 * rows].detach().float()
    if type(weight) not in (nn.Parameter, Tensor) or weight.itemsize == 1:
        keys = nn.functional.linear(x, weight)[..., rows : 2 * rows].float()
        keys = keys if bias is None else keys + bias
        return keys.unflatten(-1, (heads, -1)).mean(-2)
    bias = None if bias is None else bias.unflatten(0, (heads, -1)).mean(0)
    mean = weight[rows : 2 * rows].detach().float().unflatten(0, (heads, -1)).mean(0)
    return nn.functional.linear(x.float(), mean, bias)
