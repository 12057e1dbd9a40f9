#!/usr/bin/env python3
"""Make torchvision importable in a development environment whose torch is the CPU build.

pip resolves ``torch==2.13.0`` to a CPU wheel and, beside it, torchvision to a CUDA wheel. That torchvision cannot
load its compiled operators and fails at import with ``operator torchvision::nms does not exist``; timm, open_clip
and every model class of transformers fail with it. None of them needs those operators here.

Run inside a virtual environment, this script tries the import in a subprocess. Only on exactly that error does it
write an import hook into the environment's site-packages: at the first ``import torchvision`` of a process, the hook
tries the real import, and only on exactly that error declares the two missing operators (without an implementation)
and imports again. A process that never imports torchvision pays nothing, and a torchvision that matches its torch is
left alone. Users of vtc never need any of this: it belongs to the development environment, not to the package.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ERROR = "operator torchvision::nms does not exist"
MODULE = "_vtc_dev_torchvision"

HOOK = f'''"""Written by tools/repair_torchvision.py: lets a CUDA build of torchvision import beside a CPU torch."""

import sys

ERROR = {ERROR!r}
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
libraries = []  # kept referenced: a Library takes its definitions back when it is collected


def _run(execute, module):
    """Execute torchvision's __init__; on the known error declare the missing operators and execute it once more."""
    clean = dict(vars(module))
    try:
        execute(module)
        return
    except RuntimeError as error:
        if str(error) != ERROR:
            raise
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
    vars(module).clear()
    vars(module).update(clean)

    import torch

    if not libraries:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + SCHEMA)
        libraries.append(library)
    execute(module)


class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torchvision":
            return None
        from functools import partial
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader.exec_module = partial(_run, spec.loader.exec_module)
        return spec


sys.meta_path.insert(0, Finder)
'''

# The hook is taken out first, so that what is tried is torchvision itself.
PROBE = f"""
import importlib.util, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__module__", "") != {MODULE!r}]
if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("torch") is None:
    print("absent")
else:
    try:
        import torchvision
    except Exception as error:
        print("failed", type(error).__name__, error)
    else:
        print("fine")
"""


def python(code: str) -> str:
    """The last line that `code` prints in a fresh interpreter of this environment."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def main() -> int:
    site_packages = Path(sysconfig.get_path("purelib"))
    files = {site_packages / f"{MODULE}.py": HOOK, site_packages / f"{MODULE}.pth": f"import {MODULE}\n"}
    found = python(PROBE)
    if found in ("fine", "absent"):
        for path in files:
            path.unlink(missing_ok=True)
        print("torchvision is fine" if found == "fine" else "no torchvision")
        return 0
    if found != f"failed RuntimeError {ERROR}":
        print(f"torchvision does not import, and not for the known reason: {found}", file=sys.stderr)
        return 1
    if sys.prefix == sys.base_prefix:
        print("torchvision does not match torch; run this in a virtual environment to repair it", file=sys.stderr)
        return 1
    for path, text in files.items():
        path.write_text(text)
    found = python("import torchvision; print('fine')")
    if found != "fine":
        for path in files:
            path.unlink()
        print(f"the repair of torchvision did not work: {found}", file=sys.stderr)
        return 1
    print(f"torchvision was built for another torch: it imports now, without its operators ({MODULE}.pth)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
