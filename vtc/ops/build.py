"""Builds the kernels: when vtc is installed and torch is available (setup.py), otherwise at their first use, into the
user's cache.

Only the standard library is imported at the top: setup.py runs this file without torch and vtc.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

_logger = logging.getLogger(__name__)
KINDS = {"cpp": "C++", "cuda": "CUDA"}
# The sources of each kind, the file to compile first.
SOURCES = {"cpp": ("cpu.cpp", "cpu/*.h"), "cuda": ("cuda.cu", "cuda/*.cuh")}
# Where the sources are in a wheel, and in a checkout.
PLACES = (Path(__file__).parent / "csrc", Path(__file__).parents[2] / "csrc")
AHEAD = "python -m vtc.ops build"
# The macro selects torch's stable ABI: one library works with 2.11 and newer.
_BOTH = "-O3 -std=c++17 -shared -DTORCH_TARGET_VERSION=0x020a000000000000"
_TARGETS = "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=[sm_90,compute_90]"
FLAGS = {
    "cpp": f"{_BOTH} -fPIC -ffp-contract=fast -Wno-psabi".split(),
    "cuda": f"{_BOTH} -Xcompiler -fPIC -cudart static -diag-suppress 20012 {_TARGETS}".split(),
}


class BuildError(RuntimeError):
    """Why there are no kernels, in a sentence.

    Attributes:
        output: what the compiler printed.
    """

    def __init__(self, sentence: str, output: str = "") -> None:
        super().__init__(sentence)
        self.output = output


def compile(kind: str, target: Path, source: Path | None = None) -> None:
    """Call the compiler directly: torch's own builders need ninja and Python's headers, and cannot build CUDA with a
    CPU build of torch. source: a file other than vtc's own."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        raise BuildError("torch is not here, whose headers the kernels need")
    home = Path(torch.origin).parent
    command = [
        *compiler(kind),
        *FLAGS[kind],
        f"-I{home / 'include'}",
        str(source or sources(kind)[0]),
        "-o",
        str(target),
    ]
    command += [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    null, pipe, both = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    try:
        ran = subprocess.run(command, stdin=null, stdout=pipe, stderr=both, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} does not start ({error})") from error
    if ran.returncode:
        lines = [line.strip() for line in ran.stdout.splitlines()]
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "without a word")
        raise BuildError(f"{command[0]} ended with {ran.returncode}: {said}", f"{shlex.join(command)}\n{ran.stdout}")


def compiler(kind: str) -> list[str]:
    """The compiler's command: the one in CXX, else g++ or clang++; for CUDA nvcc, from CUDA_HOME or PATH.

    Raises:
        BuildError: there is none.
    """
    if kind == "cuda":
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        names = [os.path.join(home, "bin", "nvcc")] if home else []
        names.append("nvcc")
    else:
        names = [os.environ["CXX"]] if os.environ.get("CXX", "").strip() else ["g++", "clang++"]
    for name in names:
        words = name.split() if name == os.environ.get("CXX") else [name]
        if found := shutil.which(words[0]):
            return [found, *words[1:]]
    raise BuildError(f"no {KINDS[kind]} compiler is here ({' or '.join(names)})")


def sources(kind: str) -> list[Path]:
    """The source files of the kernels, the one to compile first.

    Raises:
        BuildError: they are not available.
    """
    for place in PLACES:
        if (place / SOURCES[kind][0]).is_file():
            return [path for pattern in SOURCES[kind] for path in sorted(place.glob(pattern))]
    raise BuildError(f"their sources are neither in {' nor in '.join(map(str, PLACES))}; install vtc-torch anew")


