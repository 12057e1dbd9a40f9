"""Images as codes of a table: the tower finds the codes, and the decoder's own embeddings of them are the features."""

from __future__ import annotations

from typing import Any

import mllm_zoo as zoo
import torch
from mllm_zoo import END, FAKE, IMAGE, START, VOCAB, Spec

from .core import Class
from .sizes import _native, _native_pack

_FIRST, _CODES = VOCAB, 16  # the codes' ids follow the others


def _apertus_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    rows, columns = spec[0] // 4, spec[1] // 4
    return [START, 5 + rows, 7, 5 + columns, FAKE, *([*[IMAGE] * columns, 115] * rows)[:-1], END]


def _emu_ids(kind: str, spec: Spec, generator: torch.Generator) -> list[int]:
    """The end of each line is one of the image's rows too."""
    rows, columns = spec[0] // 4, spec[1] // 4
    return [START, 5 + rows, 7, 5 + columns, FAKE, *[IMAGE] * (rows * (columns + 1)), 115, END]


_VQ = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1}
_LETTERS: dict[str, Any] = {
    "".join(["IMGIMG", *(chr(ord("A") + int(digit)) for digit in str(code)), "Z"]): _FIRST + code
    for code in range(_CODES)
}
_NUMBERS: dict[str, Any] = {f"<|visual token {code:06d}|>": _FIRST + code for code in range(_CODES)}

CLASSES: dict[str, Class] = {
    "apertus1p5": Class(
        zoo._config(
            "Apertus1p5Config",
            text_config={**zoo._TEXT, "vocab_size": 160, "output_vocab_size": VOCAB},
            vision_config={
                "codebook_size": 16,
                "embed_dim": 8,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [4],
                "resolution": 16,
            },
            audio_config={
                "model_type": "wavtokenizer_encoder",
                "num_filters": 4,
                "hidden_size": 16,
                "codebook_size": 8,
                "codebook_dim": 16,
                "num_lstm_layers": 1,
                "decoder_hidden_size": 32,
                "decoder_intermediate_size": 32,
                "decoder_num_layers": 1,
            },
            image_token_id=IMAGE,
            audio_token_id=117,
            image_token_offset=120,
            audio_token_offset=136,
        ),
        images=[(20, 16), (12, 24), (16, 16)],
        ids=_apertus_ids,
        pixels=_native,
        pack=_native_pack,
        sdpa=False,
    ),
    "chameleon": Class(
        zoo._config(
            "ChameleonConfig",
            **{**zoo._TEXT, "vocab_size": 160},
            vq_config={**_VQ, "num_embeddings": _CODES, "resolution": 20},
            vocabulary_map={"<image>": IMAGE, **_LETTERS},
        ),
        images=[()],
        ids=zoo._wrapped(25),
        pixels=zoo._square(20),
        pack=zoo._stacked,
    ),
    "emu3": Class(
        zoo._config(
            "Emu3Config",
            text_config={**zoo._TEXT, "vocab_size": 160, "attention_dropout": 0.0},
            vq_config={**_VQ, "codebook_size": _CODES, "hidden_size": 32, "attn_resolutions": [2]},
            vocabulary_map={"<image>": IMAGE, "<|extra_200|>": 116, **_NUMBERS},
        ),
        images=[(20, 16), (12, 24), (16, 16)],
        ids=_emu_ids,
        pixels=_native,
        pack=_native_pack,
    ),
}
