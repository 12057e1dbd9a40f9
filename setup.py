"""The kernels; everything else is declared in pyproject.toml.

C++ is built where a compiler is, CUDA where nvcc is (no GPU is needed for that). Where either is missing or fails, vtc
installs without and runs on its torch definitions. VTC_NO_EXT=1 builds nothing; VTC_REQUIRE_EXT=1 makes a failure one.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch's stable ABI: one library loads on 2.11 and newer


def torch_paths() -> tuple[list[str], Path]:
    import torch
    from torch.utils.cpp_extension import include_paths

    return [f"-I{path}" for path in include_paths()], Path(torch.__file__).parent / "lib"


class Kernels(build_ext):
    """Calls the compilers themselves: torch's CUDAExtension refuses beside a CPU build of torch."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target = target.with_name(f"{extension.name.rpartition('.')[2]}.abi3.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        name, source = extension.name.rpartition("._")[2], extension.sources[0]
        try:
            includes, libraries = torch_paths()
            common = ["-O3", "-std=c++17", ABI, *includes, source, "-o", str(target), f"-L{libraries}"]
            common += ["-ltorch", "-ltorch_cpu", "-lc10"]
            if name == "cpp":
                compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
                if compiler is None:
                    raise FileNotFoundError("no C++ compiler (g++ or clang++) was found")
                command = [*compiler.split(), *common, "-fPIC", "-shared", "-ffp-contract=fast", "-Wno-psabi"]
            else:
                targets = ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]
                command = [
                    "nvcc",
                    *common,
                    "-shared",
                    "-Xcompiler",
                    "-fPIC",
                    "-cudart",
                    "static",
                    "-diag-suppress",
                    "20012",
                ]
                command += [f"-gencode={target_}" for target_ in targets]
            subprocess.run(command, check=True)
        except Exception as error:
            if os.environ.get("VTC_REQUIRE_EXT"):
                raise
            sys.stderr.write(
                f"vtc: the {name} kernels were not built ({error}): the torch definitions will run instead\n"
            )

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """In place: the package lies in the root of the project."""
        for built in Path(self.build_lib, "vtc").glob("_*.abi3.so"):
            shutil.copy2(built, Path("vtc", built.name))


class Modules(build_py):
    def run(self) -> None:
        """The package takes along what CuPy compiles; a checkout has it in csrc."""
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "vtc", "ops", "cuda")
            folder.mkdir(parents=True, exist_ok=True)
            for header in Path("csrc", "cuda").glob("*.cuh"):
                shutil.copy2(header, folder)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, _, platform = super().get_tag()
        return ("cp310", "abi3", platform) if self.distribution.ext_modules else (python, "none", "any")


def extensions() -> list[Extension]:
    if os.environ.get("VTC_NO_EXT"):
        return []
    found = [Extension("vtc._cpp", ["csrc/cpu.cpp"])]
    if shutil.which("nvcc") and Path("csrc/cuda.cu").exists():
        found.append(Extension("vtc._cuda", ["csrc/cuda.cu"]))
    return found


setup(ext_modules=extensions(), cmdclass={"build_py": Modules, "build_ext": Kernels, "bdist_wheel": Wheel})
