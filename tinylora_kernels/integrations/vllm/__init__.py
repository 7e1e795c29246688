"""Adapters of a few numbers inside vLLM: served as they are, changed at the cost of their numbers. See docs/vllm.md.

    directories.py   vLLM's rules for the LoRA directories of export_lora, checked without vLLM
    settings.py      the one documented setting, --additional-config '{"tinylora": ...}'
    plugin.py        the entry point of vLLM's plugins: what is hooked into, and the probe that says what is missing
    family.py        which adapters fit an engine, and the frozen factors of its modules
    adapters.py      in the engine core: names, contents and their ids
    manager.py       in each worker: the table of adapters and the ids of a step's tokens
    layers.py        in each worker: the update on the output of vLLM's linear layers
    requests.py      for loops of one's own: an adapter as a request, from numbers
    rollouts.py      TRL's trainers: rollouts of the live adapter, without a weight sync
    verl.py          verl's rollout servers, likewise; not run

Nothing here imports vLLM but the modules that run inside it.
"""
from .directories import vllm_problems
from .plugin import register
from .requests import numbers_path, set_default, set_vectors

__all__ = ["numbers_path", "register", "set_default", "set_vectors", "vllm_problems"]
