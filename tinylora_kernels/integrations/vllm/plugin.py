"""The entry point of vLLM's plugins, called in each of its processes: what is hooked into, and the probe.

    LoRAModelRunnerMixin   load_lora_model makes our manager; reset_lora_state, after the base was replaced, is refused
    EngineArgs             room in a step for an adapter a sequence, and an error where something is missing
    EngineCore             add_lora, remove_lora, list_loras, pin_lora and each request go through adapters.py
    LLMEngine, AsyncLLM    a request under an adapter that the core was not told of tells it first, and fails alone
    OpenAIServingModels    with a directory in the setting: NAME -> DIRECTORY/NAME.safetensors

Without the setting (settings.py) every hook calls what it stands for, and vLLM's own LoRA is as it was.
"""
from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .settings import KEY, Settings


class Needed(NamedTuple):
    """Something of vLLM that is relied on: an attribute of a class or module, and the parameters it must take."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()


NEEDED = (
    Needed("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.load_lora_model",
           ("self", "model", "vllm_config", "device")),
    Needed("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.reset_lora_state", ("self",)),
    Needed("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin._set_active_loras"),
    Needed("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self",)),
    Needed("vllm.v1.engine.core", "EngineCore.preprocess_add_request", ("self", "request")),
    Needed("vllm.v1.engine.core", "EngineCore.add_request", ("self", "request")),
    Needed("vllm.v1.engine.core", "EngineCore.add_lora", ("self", "lora_request")),
    Needed("vllm.v1.engine.core", "EngineCore.remove_lora", ("self", "lora_id")),
    Needed("vllm.v1.engine.core", "EngineCore.list_loras", ("self",)),
    Needed("vllm.v1.engine.core", "EngineCore.pin_lora", ("self", "lora_id")),
    Needed("vllm.v1.engine.llm_engine", "LLMEngine.add_request", ("self", "lora_request")),
    Needed("vllm.v1.engine.llm_engine", "LLMEngine.add_lora", ("self", "lora_request")),
    Needed("vllm.v1.engine.async_llm", "AsyncLLM.add_request", ("self", "lora_request")),
    Needed("vllm.v1.engine.async_llm", "AsyncLLM.add_lora", ("self", "lora_request")),
    Needed("vllm.lora.request", "LoRARequest", ("lora_name", "lora_int_id", "lora_path", "load_inplace")),
    Needed("vllm.lora.layers", "LoRAMapping", ("index_mapping",)),
    Needed("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.__init__", ("self", "engine_client")),
    Needed("vllm.lora.resolver", "LoRAResolver.resolve_lora", ("self", "base_model_name", "lora_name")),
    Needed("vllm.model_executor.layers.linear", "LinearBase"),
    Needed("vllm.model_executor.layers.linear", "LinearMethodBase.apply", ("self", "layer", "x", "bias")),
    Needed("vllm.model_executor.layers.linear", "ColumnParallelLinear"),
    Needed("vllm.model_executor.utils", "get_packed_modules_mapping"),
    Needed("vllm.distributed", "get_tp_group"),
    Needed("vllm.distributed", "get_pp_group"),
)  # fmt: skip


def missing() -> list[str]:
    """What the installed vLLM lacks of what is relied on, a line each; empty where all is there."""
    problems = []
    for module, name, parameters in NEEDED:
        where = f"{module}.{name}"
        try:
            found: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            problems.append(f"no {where}")
            continue
        if parameters:
            lacking = set(parameters) - set(inspect.signature(found).parameters)
            problems += [f"{where} takes no {', '.join(sorted(lacking))}"] if lacking else []
    return problems


def register() -> None:
    """Entry point vllm.general_plugins; a core and its workers load their plugins when they are half made."""
    from vllm.engine.arg_utils import EngineArgs

    if hasattr(EngineArgs, "tinylora"):
        return
    EngineArgs.tinylora = True
    problems = missing()
    _replace(EngineArgs, "create_engine_config", functools.partial(_configure, problems))
    if problems:
        return
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    for name, ours in {"add_lora": "add", "remove_lora": "remove", "list_loras": "ids", "pin_lora": "pin"}.items():
        _replace(EngineCore, name, functools.partial(_instead, ours))
    _replace(EngineCore, "preprocess_add_request", _bind_request)
    _replace(EngineCore, "add_request", _admit_request)
    _replace(LoRAModelRunnerMixin, "load_lora_model", _load_model)
    _replace(LoRAModelRunnerMixin, "reset_lora_state", _refuse_new_base)
    _replace(LLMEngine, "add_lora", _add_lora)
    _replace(LLMEngine, "add_request", _tell_first)
    _replace(AsyncLLM, "add_lora", _add_lora_async)
    _replace(AsyncLLM, "add_request", _tell_first_async)
    _replace(OpenAIServingModels, "__init__", _serve_directory)


def _replace(owner: type, name: str, hook: Callable[..., Any]) -> None:
    """owner.name(...) becomes hook(what it was, ...), under the signature that vLLM looks at."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(owner, name, replaced)


# The configuration


def _configure(problems: list[str], original: Any, arguments: Any, *args: Any, **kwargs: Any) -> Any:
    config = original(arguments, *args, **kwargs)
    settings = Settings.of(config.additional_config)
    if settings is None:
        return config
    if problems:
        import vllm

        raise RuntimeError(
            f"tinylora: vLLM {vllm.__version__} is not one this package knows ({'; '.join(problems)}); docs/vllm.md "
            "lists those tried"
        )
    lora = config.lora_config
    if lora is None:
        raise ValueError("tinylora: expected --enable-lora beside additional_config['tinylora'], found it off")
    lora.max_loras = config.scheduler_config.max_num_seqs  # they are rows of a table
    lora.max_cpu_loras = max(lora.max_cpu_loras or 0, lora.max_loras)
    from .family import Family

    # Core and workers read the file again, each in its process: it must be the same one.
    token = Family(settings.adapters, settings.own_seeds).token
    config.additional_config[KEY] = dataclasses.asdict(dataclasses.replace(settings, token=token))
    return config


