"""A whole model: the training step and generation with SmolLM2-135M's architecture, 210 adapted modules.

The weights are synthetic with planted singular triplets, as in contenders.py: time does not depend on their values, and
nobody has to wait for PEFT's full SVDs. Every contender shares the same weights. The unit of the ratios is the same
step with everything frozen but one scalar at the embedding output, so that its backward runs through the whole model
too; in generation it is the bare model.
"""
from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinylora_kernels.factors.svd import Factors
from tinylora_kernels.method.config import TinyLoRAConfig
from tinylora_kernels.method.philox import philox_projection
from tinylora_kernels.model.attach import apply_tiny_lora
from tinylora_kernels.model.targets import target_names

from . import environment, table
from .contenders import planted_weight
from .gate import WrongResult
from .layers import ENVIRONMENT, QUANTILES
from .memory import saved_by
from .shapes import RANK, Shape
from .timing import freed_memory_kept, interleave

FILE = "model.csv"
COLUMNS = [
    "workload", "modules", "dtype", "contender", "phase", "rounds", *QUANTILES, "loss", "dv_error", "saved_bytes",
    "adapter_bytes_per_token_and_module", *ENVIRONMENT,
]  # fmt: skip
BATCH, LENGTH = 4, 128
NUMBERS = 13  # one v of 13 numbers shared by all modules
PROMPT, GENERATED = 32, 8
GENERATION_BATCHES = (1, 16)
FROZEN, OURS, PEFT, PEFT_NO_CAST = "frozen", "ours", "peft", "peft no cast"
DV_TOLERANCE = 1e-2  # ours against PEFT in fp32, through thirty blocks of random weights


class ScaledEmbedding(nn.Module):
    """The embedding times one trained scalar."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding
        self.scale = nn.Parameter(torch.ones((), dtype=embedding.weight.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) * self.scale


def smollm2(dtype: torch.dtype, blocks: int = 30) -> nn.Module:
    """SmolLM2-135M's architecture: 30 blocks of 576, 9 heads, 3 of keys and values, 49152 tokens, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=blocks, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, rope_theta=100000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    for name in target_names(model, None):
        linear = model.get_submodule(name)
        linear.weight.data.copy_(_planted(linear)[0])
    return model.requires_grad_(False)


