"""The kernels; everything else is declared in pyproject.toml.

They are built here only where torch can be found: in place by `make setup`, into a wheel by `make wheel` or with
`pip install --no-build-isolation`; C++ where a compiler is, CUDA where nvcc is (no GPU is needed for that). Else the
wheel carries their sources, and their first use builds them (vtc/ops/build.py, whose commands these are).
VTC_NO_EXT=1 builds nothing; VTC_REQUIRE_EXT=1 makes a failure one.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

spec = importlib.util.spec_from_file_location("vtc_build", Path("vtc", "ops", "build.py"))
build = importlib.util.module_from_spec(spec)  # by its path: `import vtc` would want torch
spec.loader.exec_module(build)
REQUIRED = bool(os.environ.get("VTC_REQUIRE_EXT"))


class Kernels(build_ext):
    def build_extension(self, extension: Extension) -> None:
        kind = extension.name.rpartition("._")[2]
        target = Path(self.get_ext_fullpath(extension.name)).with_name(f"_{kind}.abi3.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.compile(kind, target)
        except build.BuildError as error:
            if REQUIRED:
                raise SystemExit(f"{error.output}\nvtc: the {kind} kernels were not built: {error}") from error
            sys.stderr.write(f"vtc: the {kind} kernels were not built ({error}): their first use tries again\n")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """In place: the package lies in the root of the project."""
        for built in Path(self.build_lib, "vtc").glob("_*.abi3.so"):
            shutil.copy2(built, Path("vtc", built.name))


class Modules(build_py):
    def run(self) -> None:
        """The package takes along what it compiles; a checkout has it in csrc."""
        super().run()
        if not self.editable_mode:
            for source in {source for kind in build.KINDS for source in build.sources(kind)}:
                target = Path(self.build_lib, "vtc", "ops", "csrc", source.relative_to(build.PLACES[1]))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        built = any(Path(self.bdist_dir, "vtc").glob("_*.abi3.so"))
        return ("cp310", "abi3", super().get_tag()[2]) if built else ("py3", "none", "any")


def extensions() -> list[Extension]:
    if os.environ.get("VTC_NO_EXT"):
        return []
    if importlib.util.find_spec("torch") is None:
        if REQUIRED:
            raise SystemExit("VTC_REQUIRE_EXT is set, but torch is not here: install it, then --no-build-isolation")
        return []
    found = []
    for kind in build.KINDS:
        try:
            build.compiler(kind)
        except build.BuildError as error:
            if REQUIRED and kind == "cpp":
                raise SystemExit(f"VTC_REQUIRE_EXT is set, but {error}") from error
            continue
        found.append(Extension(f"vtc._{kind}", [f"csrc/{build.SOURCES[kind][0]}"]))
    return found


setup(ext_modules=extensions(), cmdclass={"build_py": Modules, "build_ext": Kernels, "bdist_wheel": Wheel})
