"""A small multimodal LLM and what only its training needs: several questions behind one prompt, and what they lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tiny_data import THINGS, Prompt, Text
from tiny_fast import Fast
from tiny_models import MARKS, llava, qwen
from torch import Tensor, nn
from torch.nn import functional

from vtc.eval import scenes

THIRDS = (["top", "middle", "bottom"], ["left", "middle", "right"])
MODELS = {"qwen": qwen, "llava": llava}


def unseen(prefix: int, block: Tensor) -> Tensor:
    """[B, 1, L, P + L], 0 or -inf: a word sees the pictures and what its own question says before it; padding
    itself."""
    total = block.shape[1]
    causal = torch.ones(total, total, dtype=torch.bool, device=block.device).tril()
    seen = (block[:, None, :] == block[:, :, None]) & (block[:, None, :] > 0)
    hidden = ~(seen & causal | torch.eye(total, dtype=torch.bool, device=block.device))
    hidden = functional.pad(hidden, (prefix, 0))[:, None]
    return torch.zeros(hidden.shape, device=block.device).masked_fill_(hidden, -math.inf)


@dataclass
class Front:
    """What stands before the questions: words, which of them are image tokens, positions, the grids of patches."""

    ids: Tensor
    marks: Tensor
    places: Tensor
    grids: Tensor  # on the processor always

    def to(self, device: torch.device) -> Front:
        return Front(self.ids.to(device), self.marks.to(device), self.places.to(device), self.grids)


class Learner(nn.Module):
    """A model and what only its training needs."""

    def __init__(self, name: str, kind: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.name = name
        self.model, self.processor = MODELS[name]()
        self.fast = Fast(self.model, kind)
        ids = self.processor.tokenizer.convert_tokens_to_ids
        self.says = [ids([".", *THINGS]), ids([".", *scenes.COLOURS])]
        if name == "llava":  # DINOv2 knows where its patches are; of the Qwen, positions alone are to say it
            self.says += [ids(THIRDS[0]), ids(THIRDS[1])]
        self.sharp = nn.Parameter(torch.tensor(10.0))
        self.halves = nn.Linear(self.model.config.text_config.hidden_size, 22)  # numerals left and right in a token
        self.fronts: dict[Prompt, Front] = {}
        self.register_buffer("mean", torch.zeros(384))  # of DINOv2's features
        self.register_buffer("spread", torch.ones(384))
        if name == "llava":
            self.model.model.vision_tower.to(kind)

    @property
    def device(self) -> torch.device:
        return self.sharp.device

    def front(self, prompt: Prompt) -> Front:
        if prompt not in self.fronts:
            self.fronts[prompt] = self.lay(prompt)
        return self.fronts[prompt]

    def lay(self, prompt: Prompt) -> Front:
        """What stands before the questions, as the processor says it."""
        start, end, image, clip = MARKS[self.name]
        mark = clip if prompt.clip else image
        frame = "{} {} {}" if self.name == "qwen" else "{1}"
        parts = [frame.format(start, " ".join([mark] * math.prod(grid)), end) for grid in prompt.grids]
        if len(parts) > 1:
            parts = [f"picture {i} {part}" for i, part in enumerate(parts, 1)]
        ids = torch.tensor(self.processor.tokenizer(" ".join(["<user>", *parts])).input_ids)
        marks = ids == self.processor.tokenizer.convert_tokens_to_ids(mark)
        grids = torch.tensor(prompt.grids) * torch.tensor([1, 2, 2])
        if self.name == "llava":
            return Front(ids, marks, torch.arange(len(ids))[None], grids).to(self.device)
        kinds, which = (marks * (2 if prompt.clip else 1))[None], "video" if prompt.clip else "image"
        places = self.model.model.get_rope_index(
            ids[None],
            kinds,
            second_per_grid_ts=torch.tensor([2 / 24]),  # what the processor says of frames without times
            **{f"{which}_grid_thw": grids},
        )[0]
        return Front(ids, marks, places, grids).to(self.device)

    def features(self, pixels: Tensor) -> Tensor:
        """What `see` takes: of the LLaVA the tower's last layer, before its norm, as the model itself takes it."""
        if self.name == "qwen":
            return pixels
        tower = self.model.model.vision_tower
        with torch.no_grad():
            return tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states[-1][:, 1:].float()

    def centre(self, features: Tensor) -> None:
        """Learn from features without their mean, 43 of their 46 in length, and their spread."""
        self.mean, self.spread = features.flatten(0, 1).mean(0), features.flatten(0, 1).std(0)

    def see(self, pixels: Tensor, prompt: Prompt) -> Tensor:
        """Patches of all pictures [patches, values], or features of DINOv2 [pictures, tokens, 384] -> image tokens
        [B, tokens, width]."""
        if self.name == "llava":
            seen = self.model.model.multi_modal_projector((pixels - self.mean) / self.spread)
            return seen.flatten(0, 1).unflatten(0, (-1, prompt.tokens))
        grids = self.front(prompt).grids
        grids = grids.repeat(len(pixels) // int(grids.prod(1).sum()), 1)
        return self.fast.tower(pixels, grids).unflatten(0, (-1, prompt.tokens))

    def fold(self) -> None:
        """`centre` into the projector's first layer."""
        if self.name == "llava":
            first = self.model.model.multi_modal_projector.linear_1
            with torch.no_grad():
                first.weight.copy_(first.weight / self.spread)
                first.bias.copy_(first.bias - first.weight @ self.mean)
            self.mean, self.spread = torch.zeros(384), torch.ones(384)

    def shown(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
        """How far the image tokens are from saying what they show in the language of the words: by cosine to these; and
        how many are right, of thing, colour and numerals. labels [B, tokens, 6]: as `tiny_data.labels`."""
        words = functional.normalize(self.model.get_input_embeddings().weight, dim=-1)
        near = self.sharp * functional.normalize(tokens, dim=-1) @ words.T
        there, total, right = labels[..., 0] > 0, tokens.new_zeros(()), []
        for i, ids in zip((0, 1, 4, 5), self.says, strict=False):  # of the Qwen two
            said = near[..., ids]
            each = functional.cross_entropy(said.flatten(0, 1), labels[..., i].flatten(), reduction="none")
            total = total + each[there.flatten()].mean() + 0.5 * each[~there.flatten()].mean()
            right.append((said.argmax(-1) == labels[..., i])[there].float().mean().item())
        number = labels[..., 0] == 1 + THINGS.index("number")
        if number.any():
            said, wanted = self.halves(tokens[number]).view(-1, 2, 11), labels[number][:, 2:4]
            total = total + functional.cross_entropy(said.flatten(0, 1), wanted.flatten())
            right.append((said.argmax(-1) == wanted)[wanted > 0].float().mean().item())
        return total, right

    def read(self, tokens: Tensor, text: Text, prompt: Prompt) -> Tensor:
        """The decoder's output for the words behind the pictures: [B, L, width]."""
        embed, front = self.model.get_input_embeddings(), self.front(prompt)
        before = embed(front.ids)[None].repeat(len(tokens), 1, 1)
        before[:, front.marks] = tokens
        axes = front.places.shape[:-2]  # (3,) for Qwen's, none for a Llama's
        behind = (int(front.places.max()) + 1 + text.offset).expand(*axes, -1, -1)
        x = torch.cat([before, embed(text.ids)], 1)
        places = torch.cat([front.places.expand(*axes, len(tokens), -1), behind], -1)
        return self.fast.decoder(x, places, unseen(len(front.ids), text.block))[:, len(front.ids) :]

    def answers(self, tokens: Tensor, text: Text, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Logits of the words that have a target, and these: [words, vocabulary], [words]."""
        asked = text.target >= 0
        return self.model.lm_head(self.read(tokens, text, prompt)[asked]), text.target[asked]

    def loss(self, tokens: Tensor, text: Text, prompt: Prompt) -> Tensor:
        """Of the answers, and of saying them as soon as the question names its thing: to find that thing in the picture
        is then one step of attention, not two of which neither learns without the other."""
        out = self.read(tokens, text, prompt)
        parts = [
            functional.cross_entropy(self.model.lm_head(out[wanted >= 0]).float(), wanted[wanted >= 0])
            for wanted in (text.target, text.hint)
        ]
        return parts[0] + 0.5 * parts[1]
