"""Throw-away environments for checks that need other versions of some packages: these are installed in front of the
development environment's, whose own packages are appended to the path."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Environment:
    """One in the folder `work`, which is on its path, for the check `name`.

    Attributes:
        env: of its processes.
    """

    def __init__(self, name: str, work: Path, **variables: str) -> None:
        self.name, self.work = name, work
        home = work / "venv"
        self.python = str(home / ("Scripts" if os.name == "nt" else "bin") / "python")
        self.env = {**os.environ, "PYTHONPATH": str(work), "VIRTUAL_ENV": str(home), **variables}
        self.env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        shared = Path(sysconfig.get_path("purelib"))
        lines = [str(shared)]
        if (shared / "_vtc_dev_torchvision.py").exists():
            lines.append("import _vtc_dev_torchvision")
        Path(own, "zz_shared.pth").write_text("\n".join(lines) + "\n")

    def install(self, *packages: str, free: tuple[str, ...] = ()) -> bool:
        """Whether pip could, under constraints.txt without the pins of `free`. It sees the shared packages, keeps those
        that fit and installs the others in front of them."""
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        constraints = self.work / "constraints.txt"
        constraints.write_text("\n".join(pin for pin in pins if pin.split("==")[0] not in free) + "\n")
        print(f"{self.name}: installing {', '.join(packages)} in a throw-away environment", flush=True)
        pip = [self.python, "-m", "pip", "install", "-qq", "-c", str(constraints), *packages]
        status = subprocess.run(pip, env=self.env, stdin=subprocess.DEVNULL).returncode
        if status:
            print(f"{self.name}: {', '.join(packages)} does not install", file=sys.stderr)
        return not status

    def pytest(self, plugin: str, *arguments: str, cwd: Path = ROOT) -> int:
        """pytest's exit status, with a plugin of this source, which its workers load too."""
        module = self.name.replace("-", "_") + "_plugin"
        (self.work / f"{module}.py").write_text(plugin)
        command = [self.python, "-m", "pytest", "-p", module, "-p", "no:cacheprovider", "-q", *arguments]
        status = subprocess.run(command, cwd=cwd, env=self.env, stdin=subprocess.DEVNULL).returncode
        outcome = "the tests fail" if status else "the tests pass"
        print(f"{self.name}: {outcome}", file=sys.stderr if status else sys.stdout)
        return status
