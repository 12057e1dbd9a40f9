"""The demo in Chromium, served by `vtc demo`: its tabs on real input, bad files, and no request to the outside."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vtc.eval import scenes
from vtc.models.images import example_photo

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")
pytest.importorskip("gradio")
pytest.importorskip("onnx")

from vtc.demo import find  # noqa: E402

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WIDER = """() => [...document.querySelectorAll('.vtc-card')].flatMap(card => [...card.querySelectorAll('*')].filter(
    part => part.getBoundingClientRect().right > card.getBoundingClientRect().right || part.tagName == 'STRONG'
        && part.scrollWidth > part.clientWidth).map(part => part.outerHTML))"""
SLOW = 120_000  # ms; what takes a second on an idle machine


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """`vtc demo` as people start it; it ends as people end it. Its files lie apart: beside tests/test_demo.py, in the
    folder that Gradio shares between processes, a page once got 403 for one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # a shell that ran these tests in the background would hand on that Ctrl+C is ignored
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from vtc.cli.command import main; sys.exit(main())"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("gradio"))}
    command = [sys.executable, "-c", code, "demo", "--json", "--threads", "1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as run:
        try:
            said = ""
            while not said.endswith("}\n"):
                said += run.stdout.readline() or pytest.fail("vtc demo ended before it served")
            yield json.loads(said)["url"]
            run.send_signal(signal.SIGINT)
            assert run.wait(60) == 0
        finally:
            run.kill()


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        path = next(filter(None, map(shutil.which, NAMES)), str(own) if own.exists() else None)
        if path is None:
            pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH; on Debian, apt-get install chromium")
        chromium = playwright.chromium.launch(executable_path=path, args=QUIET.split())
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, url):
    """The opened page, once the first photograph is through. No errors, and no request to anywhere else."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(SLOW)
    errors, outside = [], []
    opened.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda sent: outside.append(sent.url) if not _here(sent.url, url) else None)
    opened.goto(url)
    opened.wait_for_selector("#see-numbers strong")
    yield opened
    opened.close()
    assert not errors and not outside


def _here(address, url):
    return address.startswith((url, "data:", "blob:" + url))


def _choose(page, field, option):
    page.locator(f"{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def _upload(page, button, path):
    with page.expect_file_chooser() as chooser:
        page.locator(button).click()
    chooser.value.set_files(path)


def test_see(page):
    """Numbers, the slider, another method and budget."""
    first = page.locator("#see-numbers strong")
    assert re.fullmatch(r"256 → \d+", first.nth(0).inner_text())
    assert re.fullmatch(r"[\d.]+ → [\d.]+ bn", first.nth(1).inner_text())
    page.locator("#see-layer input[type=number]").fill("3")
    page.locator("#see-layer input[type=number]").press("Enter")
    label = page.locator("#see-groups", has_text=re.compile(r"After 3 layers: \d+ tokens"))
    label.wait_for()
    _choose(page, "#see-method", "tome")
    page.get_by_label("Tokens", exact=True).check()
    page.locator("#see-tokens input[type=number]").fill("64")
    page.locator("#see-run").click()
    page.locator("#see-numbers strong", has_text="256 → 64").wait_for()
    assert page.locator("#see-heat img").evaluate("image => image.naturalWidth") == 512
    assert page.locator("svg[role=img]:visible").count() == 1


def test_ask(page, tmp_path):
    """A question of the scene's, both answers of the model that comes along, what is left, other budgets."""
    page.get_by_role("tab", name="Ask").click()
    page.locator("#ask-next").click()
    page.locator("label", has_text="Scene 1").wait_for()
    wanted = next(q.text for q in scenes.scene("test", 1).questions if q.kind == "count")
    page.locator("#ask-ready label", has_text=wanted).first.click()
    api.expect(page.locator("#ask-question textarea")).to_have_value(wanted, timeout=SLOW)
    page.locator("#ask-positions label", has_text="PPE").click()
    page.get_by_label("Merged tokens weigh by their size").check()
    page.locator("#ask-run").click()
    page.wait_for_selector("#ask-levels table")
    cards = page.locator("#ask-answers .vtc-card")
    assert cards.count() == 2
    dense, less = (int(cards.nth(i).locator("dd").first.inner_text()) for i in (0, 1))
    assert (dense, less) == (256, 64)
    assert "As it is · right" in cards.nth(0).inner_text()
    assert re.fullmatch(r"[\d.]+ ms", cards.nth(0).locator("dd").nth(2).inner_text())
    assert "kB" in cards.nth(1).locator("dd").nth(3).inner_text()
    page.locator("#ask-left", has_text=f"{dense} → {less} image tokens; rings").wait_for()
    assert page.locator("#ask-levels tbody tr").count() == 6
    page.locator("#ask-model input").fill(str(tmp_path / "none"))
    page.locator("#ask-model input").press("Enter")
    page.locator("#ask-run").click()
    page.get_by_text("no such folder").wait_for()


