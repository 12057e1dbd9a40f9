"""vtc: fewer visual tokens for the vision encoders and multimodal LLMs people already run."""

from vtc import functional
from vtc.adapters.report import Report
from vtc.api import compress, list_methods
from vtc.auto import Choice, choose
from vtc.config import load_config, save_config
from vtc.errors import InputError, OptionError, UnsupportedModelError, VTCError
from vtc.handle import Handle, remove
from vtc.methods import (
    DART,
    DPCKNN,
    SCOPE,
    CDPruner,
    DivPrune,
    Downsample,
    FastV,
    HiPrune,
    IDPruner,
    Norm,
    PiToMe,
    Random,
    ToMe,
    VisionZip,
    VisPruner,
    ZOOPrune,
)
from vtc.plan import Explanation, explain, list_adapters
from vtc.positions import PPE
from vtc.token_map import TokenMap
from vtc.version import __version__ as __version__

__all__ = [
    "DART",
    "DPCKNN",
    "PPE",
    "SCOPE",
    "CDPruner",
    "Choice",
    "DivPrune",
    "Downsample",
    "Explanation",
    "FastV",
    "Handle",
    "HiPrune",
    "IDPruner",
    "InputError",
    "Norm",
    "OptionError",
    "PiToMe",
    "Random",
    "Report",
    "ToMe",
    "TokenMap",
    "UnsupportedModelError",
    "VTCError",
    "VisPruner",
    "VisionZip",
    "ZOOPrune",
    "choose",
    "compress",
    "explain",
    "functional",
    "list_adapters",
    "list_methods",
    "load_config",
    "remove",
    "save_config",
]
