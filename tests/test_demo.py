"""The demo without a browser: what its functions compute and refuse, how it is queued, and its Space."""

import pickle
import re
import runpy
import socket
import sys
import types
from dataclasses import replace
from html import unescape
from pathlib import Path

import mllm_processor
import numpy as np
import pytest
import torch
from PIL import Image

import vtc
from vtc.bench import answer as chat
from vtc.cli import command as cli
from vtc.errors import OptionError, UnsupportedModelError, VTCError
from vtc.eval import scenes
from vtc.methods import METHODS
from vtc.models.images import ImageError, example_photo, load_image
from vtc.viz import film

gr = pytest.importorskip("gradio")
pytest.importorskip("onnx")

from vtc.demo import LAUNCH, ask, create_demo, look, see, watch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen2.5-VL with random weights, saved."""
    return mllm_processor.save("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def demo():
    return create_demo()


# -- See ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, schedule, value", [("tome", "Tokens", 64), ("random", "Each layer", 0.9), ("downsample", "Arithmetic", 0.5)]
)
def test_see(name, schedule, value):
    """Every layer's map says what the report says, the last is the handle's, and heat and pictures fit."""
    seen = see.run(load_image(example_photo()), see.budget(name, schedule, value), 1)
    counts = [m.anchor.shape[1] for m in seen.maps]
    assert counts[0] == 256 and len(counts) == 13 and counts == sorted(counts, reverse=True)
    assert counts[-1] == seen.found.report.after[0] < 256
    if schedule == "Tokens":
        assert counts[-1] == 64 and len(set(counts)) == 13
    for number in (0, 5, 12):
        for heat in see.HEATS:
            assert seen.heats[heat][number].shape == (16, 16)
            assert [p.size for p in see.layer(seen, number, heat)] == [seen.crop.size] * 2
    assert f"256 → {counts[-1]}" in see.figures(seen)
    chart = re.sub(r'xmlns(:\w+)?="[^"]*"', "", see.tokens_chart(seen))
    assert "<svg" in chart and "http" not in chart
    other = pickle.loads(pickle.dumps(seen))  # ZeroGPU runs a job in a process of its own
    assert see.figures(other) == see.figures(seen) and other.maps[-1].group.equal(seen.maps[-1].group)


def test_see_a_method_without_a_budget():
    """Its own map tells what left of a picture of one colour with a thing on it; the controls say nothing."""
    picture = Image.new("RGB", (224, 224), (120, 130, 140))
    picture.paste((200, 10, 20), (70, 70, 110, 150))
    seen = see.run(picture, see.budget("pixelprune", "Tokens", 64), 1)
    counts = [m.anchor.shape[1] for m in seen.maps]
    assert len(counts) == 13 and counts[-1] == seen.found.report.after[0] < 30
    assert see.layer(seen, 12, see.HEATS[0])[0].size == seen.crop.size


def test_see_energy_is_that_of_the_dense_encoder():
    """By its definition, with a plain loop."""
    seen = see.run(load_image(example_photo()), see.budget("pitome", "Arithmetic", 0.5), 1)
    pixels = vtc.models.images.preprocess(load_image(example_photo()), 224)
    with torch.inference_mode():
        state = see.encoder().backbone(pixels, output_hidden_states=True).hidden_states[7][0, 1:].double()
    unit = state / state.norm(dim=1, keepdim=True)
    wanted = (unit @ unit.T - 9 * torch.eye(256)).max(1).values
    assert torch.allclose(seen.heats["Energy"][7].flatten().double(), wanted, atol=1e-5)


def test_see_offers_what_works_on_an_encoder():
    assert set(see.methods()) == {name for name, cls in METHODS.items() if cls.encoder}


@pytest.mark.parametrize("given", [("tome", "Tokens", 0), ("tome", "Hours", 1), ("tomme", "Tokens", 9)])
def test_see_refuses(given):
    with pytest.raises(OptionError):
        see.budget(*given)
    with pytest.raises(UnsupportedModelError):
        see.run(load_image(example_photo()), see.budget("idpruner", "Tokens", 9), 1)


# -- Ask ------------------------------------------------------------------------------------------------------------


def test_ask(folder):
    image = scenes.scene("test", 0).image
    found = ask.run(folder, image, "what is this ?", ask.budget("tome", 0.25, "ppe"), 1)
    assert found.slots > 1 and found.less.visual == round(found.dense.visual / 4)
    assert chat.remains(image, found, 512)[-1].width >= 512
    shown = unescape(ask.answers(found))
    assert f"{found.dense.visual:,}" in shown and found.dense.answer in shown and found.less.answer in shown
    assert "right" not in shown
    marked = ask.answers(replace(found, less=replace(found.less, answer="<b>Blue.</b>")), found.dense.answer)
    assert marked.count('"vtc-card right"') == marked.count('"vtc-card wrong"') == 1
    assert "<b>" not in marked and "&lt;b&gt;Blue.&lt;/b&gt;" in marked
    assert chat.remains(image, replace(found, grids=(None,)), 512) is None


def test_ask_over_keep(folder):
    """Everything kept is the model itself."""
    image = scenes.scene("test", 0).image
    rows = ask.sweep(folder, image, "what is this ?", "idpruner", "ppe", levels=(0.5, 1.0))
    assert [q for q, _ in rows] == [0.5, 1.0] and rows[0][1].less.visual < rows[0][1].dense.visual
    assert rows[1][1].less.answer == rows[1][1].dense.answer
    chart, table = ask.sweep_html(rows)
    assert "<svg" in chart and table.count("<tr>") == 4


def test_ask_refuses(folder, tmp_path):
    image, method = Image.new("RGB", (64, 64)), ask.budget("tome", 0.5)
    for name, prompt, words in (
        ("", "what ?", "no model"),
        (folder, " ", "no question"),
        (folder, "w" * 2001, "2001 characters"),
        (str(tmp_path / "none"), "what ?", "no such folder"),
        (str(tmp_path), "what ?", "no config.json"),
        ("llava", "what ?", "no multimodal LLM"),
    ):
        with pytest.raises(VTCError, match=words):
            ask.run(name, image, prompt, method, 1)
    with pytest.raises(OptionError):
        ask.budget("tome", 0.0)


def test_scenes_bring_their_questions():
    for number in range(20):
        scene = scenes.scene("test", number)
        asked = ask._questions(scene)
        assert 1 <= len(asked) <= 6 and set(asked) <= set(ask._truth(scene))
        assert {q.kind for q in scene.questions if q.text in asked} == {q.kind for q in scene.questions}


# -- Watch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evs", "vidcom2", "flashvid", "divprune+shares=change", "random"])
def test_watch(name):
    """Answers, tokens by frame, and the strip, for maps with a row for the clip and with a row for each frame."""
    text, question = next(iter(watch.questions(watch.clip(1)).items()))
    found = watch.run(1, text, ask.budget(name, 0.3), 1)
    (kept,) = found.report.frames
    assert len(kept) == 4 and sum(kept) == found.less.visual and found.dense.visual == 4 * 144
    assert abs(found.less.visual - 0.3 * 576) <= 2 and (name == "evs") == (kept[0] == 144)
    shown = ask.answers(found, question.answer)
    assert ">144, 144, 144, 144<" in shown and f">{', '.join(map(str, kept))}<" in shown
    assert "As it is · right" in shown
    strip, plain = watch.strip(1, found), film(watch.clip(1).frames[::2], vtc.TokenMap.identity(4, 144))
    assert strip.size == plain.size
    if not found.method.merges:  # what each frame lost is drawn otherwise, and nothing else is
        apart = (np.asarray(strip) != np.asarray(plain)).any(-1)
        for t, count in enumerate(kept):
            left = 19 + t * (312 + 19)
            cells = apart[19 : 19 + 312, left : left + 312].reshape(12, 26, 12, 26)
            assert int(cells.any((1, 3)).sum()) == 144 - count


def test_watch_without_compression():
    found = watch.run(0, next(iter(watch.questions(watch.clip(0)))), ask.budget("divprune", 1.0), 1)
    assert found.less.answer == found.dense.answer and found.report.frames == ((144,) * 4,)


def test_watch_refuses():
    other = next(q for q in watch.questions(watch.clip(1)) if q not in watch.questions(watch.clip(0)))
    for prompt in (None, "", other):
        with pytest.raises(OptionError, match="one of the questions about this clip"):
            watch.run(0, prompt, ask.budget("evs", 0.5), 1)


def test_watch_offers_what_is_there():
    """Every method of the list, said what it does; every clip has questions, each of them with one answer."""
    for name in watch.METHODS:
        assert ask.budget(name, 0.5).label == name
        assert watch.about(name).endswith(".") and ("Frames" in watch.about(name)) <= ("shares" in name)
    for number in range(12):
        clip = watch.clip(number)
        asked = watch.questions(clip)
        assert asked and len(asked) == len({*clip.questions, *clip.changes})
    assert "data:image/webp;base64," in watch.moving(0) and "http" not in watch.moving(0)


# -- files ----------------------------------------------------------------------------------------------------------


def test_bad_files(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "large.png")
    Image.new("RGB", (3000, 1500)).save(tmp_path / "good.png")
    for name, words in (
        ("text.jpg", "'text.jpg': not a picture"),
        ("large.png", "'large.png': more than 64 megapixels"),
    ):
        with pytest.raises(ImageError, match=words) as caught:
            look.picture(str(tmp_path / name))
        assert str(tmp_path) not in str(caught.value)
    assert look.picture(str(tmp_path / "good.png")).size == (1024, 512)


def test_what_the_page_says_of_errors():
    with pytest.raises(gr.Error) as caught, look.plainly():
        raise OptionError("<img src=x> is unknown")
    assert caught.value.message == "&lt;img src=x&gt; is unknown"
    with pytest.raises(ZeroDivisionError), look.plainly():
        _ = 1 / 0


# -- the page -------------------------------------------------------------------------------------------------------


def test_queue_and_privacy(demo):
    assert demo._queue.max_size == 16 and demo._queue.default_concurrency_limit == 1
    assert demo.analytics_enabled is False and demo.delete_cache == (600, 3600)
    models = [f for f in demo.fns.values() if f.concurrency_id == "model"]
    assert len(models) == 6  # See by its button and on opening, Ask, Ask at other budgets, Watch, and Find
    assert all(f.api_visibility == "private" for f in demo.fns.values())
    assert not LAUNCH["share"] and not LAUNCH["enable_monitoring"]
    assert "http" not in LAUNCH["css"] and not LAUNCH["theme"]._stylesheets


def test_space(monkeypatch):
    """The Space lends a GPU to what runs a model, names the Gradio that was tested, and runs without `spaces` too."""
    lent = []
    fake = types.ModuleType("spaces")
    fake.GPU = lambda run: lent.append(run) or run
    monkeypatch.setitem(sys.modules, "spaces", fake)
    space = ROOT / "demos" / "space"
    assert isinstance(runpy.run_path(str(space / "app.py"))["demo"], gr.Blocks)
    assert len(lent) == 4
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert "demo" in runpy.run_path(str(space / "app.py"))
    front = dict(re.findall(r"^(\w+): (.+)$", (space / "README.md").read_text().split("---")[1], re.MULTILINE))
    assert f"gradio=={front['sdk_version']}" in (ROOT / "constraints.txt").read_text()
    assert (space / front["app_file"]).exists() and (space / "requirements.txt").exists()


def test_a_port_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["demo", "--port", str(port)]) == 2
    assert f"--port {port}: cannot be opened" in capsys.readouterr().err
