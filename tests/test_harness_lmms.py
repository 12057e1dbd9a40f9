"""lmms-eval runs on vtc: by its own code, on a tiny local task, with no network.

It is in the extra `harness`; `make harness-check` runs this file where it is installed.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import mllm_processor
import mllm_zoo
import pytest

import vtc
from vtc.errors import OptionError

ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
needs = pytest.mark.skipif(
    find_spec("lmms_eval") is None, reason="lmms_eval is not installed (extra harness); run make harness-check"
)

TASK = """
task: vtc_scenes
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 5, temperature: 0, until: ["</s>"]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
# one picture, two, none
UTILS = "def pictures(doc):\n    return [p.convert('RGB') for p in (doc['one'], doc['two']) if p is not None]\n"
QUESTIONS = ["what is w5 ?", "w9 w10 w11 ?", "is this w6 or w7 ?", "w12 ?", "what w8 ?"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of lmms-eval: a folder with its YAML and its data."""
    import datasets

    folder = tmp_path_factory.mktemp("task")
    one = [None if i == 3 else mllm_processor.picture(i) for i in range(5)]
    two = [mllm_processor.picture(9) if i == 1 else None for i in range(5)]
    data = {"one": one, "two": two, "question": QUESTIONS, "answer": ["w4"] * 5}
    features = {name: datasets.Image() if name in ("one", "two") else datasets.Value("string") for name in data}
    made = datasets.Dataset.from_dict(data, features=datasets.Features(features))
    made.to_parquet(str(folder / "test.parquet"))
    (folder / "utils.py").write_text(UTILS)
    (folder / "vtc_scenes.yaml").write_text(TASK.format(data=folder / "test.parquet"))
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folders = {}
    for name in ("llava", "qwen2_5_vl"):
        folders[name] = tmp_path_factory.mktemp(name)
        mllm_processor.save(name, folders[name])
    return folders


@pytest.fixture(scope="module")
def harness(task):
    """lmms-eval, with the task of that folder: model arguments -> its results."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(task), include_defaults=False)
    return lambda arguments, **more: simple_evaluate(
        model="vtc", model_args=arguments, tasks=["vtc_scenes"], task_manager=tasks, device="cpu", **more
    )


def said(samples):
    """The answers, in the order of the questions; files hold them bare, the results in lists."""
    found = [line["filtered_resps"] for line in sorted(samples, key=lambda line: line["doc_id"])]
    return [one if isinstance(one, str) else one[0] for one in found]


def answers(folder, name, method=None):
    """With transformers and vtc alone, a question at a time."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = mllm_processor.PROCESSORS[name]()
    if method is not None:
        vtc.compress(model, method)
    out = []
    for i, question in enumerate(QUESTIONS):
        pictures = [] if i == 3 else [mllm_processor.picture(n) for n in ([1, 9] if i == 1 else [i])]
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=pictures or None, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        out.append(processor.decode(ids, skip_special_tokens=True).strip())
    return out


@needs
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_lmms_eval(harness, llm, name):
    """The answers that lmms-eval scores are those of the model and the method themselves, dense and compressed."""
    dense = said(harness(f"pretrained={llm[name]}", batch_size=2)["samples"]["vtc_scenes"])
    assert dense == answers(llm[name], name)
    found = harness(f"pretrained={llm[name]},method=idpruner,keep=0.25,balance=0.3", batch_size=3)
    less = said(found["samples"]["vtc_scenes"])
    assert less == answers(llm[name], name, vtc.IDPruner(keep=0.25, balance=0.3)) != dense
    assert found["results"]["vtc_scenes"]["exact_match,none"] == sum(a == "w4" for a in less) / 5
    through = found["throughput"]
    assert through["avg_image_tokens_kept"] / through["avg_image_tokens"] == pytest.approx(0.25, abs=0.03)


@needs
def test_lmms_eval_command(task, llm, tmp_path):
    """From its command line, where it finds the model by vtc's entry point."""
    command = [sys.executable, "-W", "ignore", "-m", "lmms_eval", "--model", "vtc", "--tasks", "vtc_scenes"]
    command += ["--model_args", f"pretrained={llm['llava']},method=tome,keep=0.5", "--include_path", task]
    command += ["--output_path", tmp_path / "out", "--log_samples", "--device", "cpu", "--batch_size", "2"]
    env = ENV | {"HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "1"}
    # not from the checkout: an old vtc_torch.egg-info there would hide the entry point
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    (samples,) = (tmp_path / "out").rglob("*_samples_vtc_scenes.jsonl")
    found = said(map(json.loads, samples.read_text().splitlines()))
    assert found == answers(llm["llava"], "llava", vtc.ToMe(keep=0.5))


@needs
@pytest.mark.filterwarnings("ignore")
def test_video_files(tmp_path):
    """Two videos in a batch, of 16 frames, of which 8 are shown."""
    import av

    from vtc.harness.lmms_eval import Chat

    for name in "ab":
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=4, width=64, height=64, pix_fmt="yuv420p")
            for number in range(16):
                image = mllm_processor.picture(number, 64, 64)
                file.mux(stream.encode(av.VideoFrame.from_image(image)))
            file.mux(stream.encode())
    processor = mllm_processor.qwen()
    end = processor.chat_template.index("{% else %}{{ c['text'] }}")
    mark = "{% elif c['type'] == 'video' %}<|vision_start|> <|video_pad|> <|vision_end|>\n"
    processor.chat_template = processor.chat_template[:end] + mark + processor.chat_template[end:]
    mllm_zoo.build("qwen2_5_vl").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    chat = Chat(str(tmp_path / "model"), "tome", keep=0.25, device="cpu")
    turns = [
        [
            {
                "role": "user",
                "content": [{"type": "video", "video": str(tmp_path / f"{n}.mp4")}, {"type": "text", "text": t}],
            }
        ]
        for n, t in (("a", "what is w5 ?"), ("b", "w9 ?"))
    ]
    first, second = chat._answer(turns, {"max_new_tokens": 4})
    report = chat.handle.report
    assert len(report.before) == 2 * 4  # pairs of frames
    assert 4 * sum(report.after) == sum(report.before)
    assert first[0] and second[0]


@needs
def test_lmms_eval_refuses(llm, tmp_path):
    """What lmms-eval makes of --model_args meets vtc's own errors."""
    from lmms_eval.models import get_model

    def make(options, **more):
        return get_model("vtc").create_from_arg_string(options, {"batch_size": 1, "device": "cpu", **more})

    folder = f"pretrained={llm['llava']}"
    for options, message in (
        ("method=idprunner,keep=0.25", "did you mean 'idpruner'"),
        ("method=idpruner,keep=1.5", "keep=1.5"),
        ("method=idpruner,ratio=0.5", "use keep="),
        ("keep=0.25", "keep given without a method"),
    ):
        with pytest.raises(OptionError, match=message):
            make(f"{folder},{options}")
    with pytest.raises(OptionError, match="batch_size='auto'"):
        make(folder, batch_size="auto")
    with pytest.raises(vtc.UnsupportedModelError, match="at the decoder's input give keep="):
        make(f"{folder},method=tome,r=8")
    with pytest.raises(ValueError, match="no such folder"):
        make(f"pretrained={tmp_path / 'nowhere'}")
    with pytest.raises(NotImplementedError, match="generate_until"):
        make(folder).loglikelihood([])


def test_entry_point_is_lmms_evals():
    """The name and the object that the entry point in pyproject.toml leads to."""
    from vtc.harness import lmms_eval as module

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nvtc = "vtc.harness.lmms_eval:manifest"' in text
    assert callable(module.manifest) and module.Chat.is_simple is False
