"""vtc: fewer visual tokens for the vision encoders and multimodal LLMs people already run."""

from vtc import functional, methods, retrieval
from vtc.adapters.report import Report
from vtc.api import compress, list_methods
from vtc.auto import Choice, choose
from vtc.config import load_config, save_config
from vtc.errors import InputError, OptionError, UnsupportedModelError, VTCError
from vtc.frames import FrameShares
from vtc.handle import Handle, remove
from vtc.methods import *  # noqa: F403 - the methods, by its __all__
from vtc.plan import Explanation, explain, list_adapters
from vtc.positions import PPE
from vtc.token_map import TokenMap
from vtc.version import __version__ as __version__

__all__ = [
    "PPE",
    "Choice",
    "Explanation",
    "FrameShares",
    "Handle",
    "InputError",
    "OptionError",
    "Report",
    "TokenMap",
    "UnsupportedModelError",
    "VTCError",
    "choose",
    "compress",
    "explain",
    "functional",
    "list_adapters",
    "list_methods",
    "load_config",
    "remove",
    "retrieval",
    "save_config",
]
__all__ += methods.__all__