def cached(kind: str) -> Path | None:
    """The library built earlier in the user's cache, for these sources, this torch, this machine and this compiler (or
    for any, if no compiler is left).

    Raises:
        BuildError: others may write to the folder or the library.
    """
    folder, found = cache_folder(), None
    try:
        found = folder / f"{_name(kind)}.so"
    except BuildError:  # no compiler
        built = sorted(folder.glob(f"{kind}-{_key(kind)}-*.so"), key=lambda path: path.stat().st_mtime)
        found = built[-1] if built else None
    if found is None or not found.exists():
        return None
    for path in (folder.parent, folder, found):
        _private(path)
    return found


def library(kind: str, *, again: bool = False) -> Path:
    """The kernels in the user's cache. If several processes need them, one builds and the others wait.

    Args:
        again: build again, even if that failed before.

    Raises:
        BuildError: they cannot be built, or the last build failed.
    """
    from filelock import FileLock, Timeout

    name, folder = _name(kind), cache_folder()
    path, note = folder / f"{name}.so", folder / f"{name}.failed"
    try:
        for part in (folder.parent, folder):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
            _private(part)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _logger.warning("vtc: waiting for another process, which builds the %s kernels", KINDS[kind])
            lock.acquire()
        try:
            if path.exists():
                _private(path)
                return path
            if note.exists() and not again:
                sentence, _, output = note.read_text().partition("\n")
                raise BuildError(sentence, output)
            _build(kind, path, note)
        finally:
            lock.release()
    except OSError as error:
        raise BuildError(f"{folder} cannot hold them ({error}); XDG_CACHE_HOME names another place") from error
    return path


def discard(path: Path, error: Exception) -> BuildError:
    """Remove a library that does not load from the cache, and record why."""
    reason = f"what was built does not load ({' '.join(str(error).split())})"
    try:
        path.unlink(missing_ok=True)
        path.with_suffix(".failed").write_text(f"{reason}\n")
    except OSError as kept:
        _logger.info("%s stays in the cache (%s)", path, kept)
    return BuildError(reason)


def cache_folder() -> Path:
    """The folder in XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vtc" / "kernels"
    except RuntimeError as error:
        raise BuildError(f"there is no home to keep them in ({error}); XDG_CACHE_HOME names a place") from error


def _build(kind: str, path: Path, note: Path) -> None:
    import torch

    _logger.warning(
        "vtc: building the %s kernels for torch %s into %s, once, in about %s (ahead of use: %s; never: VTC_NO_EXT=1)",
        *(KINDS[kind], torch.__version__, path.parent, {"cpp": "20 s", "cuda": "a minute"}[kind], AHEAD),
    )
    with TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch, path.name)
        try:
            compile(kind, built)
        except BuildError as error:
            note.write_text(f"{error}\n{error.output}")
            raise
        built.replace(path)
    note.unlink(missing_ok=True)


def _name(kind: str) -> str:
    """The library's name in the cache. The compiler is identified by its file and options, as in ccache: asking for its
    version would start it at every import."""
    command = compiler(kind)
    about = os.stat(command[0])
    identity = f"{os.path.realpath(command[0])} {command[1:]} {about.st_size} {about.st_mtime_ns}"
    return f"{kind}-{_key(kind)}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _key(kind: str) -> str:
    """A hash of everything but the compiler: sources, flags, torch and its ABI, and the machine, since machines may
    share a home."""
    import torch

    digest = hashlib.sha256()
    for path in sources(kind):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", ()) else ""
    about = (torch.__version__, torch.compiled_with_cxx11_abi(), platform.system(), platform.machine(), libc)
    digest.update(repr((FLAGS[kind], about)).encode())
    return digest.hexdigest()[:16]


def _private(path: Path) -> None:
    """Raise unless only this user can write to `path`: a library is executable code."""
    about = path.lstat()
    mode = stat.filemode(about.st_mode)
    if hasattr(os, "geteuid") and (about.st_uid != os.geteuid() or mode[0] == "l" or about.st_mode & 0o022):
        raise BuildError(
            f"others may write {path} (of user {about.st_uid}, {mode}), and kernels are code: chown it and chmod go-w, "
            "or let XDG_CACHE_HOME name another place"
        )
