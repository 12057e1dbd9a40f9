"""The site of the documentation builds strictly, and asks nobody else for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vtc

for package in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[docs]'")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
# What a browser fetches by itself; links that people follow (<a href>) are none of these.
FETCHED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?:https?:)?//|@import\s|url\(["']?https?:""")
SHEET = re.compile(r"""<link\b[^>]*\brel=["'](?:stylesheet|preconnect|preload)["'][^>]*\bhref=["'](?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(target)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return target


def test_nothing_is_fetched_from_elsewhere(site):
    assert FETCHED.search('<img alt="" src="https://example.org/a.png">') and SHEET.search(
        '<link rel="stylesheet" href="https://example.org/a.css">'
    )
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = page.read_text()
        assert not FETCHED.search(text) and not SHEET.search(text), page
        assert 'class="mermaid"' not in text, f"{page}: its diagrams are drawn by a script from elsewhere"


def test_pages_link_to_files_of_the_repository(site):
    for file in ("benchmarks/results/elpv.csv", "benchmarks/results/mllm-cpu.html", "notebooks/quickstart.ipynb"):
        assert (site / "files" / file).stat().st_size > 100, file
    assert 'href="../files/benchmarks/results/mllm-cpu.html"' in (site / "methods" / "idpruner.html").read_text()


@pytest.mark.parametrize("module", ["vtc", "vtc.functional", "vtc.scores", "vtc.viz", "vtc.checkpoints", "vtc.ops"])
def test_every_public_name_has_its_reference(site, module):
    import importlib

    page = (site / "api" / f"{module.removeprefix('vtc.')}.html").read_text()
    for name in importlib.import_module(module).__all__:
        if not (module == "vtc" and name == "functional"):
            assert f'id="{module}.{name}"' in page, name
    assert vtc.ops.energy.__doc__  # taken over from its definition when the module runs
    if module == "vtc.ops":
        assert "redundant" in page


def test_a_broken_link_fails(tmp_path):
    """What `--strict` is relied on for."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[nowhere](missing.md) [no heading](#missing)")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nvalidation: {links: {not_found: warn, anchors: warn}}\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0 and "missing.md" in run.stderr and "#missing" in run.stderr
