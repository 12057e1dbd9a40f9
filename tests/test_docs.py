"""What the documentation says is what the code does."""

import json
import multiprocessing
import re
import runpy
import sys
import traceback
from pathlib import Path

import pytest

import vtc

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
EXAMPLES = [page for page in PAGES if "```python\n" in page.read_text()]
# What the examples take for granted: a model, its images, and features of one's own.
SETUP = """
import torch, vtc
from zoo import ZOO, randomise
model, images = randomise(ZOO["timm-dinov2"].build()), torch.randn(2, 3, 64, 64)
features, keys = torch.randn(2, 50, 16), torch.randn(2, 50, 16)
"""
LLM = """
import mllm_zoo
llm, inputs = mllm_zoo.build("llava_next"), mllm_zoo.inputs("llava_next", "single")
"""


@pytest.mark.slow
def test_the_support_matrix_is_up_to_date():
    import support_matrix

    said = json.loads(support_matrix.DATA.read_text())
    assert support_matrix.DATA.read_text() == support_matrix.written(said), "run tools/support_matrix.py"
    assert support_matrix.PAGE.read_text() == support_matrix.page(said), "run tools/support_matrix.py"
    rows = json.loads(json.dumps(support_matrix.encoders() + support_matrix.multimodal(step=6)))  # a sample of these
    assert [row for row in rows if row not in said["models"]] == [], "run tools/support_matrix.py"
    from zoo import ZOO

    assert set(said["matrix"]) == set(ZOO)


def test_the_method_cards_are_up_to_date():
    import method_cards

    assert method_cards.stale() == [], "run tools/method_cards.py"
    card = method_cards.filled(method_cards.begun("dart"), [["facts"]], "a new card")
    assert "# DART" in card and "facts" in card and "few pivots" in card and card.count("<!-- /answers -->") == 1


def name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# Every page in a process of its own; these are copies of one that has only imported what most of them need.
PROCESSES = multiprocessing.get_context("forkserver") if sys.platform != "win32" else multiprocessing.get_context()


def run(script, errors):
    with open(errors, "w") as sys.stderr:
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:
            traceback.print_exc()
            raise SystemExit(1) from None


@pytest.mark.slow
@pytest.mark.parametrize("page", EXAMPLES, ids=name)
def test_python_examples_run(page, tmp_path):
    """Every ```python block runs, in order, with a small model and images at hand (```py: takes an hour, not run)."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    text = "\n".join(blocks)
    script, errors = tmp_path / "page.py", tmp_path / "errors.txt"
    given = SETUP + (LLM if "llm" in text else "")
    for source in re.findall(r"^```cpp\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        (tmp_path / "lengths.cpp").write_text(source)
        given += f"\nimport pathlib\nfolder = pathlib.Path({str(tmp_path)!r})\n"
    script.write_text(given + text)
    PROCESSES.set_forkserver_preload(["vtc", "zoo", "mllm_zoo"])
    process = PROCESSES.Process(target=run, args=(str(script), str(errors)))
    process.start()
    process.join(180)
    process.kill()
    process.join()
    assert process.exitcode == 0, errors.read_text() if errors.exists() else "it did not start"


def test_every_public_name_is_documented():
    for name in vtc.__all__:
        assert getattr(vtc, name).__doc__, name
    for name in vtc.functional.__all__:
        assert getattr(vtc.functional, name).__doc__, name
    text = "".join(page.read_text() for page in PAGES)
    for name in (*vtc.list_methods(), "compress", "remove", "explain", "token_map", "report", "save_config"):
        assert name in text, f"{name} is nowhere in README or docs"