def _planted(linear: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _planted_of(*linear.weight.shape)


@functools.lru_cache(maxsize=4)  # the model has four shapes
def _planted_of(out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return planted_weight(Shape("SmolLM2-135M", "any", out_features, in_features, False))


def with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def adapt_with_ours(model: nn.Module, v: Tensor) -> list[nn.Parameter]:
    config = TinyLoRAConfig(frozen_rank=RANK, trainable_dim=NUMBERS, n_tie=10**6, scaling="sqrt", cache=False)
    factors = {}
    for name in target_names(model, None):
        _, left, sigma, _ = _planted(model.get_submodule(name))
        factors[name] = Factors(left.T.contiguous(), sigma, degenerate=False, residual=1e-2)  # in 16 bits
    apply_tiny_lora(model, config, progress=False, factors=factors)
    return _start([p for p in model.parameters() if p.requires_grad], v)


def adapt_with_peft(model: nn.Module, v: Tensor, *, cast: bool) -> list[nn.Parameter]:
    """PEFT's layers in the same model, with the same P; the planted triplets stand in for its SVDs."""
    from peft import TinyLoraConfig, get_peft_model

    names = target_names(model, None)
    triplets = (_planted(model.get_submodule(name)) for name in names)
    config = TinyLoraConfig(r=RANK, u=NUMBERS, weight_tying=1.0, target_modules=names)
    with warnings.catch_warnings(), mock.patch("torch.linalg.svd", side_effect=lambda *_, **__: _svd(next(triplets))):
        warnings.simplefilter("ignore")
        get_peft_model(model, config, autocast_adapter_dtype=cast)
    for index, name in enumerate(names):
        model.get_submodule(name).tinylora_P["default"].copy_(philox_projection(0, index, NUMBERS, RANK))
    return _start(list(model.get_submodule(names[0]).tinylora_v["default"].values()), v)


def _svd(planted: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    _, left, sigma, right = planted
    return left, sigma, right.T


def _start(parameters: list[nn.Parameter], v: Tensor) -> list[nn.Parameter]:
    assert len(parameters) == 1, "one v shared by all modules"
    parameters[0].data.copy_(v)
    return parameters


class Variant:
    """A model and what is trained in it."""

    def __init__(self, name: str, base: nn.Module, v: Tensor):
        self.name = name
        self.model = with_shared_weights(base)
        if name == FROZEN:
            self.trained: list[nn.Parameter] = []
        elif name == OURS:
            self.trained = adapt_with_ours(self.model, v)
        else:
            self.trained = adapt_with_peft(self.model, v, cast=name == PEFT)
        self.model.model.embed_tokens = ScaledEmbedding(self.model.model.embed_tokens)
        self.scale = self.model.model.embed_tokens.scale
        if name == FROZEN:
            self.trained = [self.scale]
        else:
            self.scale.requires_grad_(False)


def training_step(variant: Variant, tokens: Tensor) -> Callable[[], dict[str, float]]:
    """Forward with the loss, backward, AdamW."""
    model, clock = variant.model.train(), time.perf_counter
    optimizer = torch.optim.AdamW(variant.trained, lr=1e-6)

    def step() -> dict[str, float]:
        begun = clock()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        forwarded = clock()
        loss.backward()
        returned = clock()
        optimizer.step()
        optimizer.zero_grad()
        ended = clock()
        return {
            "forward": forwarded - begun, "backward": returned - forwarded, "optimizer": ended - returned,
            "step": ended - begun,
        }  # fmt: skip

    return step


def generation(variant: Variant, batch: int) -> Callable[[], dict[str, float]]:
    """Greedy decoding after a prompt; the time of one token."""
    from transformers import DynamicCache

    model, clock = variant.model.eval(), time.perf_counter
    prompt = torch.randint(0, 49152, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    first = logits[:, -1:].argmax(-1)

    def step() -> dict[str, float]:
        if cache.get_seq_length() > PROMPT:
            cache.crop(PROMPT - cache.get_seq_length())  # negative: how many to drop
        token = first
        with torch.no_grad():
            begun = clock()
            for _ in range(GENERATED):
                token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            return {"token": (clock() - begun) / GENERATED}

    return step


def check(variants: list[Variant], tokens: Tensor, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Loss of each variant, and the distance of its dv from PEFT's; in fp32 ours must be PEFT's function."""
    losses, gradients = {}, {}
    for variant in variants:
        loss = variant.model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss
        gradients[variant.name] = torch.autograd.grad(loss, variant.trained)[0].double()
        losses[variant.name] = loss.item()
    exact = gradients.get(PEFT)
    result = {}
    for name, gradient in gradients.items():
        comparable = exact is not None and name != FROZEN
        result[name] = (losses[name], float((gradient - exact).norm() / exact.norm()) if comparable else float("nan"))
    if dtype is torch.float32 and exact is not None and not result[OURS][1] <= DV_TOLERANCE:
        found = result[OURS][1]
        raise WrongResult(f"whole model: dv differs from PEFT's by {found:.2g}, expected {DV_TOLERANCE} at most")
    return result


def saved_bytes(variant: Variant, tokens: Tensor) -> int:
    """Bytes kept for backward when gradients flow to the very bottom of the model."""
    requires_grad = variant.scale.requires_grad
    variant.scale.requires_grad_(True)
    try:
        model = variant.model.train()
        return saved_by(lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss, model)
    finally:
        variant.scale.requires_grad_(requires_grad)


def make_variants(dtype: torch.dtype, blocks: int = 30) -> list[Variant]:
    base = smollm2(dtype, blocks)
    v = 0.02 * torch.randn(NUMBERS, generator=torch.Generator().manual_seed(2))
    names = [FROZEN, OURS, PEFT] + ([PEFT_NO_CAST] if dtype is not torch.float32 else [])
    return [Variant(name, base, v) for name in names]


def make_tokens() -> Tensor:
    return torch.randint(0, 49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def run(out: Path, *, dtypes: Sequence[torch.dtype], quick: bool = False, seconds: float = 40.0) -> None:
    """Measure each dtype (quick: the first, six blocks, a few rounds) and add the rows to model.csv."""
    facts = environment.describe()
    done = {(row["dtype"], row["threads"], row["code"]) for row in table.read(out / FILE)}
    seconds = 2.0 if quick else seconds
    bar = tqdm(dtypes[:1] if quick else dtypes, unit="dtype", dynamic_ncols=True)
    for dtype in bar:
        dtype_name = str(dtype).removeprefix("torch.")
        if (dtype_name, facts["threads"], facts["code"]) in done:
            continue
        bar.set_description(f"whole model, {dtype_name}")
        variants, tokens = make_variants(dtype, blocks=6 if quick else 30), make_tokens()
        rows = []
        checked = check(variants, tokens, dtype)
        saved = {variant.name: saved_bytes(variant, tokens) for variant in variants}
        modules = len(target_names_of(variants))
        steps = {variant.name: training_step(variant, tokens) for variant in variants}
        with freed_memory_kept():
            timed = interleave(steps, FROZEN, seconds=seconds, least=2 if quick else 7, most=30, longest=2 * seconds)
        for name, phases in timed.items():
            per_token = (saved[name] - saved[FROZEN]) / (tokens.numel() * modules)
            facts_of = {
                "loss": checked[name][0], "dv_error": checked[name][1], "saved_bytes": saved[name],
                "adapter_bytes_per_token_and_module": per_token,
            }  # fmt: skip
            rows += [_row("training step", name, phase, s) | facts_of for phase, s in phases.items()]
        for batch in GENERATION_BATCHES[:1] if quick else GENERATION_BATCHES:
            steps = {variant.name: generation(variant, batch) for variant in variants}
            timed = interleave(steps, FROZEN, seconds=seconds / 2, least=2 if quick else 7, most=30, longest=seconds)
            for name, phases in timed.items():
                rows += [_row(f"generation, batch {batch}", name, phase, s) for phase, s in phases.items()]
        table.append(out / FILE, COLUMNS, [row | {"dtype": dtype_name, "modules": modules} | facts for row in rows])


def target_names_of(variants: list[Variant]) -> list[str]:
    """The adapted modules, read off the frozen variant, which still has its linear layers."""
    return target_names(variants[0].model, None)


def _row(workload: str, contender: str, phase: str, s) -> dict:
    quantiles = dict(zip(QUANTILES, (s.p20, s.p50, s.p80, s.ratio_p20, s.ratio_p50, s.ratio_p80), strict=True))
    return {"workload": workload, "contender": contender, "phase": phase, "rounds": s.rounds} | quantiles
