"""`python -m vtc.ops build`: build the kernels before their first use, also if a build failed before."""

from __future__ import annotations

import argparse
import logging
import os
import sys

import torch

from vtc.ops import build, kernels


def main(words: list[str] | None = None) -> int:
    """Build what this machine can: C++, and CUDA if there are nvcc and a torch with CUDA. Returns 1 if something fails
    to build."""
    parser = argparse.ArgumentParser(prog="python -m vtc.ops", description="Build the kernels of vtc ahead of use.")
    parser.add_argument("command", choices=["build"])
    parser.parse_args(words)
    logging.basicConfig(format="%(message)s")
    return max(_build(kind) for kind in ("cpp", "cuda") if kind == "cpp" or torch.version.cuda is not None)


def _build(kind: str) -> int:
    loads = kernels._loaded.get(kind, False)
    try:
        if os.environ.get("VTC_NO_EXT"):
            raise build.BuildError("VTC_NO_EXT is set")
        path = (kernels.packed(kind) if loads else None) or build.library(kind, again=True)
        if not loads:
            torch.ops.load_library(path)
    except (build.BuildError, OSError) as error:
        if output := getattr(error, "output", ""):
            sys.stderr.write(f"{output}\n")
        sys.stderr.write(f"the {build.KINDS[kind]} kernels are not built: {error}\n")
        return 1
    sys.stdout.write(f"the {build.KINDS[kind]} kernels are in {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
