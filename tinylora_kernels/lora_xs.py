"""LoRA-XS on the same layer and the same two ops: R itself is trained, r * r numbers for each module or tie group.

Source: Balazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604:
W' = W + A R B with A = U S and B = V^T of the truncated SVD frozen.  On the output side that is M = S R S^-1, so the
"projection" is the matrix of ratios s_j / s_k, multiplied elementwise with v viewed as R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import check_common_fields, check_positive_int
from .factors import Factors
from .model import attach, lookup_projection, scaled_projection, target_names
from .projection import STREAM_VECTOR, philox_normal
from .tying import assign_groups

INITS = ("zeros", "normal")
NORMAL_DEVIATION = 1e-5  # the paper's sigma for R (section 3)


@dataclass
class LoRAXSConfig:
    """Hyperparameters of LoRA-XS.

    Attributes:
        rank: r; r * r numbers are trained in each tie group.
        n_tie: modules that share one R; the paper shares none.
        target_modules: names to adapt, as in TinyLoRAConfig.
        tying: "tiled", "structured" or {module name: group}, as in TinyLoRAConfig.
        alpha: scale of the update.
        scaling: "left", R acts between S and V^T (the paper); "sqrt", S is split evenly on both sides of R.
        seed: key of the random initial R.
        init: "zeros" starts at the base model; "normal" draws R from N(0, 1e-5 squared), as the paper does.
        v_dtype: storage of R; arithmetic is float32 whatever it is.
        backend: "cuda", "triton", "cpu", "reference" or None (automatic).
        cache: keep truncated SVDs on disk, keyed by the weight's content.
    """

    rank: int = 4
    n_tie: int = 1
    target_modules: Sequence[str] | str | None = None
    tying: str | Mapping[str, object] = "tiled"
    alpha: float = 1.0
    scaling: str = "left"
    seed: int = 0
    init: str = "zeros"
    v_dtype: torch.dtype = torch.float32
    backend: str | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_common_fields(self, INITS)


def apply_lora_xs(
    model: nn.Module,
    config: LoRAXSConfig,
    *,
    progress: bool = True,
    factors: Mapping[str, Factors] | None = None,
) -> nn.Module:
    """Adapt a model in place with LoRA-XS and freeze everything but the matrices R.

    Args:
        model: any nn.Module; its linear layers, convolutions, embeddings and experts may be adapted (docs/layers.md).
        config: see LoRAXSConfig; modules are taken in named_modules order.
        progress: show a bar while the weights are factorised.
        factors: the truncated SVD of every module, by name, where it is known already; nothing is factorised then.

    Returns:
        The same model.  Each layer's ``v`` [r * r] is R flattened by rows.

    Raises:
        ValueError: as apply_tiny_lora; the model is left as it was.
    """
    names = target_names(model, config.target_modules)
    groups = assign_groups(names, config.n_tie, config.tying)
    return attach(
        model, config, names, groups, config.rank,
        lambda index, sigma, lookup: ratio_projection(config, sigma, lookup),
        lambda group: initial_vector(config, group), progress=progress, factors=factors,
    )  # fmt: skip


def ratio_projection(config: LoRAXSConfig, sigma: Tensor, lookup: bool = False) -> Tensor:
    """P' [r, r]: M = P' * R elementwise equals alpha S R S^-1 ("left"), alpha sqrt(S) R sqrt(S)^-1 ("sqrt").

    For an embedding (lookup) M = alpha R^T or alpha sqrt(S) R^T sqrt(S)^-1, and v holds R^T: an elementwise product
    cannot transpose, and no function is lost.
    """
    ones = torch.ones(config.rank, config.rank)
    make = lookup_projection if lookup else scaled_projection
    return make(ones, sigma, config.alpha, config.scaling)


def initial_vector(config: LoRAXSConfig, group: int) -> Tensor:
    """R of one tie group before training, flattened to [r * r]."""
    if config.init == "zeros":
        return torch.zeros(config.rank**2)
    drawn = philox_normal(config.seed, group, 1, config.rank**2, STREAM_VECTOR)[0]  # N(0, 1)
    return NORMAL_DEVIATION * drawn
