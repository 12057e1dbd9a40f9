"""`vtc serve`: vLLM's server with fewer image tokens, asked over HTTP.

`make vllm-check` runs this file in an environment with vLLM, which needs other versions than the development's.
"""

from importlib.util import find_spec

import pytest

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; run make vllm-check", allow_module_level=True)

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import vllm_zoo as zoo

from vtc.checkpoints import tiny
from vtc.methods import make

ENV = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
QUESTION = "what shape is the yellow thing ?"


def command(model, *arguments, what=("serve",)):
    return [sys.executable, "-m", "vtc", *what, model, *arguments, *OPTIONS]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Sends a request to a path: (status, answer)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--method", "tome", "--keep", "0.25", "--port", str(port), "--served-model-name", "tiny"]
    model = str(tiny.folder("tiny_qwen"))
    with log.open("w") as out:
        asked = command(model, *arguments, "--trust-request-mm-kwargs")
        process = subprocess.Popen(asked, env=ENV, stdout=out, stderr=subprocess.STDOUT)

    def send(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    try:
        end = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            try:
                if send("/health")[0] == 200:
                    break
            except OSError:
                time.sleep(1)
        send.log = log
        yield send
    finally:
        process.terminate()
        process.wait(60)


def body(pictures, **more):
    """A request for the greedy answer."""
    content = []
    for picture in pictures:
        png = io.BytesIO()
        picture.save(png, "png")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": zoo.STEPS} | more


def test_twelve_at_once_answer_as_alone_in_transformers(server):
    reference, method = zoo.Reference(str(tiny.folder("tiny_qwen"))), make("tome", keep=0.25)
    pictures = [zoo.mllm_processor.picture(i, *size) for i, size in enumerate([*zoo.SIZES.values()] * 4)]
    bodies = [body([picture], ignore_eos=True, min_tokens=zoo.STEPS) for picture in pictures]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda each: server("/v1/chat/completions", each), bodies))
    for picture, (status, answer) in zip(pictures, answers, strict=True):
        assert status == 200
        want, _ = reference.answer((zoo.prompt("tiny_qwen", 1), [picture]), method)
        text = reference.processor.tokenizer.decode(want, skip_special_tokens=True)
        assert json.loads(answer)["choices"][0]["message"]["content"].split() == text.split()


def test_a_stream_says_the_same(server):
    asked = body([zoo.mllm_processor.picture(0, 128, 128)])
    whole = json.loads(server("/v1/chat/completions", asked)[1])["choices"][0]["message"]["content"]
    lines = server("/v1/chat/completions", asked | {"stream": True})[1].splitlines()
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == whole


def test_a_request_has_its_own_budget_or_a_400_with_the_reason(server):
    asked = body([zoo.mllm_processor.picture(1, 192, 64)])  # resized to 85 tokens

    def tokens(**more):
        status, answer = server("/v1/chat/completions", asked | more)
        return json.loads(answer)["usage"]["prompt_tokens"] if status == 200 else (status, answer)

    few, all_of_them = tokens(), tokens(mm_processor_kwargs={"vtc": {"keep": 1}})
    whole = all_of_them - 11
    assert few == 11 + round(whole / 4) and tokens(mm_processor_kwargs={"vtc": {"keep": 0.5}}) == 11 + round(whole / 2)
    for given, says in [
        ({"keep": 0}, "keep=0"),
        ({"keep": 9999}, f"keep=9999 is more than the {whole} tokens"),
        ("half", "a request gives its budget and nothing else"),
    ]:
        status, answer = tokens(mm_processor_kwargs={"vtc": given})
        assert status == 400 and says in answer
    assert tokens() == few  # it lives


def test_tokens_are_counted_in_vllms_metrics(server):
    def counted():
        lines = [line.split() for line in server("/metrics")[1].splitlines() if line.startswith("vtc_image_tokens_")]
        return [float(dict(lines)[f"vtc_image_tokens_{kind}_total"]) for kind in ("dense", "kept")]

    asked = body([zoo.mllm_processor.picture(2, 128, 128)])
    before = counted()
    usage = [json.loads(server("/v1/chat/completions", asked)[1])["usage"]["prompt_tokens"] for _ in range(2)]
    dense, kept = (new - old for new, old in zip(counted(), before, strict=True))
    assert kept == sum(usage) - 22 and dense == 4 * kept  # also of an image that was cached


def test_a_video_is_a_400(server):
    asked = body([])
    asked["messages"][0]["content"].append({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}})
    status, answer = server("/v1/chat/completions", asked)
    assert status == 400 and "video" in answer


def test_it_says_in_one_line_what_it_does(server):
    (line,) = [line for line in server.log.read_text().splitlines() if "vtc: " in line]
    assert line.endswith("vtc: tome, keep=0.25, positions kept, Qwen2.5-VL; videos are refused")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "fastv", "--keep", "0.5"], "fastv removes tokens between the decoder's layers"),
        (["--method", "divprune", "--keep", "0.5", "--positions", "compact"], "keeps the positions of its tokens"),
        (["--method", "divprune", "--keep", "0.5", "--pipeline-parallel-size", "2"], "pipeline_parallel_size=2"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(arguments, says):
    done = subprocess.run(command(str(tiny.folder("tiny_qwen")), *arguments), env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vtc: error: ") and says in last


def test_bench_serve_asks_dense_and_compressed_in_turns():
    """The engine's own options are vLLM's; what is printed is one JSON document."""
    given = ["--method", "divprune", "--keep", "0.25", "--concurrency", "1", "2", "--requests", "2", "--rounds", "1"]
    given += ["--picture", "256x256", "--words", "2", "--json", "--block-size", "32"]
    asked = command(str(tiny.folder("tiny_qwen")), *given, what=("bench", "serve"))
    done = subprocess.run(asked, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)["rows"]
    assert [row["concurrency"] for row in rows] == [1, 2]
    for row in rows:
        dense, kept = row["prompt"]
        assert dense - kept == 256 - 64 and min(row["rate"]) > 0 and min(row["first"]) > 0
        assert row["low"] <= row["faster"] <= row["high"]
