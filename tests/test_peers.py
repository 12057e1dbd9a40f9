"""benchmarks/peers.py on stand-ins for the reference repositories: files of the same names with functions of the same
signatures, written for this test. The repositories themselves are the user's to fetch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vtc import ops

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402

MERGE = '''
import torch

def slots(best, source, target, tokens):
    """Slots in any order: sources to their targets', all others alone."""
    group = torch.arange(tokens).expand(len(source), -1).scatter(1, source, target)
    where = torch.nn.functional.one_hot(group, tokens).mT.float()
    def merge(x, mode="sum"):
        if mode == "amax":
            return (where[..., None] * x[:, None]).amax(2)
        return where.to(x.dtype) @ x
    return merge

def merge_wavg(merge, x, size=None):
    total = merge(size, mode="sum")
    return merge(x * size, mode="sum") / total.clamp(min=1e-9), total

def merge_source(merge, x, source=None):
    tokens = x.shape[1]
    return merge(torch.eye(tokens).expand(len(x), tokens, tokens), mode="amax")

def pairs(metric, a, b, r, class_token):
    score = metric.gather(1, a[..., None].expand(-1, -1, metric.shape[2]))
    score = score @ metric.gather(1, b[..., None].expand(-1, -1, metric.shape[2])).mT
    if class_token:
        score = score.masked_fill((a == 0)[..., None], -9).masked_fill((b == 0)[:, None], -9)
    best, at = score.max(2)
    order = best.argsort(1, descending=True)[:, :r]
    return slots(best, a.gather(1, order), b.gather(1, at.gather(1, order)), metric.shape[1])
