"""Train the small page retriever of `vtc.checkpoints`, a `ColQwen2ForRetrieval` of Transformers, on `vtc.eval.pages`,
from nothing, and write it as its folder.

    OMP_NUM_THREADS=1 python tools/train_colqwen.py --out out/colqwen                       # goes on where it ended
    python tools/train_colqwen.py --out out/colqwen --pack vtc/checkpoints/tiny_colqwen

Every token that shows a word is to be nearest to what the same decoder says of that word in a query, among all words
and one vector for everything else: to say of each token what it shows is learned in minutes, to find the right page of
a batch is not. Crops of pages suffice for most of it, since the tower's positions are rotary.

The shipped weights took 15 minutes on one thread of two shared cores: the first 500 batches with --batches 2500, the
other 1,000 with 1,500 (the rate falls over the last 40 %). Of the word tokens of unseen whole pages 91 % are right.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import seal
from torch import Tensor, nn
from tqdm.auto import tqdm

from vtc.eval import pages
from vtc.eval.pages import CELL, WORDS

SPECIAL = ("<pad>", "<eos>", "<unk>", "<start>", "<end>", "<|image_pad|>", "<video>", "<query>")
IDS = {token: number for number, token in enumerate((*SPECIAL, *WORDS))}
FIRST, BLANK = len(SPECIAL), len(WORDS)  # number of the first word; class of everything that is no word
UNSEEN = 1_000_000  # training has the pages from here on, so that the numbers below are free for evaluation
WIDTH, DIM = 128, 64


def build() -> nn.Module:
    """A tower of three layers and a decoder of two. A token is a patch of 16 pixels: with four patches of 8 a token,
    as in the large ones, it would take four times as long to train and to use."""
    import transformers

    vision = {"depth": 3, "embed_dim": WIDTH, "num_heads": 4, "mlp_ratio": 3, "hidden_size": WIDTH}
    vision |= {"patch_size": CELL, "spatial_merge_size": 1, "temporal_patch_size": 2}
    text = {"hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "vocab_size": len(IDS), "max_position_embeddings": 4096}
    text |= {"pad_token_id": IDS["<pad>"], "eos_token_id": IDS["<eos>"], "bos_token_id": None}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    vlm = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<video>"],
        vision_start_token_id=IDS["<start>"],
        vision_end_token_id=IDS["<end>"],
    )
    model = transformers.ColQwen2ForRetrieval(transformers.ColQwen2Config(vlm_config=vlm, embedding_dim=DIM))
    for name, p in model.named_parameters():
        if p.ndim > 1:  # Transformers draws them so small that a model this narrow says nothing for a long time
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
            # Blocks that do little at first: one token alone tells many words, which is learned in a minute, and
            # there is nothing to attend to before
            if any(part in name for part in ("attn.proj.", "mlp.fc2.", "o_proj.", "down_proj.")):
                p.data.mul_(0.1)
    nn.init.normal_(model.vlm.get_input_embeddings().weight, std=0.5)
    return model


def processor() -> Any:
    """One token a word; a picture keeps its size, in multiples of a token."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    inside = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    inside.normalizer = normalizers.Lowercase()
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inside.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inside, padding_side="left", pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    size = {"shortest_edge": 128**2, "longest_edge": 1024**2}
    pictures = transformers.Qwen2VLImageProcessor(patch_size=CELL, merge_size=1, temporal_patch_size=2, size=size)
    return transformers.ColQwen2Processor(
        pictures, words, visual_prompt_prefix="<start><|image_pad|><end>", query_prefix="<query> "
    )


# -- crops ------------------------------------------------------------------------------------------------------------


