"""The model `vtc` of lmms-eval: any multimodal LLM that vtc supports, unmodified or with fewer visual tokens.

    lmms-eval --model vtc --model_args pretrained=FOLDER_OR_ID,method=idpruner,keep=0.25 --tasks mme --batch_size 4

lmms-eval finds it through the entry point `lmms_eval.models`. Without a method the model stays dense. Further options
go to the method. Questions are formatted with the processor's own chat template; answers are generated, so tasks that
need likelihoods are refused, as by most models of lmms-eval.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm

from vtc.errors import OptionError
from vtc.handle import Handle, install
from vtc.methods import make
from vtc.models.llms import load

try:
    from lmms_eval.api.model import lmms as Base
except ModuleNotFoundError:  # then nothing here is usable; this import only happens when the package is scanned
    Base = object

_TAKEN = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams")  # accepted from a task's generation_kwargs


def manifest() -> Any:
    """What lmms-eval reads from the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vtc", chat_class_path=f"{__name__}.Chat")


class Chat(Base):
    """One model, created by lmms-eval from `--model_args`, `--batch_size` and `--device`.

    Args:
        pretrained: a folder, an id on the Hub, or tiny_qwen, tiny_llava.
        method: of `vtc.list_methods()`; None = dense. options: the method's, such as keep=0.25 or balance=0.3.
        num_frames: frames of a video, evenly spaced.

    Raises:
        OptionError: unknown method or option, a value out of range. UnsupportedModelError, ChatError: of the model.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        num_frames: int = 8,
        trust_remote_code: bool = False,
        max_batch_size: None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise OptionError(f"batch_size={batch_size!r}: it takes a whole number >= 1")
        if method is None and options:
            raise OptionError(f"{', '.join(options)} given without a method: add method=idpruner or another")
        chosen = None if method is None else make(method, **options)
        rank = os.environ.get("LOCAL_RANK", "0")
        self.device = torch.device(device or (f"cuda:{rank}" if torch.cuda.is_available() else "cpu"))
        plan = chosen or make("random", keep=1.0)
        self.processor, weights = load(
            pretrained, plan, dtype=dtype, device=str(self.device), trust_remote_code=trust_remote_code
        )
        self.model = weights()
        self.handle: Handle | None = None if chosen is None else install(self.model, chosen)
        self.batch_size, self.frames = int(batch_size), num_frames

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """The answers, in the order of the requests."""
        from lmms_eval.api.instance import GenerationResult, TokenCounts
        from lmms_eval.models.model_utils.gen_metrics import log_metrics
        from lmms_eval.protocol import ChatMessages

        answers: list[Any] = []
        start, made, before, after = time.perf_counter(), 0, 0, 0
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar:
            for options, some in self._batches(request.args for request in requests):
                turns = [
                    make_messages(self.task_dict[task][split][doc]) for _, make_messages, _, doc, task, split in some
                ]
                asked = [ChatMessages(messages=turn).to_hf_messages() for turn in turns]
                for text, count in self._answer(asked, options):
                    answers.append(GenerationResult(text, TokenCounts(output_tokens=count)))
                    made += count
                if self.handle is not None:
                    before, after = before + sum(self.handle.report.before), after + sum(self.handle.report.after)
                bar.update(len(some))
        took = time.perf_counter() - start
        kept = {"image_tokens": before, "image_tokens_kept": after} if before else {}
        log_metrics(total_gen_tokens=made, total_elapsed_time=took, avg_speed=made / took, additional_metrics=kept)
        return answers

    def _batches(self, arguments: Iterable[tuple]) -> Iterator[tuple[dict[str, Any], list[tuple]]]:
        """Consecutive requests with the same generation options, at most `batch_size`."""
        for _, group in groupby(arguments, key=lambda a: repr(a[2])):
            same = list(group)
            for first in range(0, len(same), self.batch_size):
                yield same[0][2], same[first : first + self.batch_size]

    def _answer(self, asked: list[Any], options: dict[str, Any]) -> Iterator[tuple[str, int]]:
        """The answers and their numbers of tokens. `options`: the task's; greedy unless its temperature is above 0."""
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        more = self._read([part for turn in asked for message in turn for part in message["content"]])
        inputs = self.processor.apply_chat_template(
            asked,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **more},
        ).to(self.device, self.model.dtype)
        given = {"max_new_tokens": 1024, **{key: options[key] for key in _TAKEN if options.get(key) is not None}}
        given["do_sample"] = given.get("temperature", 0) > 0
        if not given["do_sample"]:
            given |= {"temperature": None, "top_p": None, "top_k": None}
        with torch.inference_mode():
            ids = self.model.generate(**inputs, **given)[:, inputs["input_ids"].shape[1] :]
        stops = options.get("until") or []
        for row, text in zip(ids, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            yield text, int((row != tokenizer.pad_token_id).sum())

    def _read(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Replace video files by their frames (PyAV, installed with lmms-eval); returns arguments for the processor."""
        from transformers.video_utils import load_video

        times = []
        for part in parts:
            if part["type"] == "video" and isinstance(part["video"], str):
                part["video"], when = load_video(part["video"], num_frames=self.frames)  # type: ignore[arg-type]
                times.append(when)
        return {"video_metadata": times, "do_sample_frames": False} if times else {}

    def clean(self) -> None:
        self.handle = None  # it refers to the model, whose memory should be freed
        super().clean()

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError("vtc answers by generating: take a task whose output_type is generate_until")

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        raise NotImplementedError("vtc answers one question at a time: take a task whose output_type is generate_until")


__all__ = ["Chat", "manifest"]