'''
TOME = (
    MERGE
    + """
def bipartite_soft_matching(metric, r, class_token=False, distill_token=False):
    index = torch.arange(metric.shape[1]).expand(len(metric), -1)
    unit = torch.nn.functional.normalize(metric, dim=-1)
    return pairs(unit, index[:, ::2], index[:, 1::2], r, class_token), None
"""
)
PITOME = (
    MERGE
    + """
def vision(metric, ratio, margin, protect, energy, half=False):
    unit = torch.nn.functional.normalize(metric, dim=-1)
    patches = metric.shape[1] - 1
    r = int(patches - patches * ratio)
    cosine = unit[:, 1:] @ unit[:, 1:].mT
    order = energy(cosine).mean(-1).argsort(1, descending=True) + 1
    order = order[:, : 2 * r] if protect else order
    a, b = (order[:, :r], order[:, r:]) if half else (order[:, ::2], order[:, 1::2])
    return pairs(unit, a, b, r, False)

def pitome_vision(metric, ratio=1.0, margin=0.5, class_token=False, alpha=1.0, use_bsm=False, use_bsm_pitome=False):
    return vision(metric, ratio, margin, not use_bsm_pitome, lambda s: torch.nn.functional.elu(s - margin))

def pitome_text(metric, ratio=1.0, margin=0.5, class_token=False):
    return vision(metric, ratio, margin, True, lambda s: torch.exp(-(((1 - s) / (1 - margin)) ** 2) / 2), True)
"""
)
CONTEXT = """
class PruningContext:
    def __init__(self, input_ids, inputs_embeds, model_config=None):
        self.inputs_embeds, self.vit_q, self.vit_k = inputs_embeds, {}, {}
"""
IDPRUNER = """
import torch
from ..base.context import PruningContext

def get_universal_selector_scores(**_):
    raise RuntimeError("no scorer here")

def idpruner(context, **options):
    weight = get_universal_selector_scores(selector_path=options["selector_path"])[0]
    weight = (weight - weight.min()) / (weight.max() - weight.min() + 1e-6)
    unit = torch.nn.functional.normalize(context.inputs_embeds[0], dim=-1)
    keep = torch.zeros(len(unit), dtype=torch.bool)
    while keep.sum() < round(len(unit) * (1 - options["ratio"])):
        score = weight / 2 - (unit @ unit[keep].T).amax(1) / 2 if keep.any() else weight
        keep[score.masked_fill(keep, -9).argmax()] = True
    return keep[None]
"""
# the first tokens, whatever they are
DIVPRUNE = """
import torch

def divprune(context, ratio, **_):
    tokens = context.inputs_embeds.shape[1]
    return torch.arange(tokens)[None] < round(tokens * (1 - ratio))
"""
COMPRESSOR = "angelslim/compressor/token_compressor"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(peers, "ENCODER", (33,))
    monkeypatch.setattr(peers, "SELECTION", ((40, 24, 7),))


@pytest.fixture
def checkout(tmp_path):
    """A function that writes files into a new folder."""

    def write(name, files):
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return tmp_path / name

    return write


def table(text):
    """The cells of every row below the heads."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return lines[2:]


def test_tome_and_pitome(checkout, capsys, tmp_path):
    """The packages around the files import what is not there: they are not touched."""
    broken = "import a_module_that_is_not_there"
    tome = checkout("ToMe", {"tome/merge.py": TOME, "tome/__init__.py": broken})
    pitome = checkout("PiToMe", {"algo/pitome/merge.py": PITOME, "algo/__init__.py": broken})
    out = tmp_path / "table.md"
    peers.main(["--tome", str(tome), "--pitome", str(pitome), "--repeats", "2", "--out", str(out)])
    said = capsys.readouterr().out
    assert out.read_text() == said
    assert f"peers.py --tome {tome}" in said and "torch" in said and "ToMe without a commit" in said
    found = table(said)
    assert [row[0] for row in found] == ["ToMe", "PiToMe", "PiToMe", "PiToMe"]
    assert "use_bsm_pitome" in found[2][1] and found[3][1].startswith("pitome_text")
    for row in found:
        assert row[3] == "groups of 16/16 images, values within 1e-05"
        assert float(row[4]) > 0 and float(row[5]) > 0 and float(row[7]) > 0
        assert (float(row[6]) > 0) if ops.backend() == "cpp" else row[6] == "not built"


def test_selections(checkout, capsys):
    """Picks that agree, picks that do not, a module of theirs that cannot be imported, and files that are not there."""
    root = checkout(
        "AngelSlim",
        {
            f"{COMPRESSOR}/base/context.py": CONTEXT,
            f"{COMPRESSOR}/algorithm/idpruner.py": IDPRUNER,
            f"{COMPRESSOR}/algorithm/divprune.py": DIVPRUNE,
            f"{COMPRESSOR}/algorithm/scope.py": "import a_module_that_is_not_there",
            f"{COMPRESSOR}/algorithm/vispruner.py": "def vispruner_pruning(context):\n    pass",
        },
    )
    before = ops.backend()
    peers.main(["--angelslim", str(root), "--repeats", "1"])
    found = {row[1]: row[3:] for row in table(capsys.readouterr().out)}
    assert found["idpruner"][0] == "7/7 picks" and float(found["idpruner"][1]) > 0
    assert "coverage: theirs" in found["divprune"][0] and not found["divprune"][0].startswith("7/7")
    assert "not run: ModuleNotFoundError: No module named 'a_module_that_is_not_there'" in found["scope_pruning"][0]
    assert found["vispruner_pruning"][0].startswith("not run: TypeError")
    assert found["visionzip"][0].startswith("not run: FileNotFoundError") and "visionzip.py" in found["visionzip"][0]
    assert ops.backend() == before


def test_groups_that_differ(checkout, capsys):
    """Float64 is asked whose they are. Here the sides of the split are swapped: only mutual partners are the same."""
    other = TOME.replace("index[:, ::2], index[:, 1::2]", "index[:, 1::2], index[:, ::2]")
    peers.main(["--tome", str(checkout("other", {"tome/merge.py": other})), "--repeats", "1"])
    (row,) = table(capsys.readouterr().out)
    found = re.match(r"groups of (\d+)/16 .* tokens apart; as in float64: theirs 16, vtc (\d+)\)", row[3])
    assert found and found[1] == found[2] != "16"


def test_nothing_ran(checkout, capsys):
    """A named checkout without a single row is an error, behind the table and its file."""
    root = checkout("ToMe", {"tome/merge.py": "import a_module_that_is_not_there"})
    out = root / "table.md"
    with pytest.raises(SystemExit, match=f"none of their functions ran of --tome {root}"):
        peers.main(["--tome", str(root), "--repeats", "1", "--out", str(out)])
    assert "not run: ModuleNotFoundError" in capsys.readouterr().out and "not run" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name a checkout (--tome, --pitome, --angelslim)"),
        (["--tome", "nowhere"], "peers: --tome: nowhere is not there"),
        (["--tome", "."], "peers: --tome: tome/merge.py is not there"),
        (["--pitome", "."], "peers: --pitome: algo/pitome/merge.py is not there"),
        (["--angelslim", "."], f"peers: --angelslim: {COMPRESSOR}/base/context.py is not there"),
        (["--tome", ".", "--repeats", "0"], "at least one of --repeats"),
    ],
)
def test_what_is_missing_is_named(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        peers.main(arguments)
    assert sentence in str(stopped.value) and "\n" not in str(stopped.value)
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_as_a_script(tmp_path):
    """One line on stderr, and an exit status that is not 0."""
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "--tome", str(tmp_path / "gone")]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ran.returncode == 1 and ran.stderr.splitlines() == [f"peers: --tome: {tmp_path / 'gone'} is not there"]
