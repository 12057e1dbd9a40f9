"""The house stays in order: imports run one way, files stay short, nothing prints."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

VTC = Path(__file__).resolve().parent.parent / "vtc"
ORDER = [  # a part imports from its own line and the lines above it, also inside functions
    {"errors", "macs", "layout", "version"},
    {"checks", "ops", "checkpoints", "tokens"},
    {"budget", "scores", "token_map"},
    {"positions", "frames"},
    {"methods", "viz"},
    {"decide"},  # the waist: from units of tokens and a budget to a TokenMap
    {"functional", "adapters", "retrieval", "vllm"},
    {"plan"},
    {"handle", "models"},
    {"config", "bench", "harness", "eval"},
    {"auto", "demo"},
    {"api", "cli"},
    {"train", "__main__"},
    {"images", "timm_models"},  # old names, for one version
]
REASONS: dict[str, str] = {  # files of more than 400 lines
    "cli/command.py": "one function per command, and nothing else",
    "functional.py": "one function per decision, and nothing else",
    "ops/cupy.py": "one function per operator, and how they are launched",
}


def imported(path):
    """The parts of vtc that a file names."""
    parts = {p.stem if p.is_file() else p.name for p in VTC.iterdir()}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vtc":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "vtc"]
        for name in names:
            part = f"{name}.".split(".")[1]
            if part in parts:
                yield part


def files():
    return [path for path in sorted(VTC.rglob("*.py")) if path != VTC / "__init__.py"]


def test_imports_run_one_way():
    rank = {part: i for i, line in enumerate(ORDER) for part in line}
    unknown, wrong = set(), set()
    for path in files():
        inside = path.relative_to(VTC)
        me = inside.parts[0].removesuffix(".py")
        for part in imported(path):
            unknown |= {me, part} - set(rank)
            if not unknown and rank[part] > rank[me]:
                wrong.add(f"{inside} imports {part}")
    assert not unknown and not wrong


def circles(root):
    """The files of `root` that import each other in a circle, those for types alone counted; and inside functions."""
    names = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root.parent).with_suffix("").parts
        names[".".join(inside[:-1] if inside[-1] == "__init__" else inside)] = path
    graph = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name] |= {full if full in names else node.module for full in named} & set(names)
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & set(names)
        graph[name] -= {name, root.name}  # `import vtc` is everything
    left, free = dict(graph), ["?"]
    while free:  # what uses nothing that is left, or is used by nothing that is left, is in no circle
        used = set().union(*left.values()) if left else set()
        free = [name for name, uses in left.items() if name not in used or not uses & set(left)]
        left = {name: uses for name, uses in left.items() if name not in free}
    return {name: sorted(uses & set(left)) for name, uses in left.items()}


def test_no_file_is_in_a_circle(tmp_path):
    assert circles(VTC) == {}
    planted = tmp_path / "vtc"
    planted.mkdir()
    (planted / "a.py").write_text("from vtc.b import c\n")
    (planted / "b.py").write_text("if TYPE_CHECKING:\n    from vtc import a\n")
    (planted / "d.py").write_text("from vtc import a\n")
    assert set(circles(planted)) == {"vtc.a", "vtc.b"}


def test_no_method_is_in_an_adapter_and_no_adapter_in_a_method():
    """Adapters take functions and the base class."""
    for path in (VTC / "adapters").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vtc.methods"):
                classes = {alias.name for alias in node.names if alias.name[0].isupper()}
                assert classes <= {"Method", "Tokens"}, f"{path.name} names {classes}"
    for path in (VTC / "methods").glob("*.py"):
        assert "adapters" not in set(imported(path))


def test_files_are_short():
    long = {str(p.relative_to(VTC)): n for p in files() if (n := len(p.read_text().splitlines())) > 400}
    assert set(long) <= set(REASONS), f"say why, or split: {long}"
    for path in (VTC / "methods").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 250, path.name


def test_nothing_prints_and_nothing_runs_code_from_outside():
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "id", "")
            assert name not in ("print", "eval", "exec"), f"{path}:{node.lineno}: {name}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "marshal", "shelve", "dill"} & set(names), f"{path}:{node.lineno}"


@pytest.mark.parametrize(("old", "new"), [("vtc.images", "vtc.models.images"), ("vtc.timm_models", "vtc.harness.timm")])
def test_what_has_moved_is_still_found(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{new} now"):
        module = importlib.import_module(old)
    assert all(getattr(module, name) is getattr(importlib.import_module(new), name) for name in module.__all__)