@dataclass
class Sheet:
    """A page as tensors: pixels [H, W] as bytes, the word's place in `boxes` for each cell (-1 = none), and each word's
    box [words, 4] and number."""

    pixels: Tensor
    cells: Tensor
    boxes: Tensor
    words: Tensor

    @classmethod
    def of(cls, number: int) -> Sheet:
        page = pages.page(number)
        grey = torch.frombuffer(bytearray(page.image.convert("L").tobytes()), dtype=torch.uint8)
        return cls(
            grey.view(page.image.height, page.image.width),
            torch.tensor(page.cells),
            torch.tensor([word.box for word in page.words]),
            torch.tensor([WORDS.index(word.text) for word in page.words]),
        )

    def crop(self, draw: random.Random, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Pixels of a place on the grid, and the class of each of its cells; -100 where a word is cut off."""
        top = draw.randint(0, (self.pixels.shape[0] - height) // CELL) * CELL
        left = draw.randint(0, (self.pixels.shape[1] - width) // CELL) * CELL
        cells = self.cells[top // CELL : (top + height) // CELL, left // CELL : (left + width) // CELL]
        whole = (self.boxes[:, 0] >= left) & (self.boxes[:, 2] <= left + width)
        named = torch.where(whole, self.words, -100)[cells.clamp(min=0)]
        return self.pixels[top : top + height, left : left + width], torch.where(cells < 0, BLANK, named)


def patches(pixels: Tensor) -> Tensor:
    """[B, H, W] bytes -> [B·patches, CELL²] grey values, 0 to 1."""
    return pixels.unfold(1, CELL, CELL).unfold(2, CELL, CELL).flatten(3).flatten(0, 2).float() / 255


class Grey(nn.Module):
    """The tower's first layer on `patches`, by the weights of what it is put in place of: a normalised colour is a
    straight function of the grey, and both frames are equal. A sixth of the work, and none of it a slow convolution."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.proj = real.proj

    def forward(self, grey: Tensor) -> Tensor:
        mean = grey.new_tensor([0.48145466, 0.4578275, 0.40821073])[:, None]
        spread = grey.new_tensor([0.26862954, 0.26130258, 0.27577711])[:, None]
        weight = self.proj.weight.sum(2).flatten(2) / spread  # [width, colours, CELL²]
        return grey @ weight.sum(1).mT - (weight * mean).sum((1, 2))


def shapes(done: float) -> tuple[int, int, int]:
    """How many crops, of which height and width: about a thousand tokens; small ones first, whole pages at the end,
    since softmax over a page is flatter than over a crop."""
    if done < 0.5:
        return random.choice(((16, 128, 128), (8, 128, 256)))
    if done < 0.8:
        return random.choice(((16, 128, 128), (8, 128, 256), (4, 256, 256), (2, 256, 512)))
    return random.choice(((8, 128, 256), (4, 256, 256), (2, 256, 512), (1, 512, 512), (1, 512, 512)))


# -- learning ---------------------------------------------------------------------------------------------------------


def see(model: nn.Module, pixels: Tensor) -> Tensor:
    """[B, H, W] bytes -> embeddings [B, tokens + 2, dim], with those of <start> and <end>."""
    rows, columns = pixels.shape[1] // CELL, pixels.shape[2] // CELL
    ids = [IDS["<start>"], *[IDS["<|image_pad|>"]] * (rows * columns), IDS["<end>"]]
    return model(
        input_ids=torch.tensor([ids] * len(pixels)),
        pixel_values=patches(pixels).unflatten(0, (len(pixels), -1)),
        image_grid_thw=torch.tensor([[1, rows, columns]] * len(pixels)),
    ).embeddings


def dictionary(model: nn.Module, shuffle: bool = True) -> Tensor:
    """[words + 1, dim]: what the decoder says of every word, in queries of four at random and two paddings behind, and
    of what is no word: <query> and the paddings, whose mean it is."""
    order = torch.randperm(len(WORDS)) if shuffle else torch.arange(len(WORDS))
    order = torch.cat([order, order[: -len(order) % 4]]).view(-1, 4)
    lead = torch.full((len(order), 1), IDS["<query>"])
    behind = torch.full((len(order), 2), IDS["<pad>"])
    out = model(input_ids=torch.cat([lead, order + FIRST, behind], 1)).embeddings
    place = torch.empty(len(WORDS), dtype=torch.long)
    place[order.flatten()] = torch.arange(order.numel())  # a word that came twice counts once
    words = out[:, 1:-2].flatten(0, 1)[place]
    rest = torch.cat([out[:, :1], out[:, -2:]], 1).flatten(0, 1)
    return torch.cat([words, F.normalize(rest.mean(0), dim=0)[None]])


class Learner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = build()
        self.model.vlm.visual.patch_embed = Grey(self.model.vlm.visual.patch_embed)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))  # one over the temperature

    def alone(self, cells: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """As `loss`, of single tokens [B, CELL, CELL] that show a word and see no other token."""
        visual, decoder = self.model.vlm.visual, self.model.vlm.language_model
        seen = visual.merger(visual.patch_embed(patches(cells)))
        both = torch.cat([seen, decoder.embed_tokens.weight[FIRST:]])
        both = F.normalize(self.model.embedding_proj_layer(decoder.norm(both)), dim=-1)
        said = self.scale.exp() * both[: len(cells)] @ both[len(cells) :].T
        return F.cross_entropy(said, labels), (said.argmax(-1) == labels).float().mean().item()

    def loss(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """Of a batch, and how many word tokens are nearest to their word."""
        labels = F.pad(labels.flatten(1), (1, 1), value=BLANK).flatten()
        said = self.scale.exp().clamp(max=25) * see(self.model, pixels).flatten(0, 1) @ dictionary(self.model).T
        each = F.cross_entropy(said, labels, reduction="none", ignore_index=-100)
        shown, blank = (labels >= 0) & (labels < BLANK), labels == BLANK
        right = (said.argmax(-1) == labels)[shown].float().mean().item()
        return each[shown].mean() + 0.2 * each[blank].mean(), right


def warm(learner: Learner, sheets: list[Sheet], fast: float, batches: int = 1000) -> float:
    """Read single tokens, without any block: a third of the words in less than a minute. Attention alone does not get
    off the ground in a quarter of an hour; from here it does at once."""
    cells, labels = [], []
    for sheet in sheets:
        pixels, said = sheet.crop(random, *sheet.pixels.shape)  # type: ignore[arg-type]
        shown = (said >= 0) & (said < BLANK)
        cells.append(pixels.unfold(0, CELL, CELL).unfold(1, CELL, CELL)[shown])
        labels.append(said[shown])
    known, wanted = torch.cat(cells), torch.cat(labels)
    optimizer = torch.optim.AdamW(groups(learner), lr=fast, betas=(0.9, 0.98), weight_decay=0.01)
    right = 0.0
    for _ in tqdm(range(batches), "single tokens", mininterval=20):
        some = torch.randint(len(known), (768,))
        loss, now = learner.alone(known[some], wanted[some])
        right = 0.95 * right + 0.05 * now
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
    return right


def groups(learner: Learner) -> list[dict[str, Any]]:
    """The parameters; those of the first layer learn slower in `train`: six of them see the same pixel and add up."""
    first = list(learner.model.vlm.visual.patch_embed.parameters())
    rest = [p for p in learner.parameters() if all(p is not q for q in first)]
    return [{"params": first, "share": 1 / 6}, {"params": rest, "share": 1.0}]


def rate(done: float, batches: int) -> float:
    """Of learning, as a fraction: up over 100 batches, level, down over the last 40 %."""
    return min(1.0, (done * batches + 1) / 100, max(0.02, (1 - done) / 0.4))


@torch.no_grad()
def check(model: nn.Module, count: int = 4) -> float:
    """The fraction of the word tokens of unseen whole pages that are nearest to their word."""
    words, right = dictionary(model, shuffle=False), []
    for number in range(UNSEEN - count, UNSEEN):
        sheet = Sheet.of(number)
        labels = sheet.crop(random.Random(0), *sheet.pixels.shape)[1].flatten()
        near = (see(model, sheet.pixels[None])[0, 1:-1] @ words.T).argmax(-1)
        right.append((near == labels)[labels < BLANK].float().mean().item())
    return sum(right) / count


def train(out: Path, batches: int, fast: float, store: int) -> None:
    learner, begin = Learner(), 0
    optimizer = torch.optim.AdamW(groups(learner), lr=fast, betas=(0.9, 0.98), weight_decay=0.01)
    if (out / "state.pt").is_file():
        state = torch.load(out / "state.pt")
        learner.load_state_dict(state["learner"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["batches"]
    random.seed(begin)
    torch.manual_seed(begin)
    sheets = [Sheet.of(UNSEEN + begin + i) for i in tqdm(range(store), "pages")]
    log = out / "log.jsonl"
    if not begin:
        print(f"single tokens: {warm(learner, sheets, fast):.2f} right")
    start, seen = time.perf_counter(), [0.0, 0.0, 0]
    for batch in tqdm(range(begin, batches), "batches", initial=begin, total=batches, mininterval=20):
        done = batch / batches
        if batch % 4 == 0:  # drawing takes a fifth as long as learning: crops of new pages and of earlier ones
            sheets[random.randrange(store)] = Sheet.of(UNSEEN + begin + store + batch)
        count, height, width = shapes(done)
        crops = [random.choice(sheets).crop(random, height, width) for _ in range(count)]  # type: ignore[arg-type]
        loss, right = learner.loss(torch.stack([c[0] for c in crops]), torch.stack([c[1] for c in crops]))
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * fast * rate(done, batches)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        seen = [seen[0] + loss.item(), seen[1] + right, seen[2] + 1]
        if (batch + 1) % 100 == 0 or batch + 1 == batches:
            row = {"batch": batch + 1, "loss": seen[0] / seen[2], "right": seen[1] / seen[2]}
            row |= {"whole": check(learner.model), "scale": learner.scale.exp().item()}
            row["seconds"] = time.perf_counter() - start
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: round(v, 4) for k, v in row.items()}) + "\n")
            state = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict(), "batches": batch + 1}
            torch.save(state, out / "state.tmp")
            os.replace(out / "state.tmp", out / "state.pt")
            seen = [0.0, 0.0, 0]


def pack(out: Path, folder: Path) -> None:
    """The trained weights in float16, the configuration and the processor, sealed."""
    learner = Learner()
    learner.load_state_dict(torch.load(out / "state.pt")["learner"])
    convolution = build().vlm.visual.patch_embed
    convolution.proj = learner.model.vlm.visual.patch_embed.proj
    learner.model.vlm.visual.patch_embed = convolution
    learner.model.half().save_pretrained(folder)
    processor().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone
    seal(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/colqwen"), help="state, log")
    parser.add_argument("--batches", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--store", type=int, default=200, help="pages kept at hand")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="write the checkpoint there instead of training")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.pack:
        pack(args.out, args.pack)
    else:
        train(args.out, args.batches, args.rate, args.store)


if __name__ == "__main__":
    main()
