"""A model for timm's registry that is compressed from the start, so that timm's own scripts take it.

    timm.create_model("vtc", vtc_model="deit_small_patch16_224", vtc_method="pitome", vtc_keep=0.9, pretrained=True)

after `import vtc.harness.timm`. Options that begin with `vtc_` go to vtc, the rest to the model itself. timm's scripts
import no plugins, so run them through this module:

    python -m vtc.harness.timm validate.py DATA --model vtc \\
        --model-kwargs vtc_model=deit_small_patch16_224 vtc_method=pitome vtc_keep=0.9
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from vtc.errors import OptionError
from vtc.handle import install
from vtc.methods import make

__all__ = ["vtc"]


@register_model
def vtc(pretrained: bool = False, **options: Any) -> nn.Module:
    """Any model of timm (`vtc_model`), with a method in it (`vtc_method`) and its options (`vtc_keep`, ...).

    Raises:
        OptionError: no `vtc_model`, no or an unknown method, an option out of range.
        UnsupportedModelError: a model that cannot be reduced.
    """
    own = {key.removeprefix("vtc_"): options.pop(key) for key in list(options) if key.startswith("vtc_")}
    name = own.pop("model", None)
    if not isinstance(name, str):
        raise OptionError(f'vtc_model={name!r}: name the model of timm, such as vtc_model="deit_small_patch16_224"')
    method = make(own.pop("method", None), **own)  # checked before the weights are loaded, which takes long
    model = timm.create_model(name, pretrained, **options)
    install(model, method)
    return model


def main() -> int:
    """Run one of timm's scripts, with "vtc" registered as a model."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.stderr.write(
            "usage: python -m vtc.harness.timm SCRIPT ..., where SCRIPT is timm's validate.py or another\n"
        )
        return 2
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