def test_watch(page):
    """Another clip and its question, both answers, tokens of each frame, and the strip."""
    page.get_by_role("tab", name="Watch").click()
    page.locator("#watch-next").click()
    page.locator("#watch-clip", has_text="Clip 1").wait_for()
    wanted = scenes.clip("test", 1).questions[0].text
    page.locator("#watch-ready label", has_text=wanted).click()
    _choose(page, "#watch-method", "evs")
    page.locator("#watch-method", has_text="Keeps what changed").wait_for()
    page.locator("#watch-keep input[type=number]").fill("0.4")
    page.locator("#watch-run").click()
    page.wait_for_selector("#watch-film img")
    cards = page.locator("#watch-answers .vtc-card")
    assert cards.count() == 2 and "As it is · right" in cards.nth(0).inner_text()
    frames = [int(count) for count in cards.nth(1).locator("dd").nth(1).inner_text().split(", ")]
    assert frames[0] == 144 and sum(frames) == int(0.4 * 576)
    size = "image => [image.naturalWidth, image.naturalHeight]"
    assert page.locator("#watch-film img").evaluate(size) == [4 * 331 + 19, 416]
    page.set_viewport_size({"width": 400, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400 and page.evaluate(WIDER) == []


def test_find(page):
    """A page clicked on gives its words; they find it, before and after; fewer vectors, and words that are unknown."""
    page.get_by_role("tab", name="Find").click()
    page.locator("#find-pages button").nth(3).click()
    query = page.locator("#find-query textarea, #find-query input")
    api.expect(query).to_have_value(find.examples()[3], timeout=SLOW)
    page.locator("#find-run").click()
    page.wait_for_selector("#find-ranking table")
    first = page.locator("#find-numbers strong")
    assert [first.nth(i).inner_text() for i in (0, 1, 3)] == ["1,026 → 342", "131 → 44", "3"]
    assert page.locator("#find-words .vtc-card").count() == 4
    assert page.locator("#find-ranking td").nth(1).inner_text() == "all of the words"
    for side, label in (("left", "all vectors"), ("right", "fewer vectors")):
        page.locator(f"#find-{side}", has_text=f"Page 3, {label}").wait_for()
        assert page.locator(f"#find-{side} img").evaluate("image => image.naturalWidth") == 1024
    assert page.evaluate(WIDER) == []
    _choose(page, "#find-method", "tome")
    page.locator("#find-keep label", has_text="half").click()
    query.fill("puzzle zzz")
    query.press("Enter")
    page.get_by_text("unknown: zzz").wait_for()
    query.fill("puzzle wolf")
    query.press("Enter")
    page.locator("#find-numbers strong", has_text="1,026 → 171").wait_for()


def test_uploads(page, tmp_path):
    """A text file renamed .jpg and a picture of 144 megapixels get a clear message; a good one is used."""
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "large.png")
    Image.open(example_photo()).rotate(90, expand=True).save(tmp_path / "good.png")
    for tab, field in (("See", "#see-upload"), ("Ask", "#ask-upload")):
        page.get_by_role("tab", name=tab).click()
        for name, words in (("text.jpg", "not a picture"), ("large.png", "more than 64 megapixels")):
            _upload(page, field, tmp_path / name)
            message = page.get_by_text(f"'{name}': {words}")
            message.wait_for()
            page.get_by_test_id("toast-close").click()  # the other tab is to say the same by itself
            api.expect(message).to_have_count(0, timeout=SLOW)
    _upload(page, "#ask-upload", tmp_path / "good.png")
    page.locator("label", has_text="Your picture").wait_for()
    api.expect(page.locator("#ask-question textarea")).to_have_value("How many things are there?", timeout=SLOW)
    assert not page.locator("#ask-ready").is_visible()


def test_nothing_overflows(page):
    for width, scheme in itertools.product((1280, 400), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        for tab in ("See", "Ask", "Watch", "Find"):
            page.get_by_role("tab", name=tab).click()
            page.locator(f"#{tab.lower()}-run").wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(WIDER) == []