# The engine core


def _adapters(core: Any) -> Any:
    """The Adapters of a core, made when they are first asked for; None where adapters are vLLM's own."""
    if "tinylora" not in core.__dict__:
        core.tinylora = _make_adapters(core)
    return core.tinylora


def _make_adapters(core: Any) -> Any:
    settings = Settings.of(core.vllm_config.additional_config)
    if settings is None:
        return None
    from vllm.lora.request import LoRARequest

    from .adapters import Adapters
    from .family import Family

    def running() -> list[int]:
        requests = list(core.scheduler.requests.values())
        return [request.lora_request.lora_int_id for request in requests if request.lora_request is not None]

    family, workers = Family(settings.adapters, settings.own_seeds, settings.token), core.model_executor
    return Adapters(family, LoRARequest, workers.add_lora, workers.remove_lora, running, _not_found)


def _not_found(name: str, path: str) -> Exception:
    try:
        from vllm.exceptions import LoRAAdapterNotFoundError
    except ImportError:
        return FileNotFoundError(f"adapter {name!r}: there is no such file")
    return LoRAAdapterNotFoundError(name, path)


def _instead(ours: str, original: Any, core: Any, *args: Any) -> Any:
    adapters = _adapters(core)
    return original(core, *args) if adapters is None else getattr(adapters, ours)(*args)


def _bind_request(original: Any, core: Any, request: Any) -> Any:
    adapters = _adapters(core)
    bound = None if adapters is None else adapters.bind(request.lora_request)
    if bound is not None:
        request.lora_request = bound[0]
    made, wave = original(core, request)
    made.tinylora_content = None if bound is None else bound[1]
    return made, wave


def _admit_request(original: Any, core: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    content = getattr(request, "tinylora_content", None)
    if content is not None:
        core.tinylora.ensure(content)
    return original(core, request, *args, **kwargs)


# The workers


def _load_model(original: Any, runner: Any, model: Any, vllm_config: Any, device: Any) -> Any:
    settings = Settings.of(vllm_config.additional_config)
    if settings is None:
        return original(runner, model, vllm_config, device)
    from .layers import attach
    from .manager import Manager

    scheduler = vllm_config.scheduler_config
    manager = Manager(settings, scheduler.max_num_batched_tokens, scheduler.max_num_seqs, device)
    attach(model, vllm_config.model_config, manager)
    runner.lora_manager = model.lora_manager = manager
    return model


def _refuse_new_base(original: Any, runner: Any) -> Any:
    if Settings.of(runner.vllm_config.additional_config) is None:
        return original(runner)
    raise RuntimeError(
        "tinylora: the weights of the base model were replaced, and every adapter belongs to the ones before; start "
        "the engine again on the new weights"
    )


# The front end
#
# A request is in its books before the core has seen it: one that is refused there would be waited for for ever.

TOLD_KEPT = 1 << 16


def _told(engine: Any) -> set[tuple[int, str]] | None:
    """(id, path) of the adapters that the core knows from this front end; None where adapters are vLLM's own."""
    told = engine.__dict__.get("tinylora_told")
    if told is None and Settings.of(engine.vllm_config.additional_config) is not None:
        told = engine.tinylora_told = set()
    if told is not None and len(told) > TOLD_KEPT:
        told.clear()
    return told


def _note(engine: Any, request: Any) -> None:
    told = _told(engine)
    if told is not None:
        told.add((request.lora_int_id, request.lora_path))


def _untold(original: Any, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The LoRARequest of a call of add_request that the core has to be told of, or None."""
    told = _told(engine)
    if told is None:
        return None
    lora = kwargs.get("lora_request")
    if lora is None and len(args) > 3:
        lora = _signature(original).bind(engine, *args, **kwargs).arguments.get("lora_request")
    return None if lora is None or (lora.lora_int_id, lora.lora_path) in told else lora


_signature = functools.cache(inspect.signature)


def _add_lora(original: Any, engine: Any, lora_request: Any) -> Any:
    done = original(engine, lora_request)
    _note(engine, lora_request)
    return done


async def _add_lora_async(original: Any, engine: Any, lora_request: Any) -> Any:
    done = await original(engine, lora_request)
    _note(engine, lora_request)
    return done


def _tell_first(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    untold = _untold(original, engine, args, kwargs)
    if untold is not None:
        engine.add_lora(untold)
    return original(engine, *args, **kwargs)


async def _tell_first_async(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    untold = _untold(original, engine, args, kwargs)
    if untold is not None:
        await engine.add_lora(untold)
    return await original(engine, *args, **kwargs)


def _serve_directory(original: Any, models: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
    original(models, engine_client, *args, **kwargs)
    settings = Settings.of(engine_client.vllm_config.additional_config)
    if settings is not None and Path(settings.adapters).is_dir():
        models.lora_resolvers.append(_resolver(Path(settings.adapters)))


def _resolver(directory: Path) -> Any:
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class DirectoryResolver(LoRAResolver):
        """NAME -> DIRECTORY/NAME.safetensors."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            if Path(lora_name).name != lora_name:
                return None
            path = directory / f"{lora_name}.safetensors"
            return LoRARequest(lora_name, 1, str(path)) if path.is_file() else None

    return DirectoryResolver()
