"""The command `vtc`."""

from vtc.cli.command import main

__all__ = ["main"]
