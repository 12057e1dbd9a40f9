"""AddressSanitizer and UndefinedBehaviorSanitizer in a library that Python loads."""

from __future__ import annotations

import os
import subprocess
from functools import cache

FLAGS = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@cache
def there() -> bool:
    """Whether g++ has them here."""
    empty = {"input": "", "text": True, "capture_output": True}
    try:
        return not subprocess.run(["g++", "-shared", *FLAGS, "-x", "c++", "-", "-o", os.devnull], **empty).returncode
    except FileNotFoundError:
        return False


def environment(**more: str) -> dict[str, str]:
    """In which a Python runs that loads such a library."""
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    preloaded = {"LD_PRELOAD": " ".join(map(str.strip, found)), "PYTHONMALLOC": "malloc"}
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **preloaded, **options, **more}
