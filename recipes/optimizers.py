"""The optimizers that a recipe may name, and what each lets one set.

Every class is one algorithm; `shoestring.optimizers.build_optimizer` turns it into the optimizer. Options
have the names of the published packages. What ours share stands in `_Written`, `_Own` and `_Elementwise`.
"""

from typing import Annotated, Literal

from pydantic import Field

from .section import Auto, Section

_Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[_Beta, _Beta], Field(strict=False)]
AveragedBetas = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], _Beta], Field(strict=False)]
ThreeBetas = Annotated[tuple[_Beta, _Beta, _Beta], Field(strict=False)]
_BETAS = "Decay of the running means of the gradient and of its square."
_EPS = "Added to the root of the second moment."
_GAP = "Steps between two projections."


class _Optimizer(Section):
    """What all optimizers share."""

    learning_rate: Auto[float] = Field(
        default=None,
        gt=0,
        description="Peak rate; auto follows from the optimizer, what is trained and the budget.",
    )
    weight_decay: Auto[float] = Field(
        default=None,
        ge=0,
        description="Decoupled weight decay; not on biases and norms. auto is 0 where each row is seen a few "
        "times, and more the more often rows repeat (docs/spending.md).",
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Clip the norm of the gradient; null does not clip."
    )


class _Written(_Optimizer):
    """How every optimizer of our own writes weights."""

    weights: Literal["sr", "kahan", "master", "plain"] = Field(
        default="sr",
        description="How bfloat16 weights take an update smaller than their last digit: stochastic rounding "
        "(no memory), Kahan's compensation (2 bytes a weight), a float32 master (4 bytes), or not at all. "
        "Float32 weights need none.",
    )
    step_in_backward: bool = Field(
        default=False,
        description="Update each weight as soon as its gradient is known and free the gradient: the memory "
        "of the largest one in place of all. Without accumulation only; more micro-batches hold gradients "
        "until the last.",
    )
    clipping: Literal["exact", "previous"] = Field(
        default="previous",
        description="How step_in_backward keeps to max_grad_norm. `previous` scales by the norm of the step "
        "before, at no cost; `exact` first runs a backward pass that only measures: the time of a second "
        "forward and backward.",
    )


class _Own(_Written):
    """What our optimizers for matrices understand."""

    state_bits: Literal[32, 16, 8] = Field(
        default=32,
        description="Bits of an element of state. 8 is blockwise: a scale for each 256 elements; tensors "
        "below 4,096 elements stay at 32.",
    )


class _Elementwise(_Written):
    """Rules that go element by element, whose state may have 4 bits too."""

    state_bits: Literal[32, 16, 8, 4] = Field(
        default=32,
        description="Bits of an element of state. 8 and 4 are blockwise: a scale for each 256 or 128 "
        "elements; tensors below 4,096 elements stay at 32. 4 is for adamw and lion alone.",
    )


class AdamW(_Elementwise):
    """AdamW (arXiv:1711.05101): PyTorch's fused one unless an option asks for more."""

    name: Literal["adamw"] = Field(
        default="adamw", description="AdamW; PyTorch's fused one unless an option below asks for more."
    )
    betas: Betas = Field(default=(0.9, 0.999), description=_BETAS)
    eps: float = Field(default=1e-8, gt=0, description=_EPS)


class AdamW8bit(_Optimizer):
    """AdamW with 8-bit states through bitsandbytes (arXiv:2110.02861)."""

    name: Literal["adamw_8bit"] = Field(
        default="adamw_8bit", description="AdamW with 8-bit states, through bitsandbytes."
    )
    betas: Betas = Field(default=(0.9, 0.999), description=_BETAS)
    eps: float = Field(default=1e-8, gt=0, description=_EPS)


class PagedAdamW8bit(_Optimizer):
    """AdamW with 8-bit states in memory that moves to the host under pressure, through bitsandbytes."""

    name: Literal["paged_adamw_8bit"] = Field(
        default="paged_adamw_8bit",
        description="As adamw_8bit, with states that move to host memory under pressure.",
    )
    betas: Betas = Field(default=(0.9, 0.999), description=_BETAS)
    eps: float = Field(default=1e-8, gt=0, description=_EPS)


class Lion8bit(_Optimizer):
    """Lion (arXiv:2302.06675) with an 8-bit state through bitsandbytes."""

    name: Literal["lion_8bit"] = Field(
        default="lion_8bit", description="Lion with an 8-bit state, through bitsandbytes."
    )
    betas: Betas = Field(default=(0.9, 0.99), description="Decay of the step's mix and of the momentum.")


class _Sketched(_Own):
    """APOLLO's family: moments of a random sketch give the scale of the whole gradient."""

    betas: Betas = Field(default=(0.9, 0.999), description=_BETAS)
    eps: float = Field(default=1e-6, gt=0, description=_EPS)
    scale: Auto[float] = Field(
        default=None,
        gt=0,
        description="The update is multiplied by its root. auto is smaller side / rank, which undoes the "
        "sketch's shrinking, so that AdamW's rates apply; the published runs use 1 (and 128 for Mini).",
    )
    update_proj_gap: int = Field(default=200, ge=1, description=_GAP)
    scale_front: bool = Field(default=False, description="Apply `scale` before the norm-growth limiter.")
    norm_growth_limit: float | None = Field(
        default=1.01,
        gt=1,
        description="Largest growth of an update's norm from step to step; null does not limit.",
    )


class Apollo(_Sketched):
    """APOLLO (arXiv:2412.05270)."""

    name: Literal["apollo"] = Field(
        default="apollo",
        description="APOLLO (arXiv:2412.05270): one learned scale a channel, from a sketch.",
    )
    rank: Auto[int] = Field(
        default=None, ge=1, description="Rank of the sketch; auto is a quarter of the smaller side."
    )


class ApolloMini(_Sketched):
    """APOLLO-Mini (arXiv:2412.05270): rank 1, one scale a tensor."""

    name: Literal["apollo_mini"] = Field(
        default="apollo_mini",
        description="APOLLO-Mini (arXiv:2412.05270): rank 1, one scale a tensor; state near nothing.",
    )


class QApollo(_Sketched):
    """APOLLO with int8 weights."""

    name: Literal["q_apollo"] = Field(
        default="q_apollo",
        description="APOLLO with the linear layers' weights held in int8, rounded stochastically.",
    )
    rank: Auto[int] = Field(
        default=None, ge=1, description="Rank of the sketch; auto is a quarter of the smaller side."
    )
    group_size: int = Field(default=128, ge=16, description="Weights that share a scale and a zero point.")


class GaLore(_Own):
    """GaLore (arXiv:2403.03507)."""

    name: Literal["galore"] = Field(
        default="galore", description="GaLore (arXiv:2403.03507): Adam in a low-rank subspace."
    )
    betas: Betas = Field(default=(0.9, 0.999), description=_BETAS)
    eps: float = Field(default=1e-6, gt=0, description=_EPS)
    rank: Auto[int] = Field(
        default=None, ge=1, description="Rank of the subspace; auto is a quarter of the smaller side."
    )
    scale: float = Field(default=0.25, gt=0, description="Multiplies the update.")
    update_proj_gap: int = Field(default=200, ge=1, description=_GAP)
    projection: Literal["subspace", "svd", "random"] = Field(
        default="subspace",
        description="How the subspace is found: randomised subspace iteration from the last one, an exact "
        "SVD, or at random.",
    )
    moments_on_refresh: Literal["rotate", "keep", "reset"] = Field(
        default="rotate",
        description="What a new subspace does to the moments: turn them into it, leave them (as published), "
        "or start again.",
    )


class NaturalGaLore(GaLore):
    """Natural GaLore (arXiv:2410.16029)."""

    name: Literal["natural_galore"] = Field(  # type: ignore[assignment]  # each class has its own name
        default="natural_galore",
        description="Natural GaLore (arXiv:2410.16029): GaLore's gradient, preconditioned by its history.",
    )
    history: int = Field(default=20, ge=1, description="Low-rank gradients that are remembered.")
    damping: float = Field(default=1e-3, gt=0, description="λ of the empirical Fisher matrix.")


class Frugal(_Own):
    """FRUGAL (arXiv:2411.07837)."""

    name: Literal["frugal"] = Field(
        default="frugal",
        description="FRUGAL (arXiv:2411.07837): Adam on a share of the weights, a stateless rule elsewhere.",
    )
    betas: Betas = Field(default=(0.9, 0.999), description=_BETAS)
    eps: float = Field(default=1e-8, gt=0, description=_EPS)
    density: float = Field(default=0.25, ge=0, le=1, description="Share that has state.")
    projection: Literal["columns", "randk", "random", "svd", "blocks"] = Field(
        default="columns",
        description="Which share: a run of columns of each matrix, single entries, a random or a singular "
        "subspace, or whole matrices.",
    )
    state_free: Literal["sign_sgd", "sgd", "none"] = Field(
        default="sign_sgd", description="Rule of the part without state."
    )
    state_free_scale: float = Field(
        default=0.1,
        ge=0,
        description="Rate of the part without state over the rate of the other; 0.1 is published for "
        "fine-tuning, 1 for pre-training.",
    )
    update_proj_gap: int = Field(default=200, ge=1, description=_GAP)
    reset_statistics: bool = Field(
        default=True, description="Start the moments again with each new projection."
    )


class Cosmos(_Own):
    """COSMOS (arXiv:2502.17410)."""

    name: Literal["cosmos"] = Field(
        default="cosmos",
        description="COSMOS (arXiv:2502.17410): SOAP on the leading eigenvectors, Muon on the rest.",
    )
    betas: Betas = Field(default=(0.95, 0.95), description=_BETAS)
    eps: float = Field(default=1e-8, gt=0, description=_EPS)
    rank: int = Field(default=64, ge=1, description="Leading eigenvectors.")
    gamma: float = Field(default=0.2, ge=0, description="Weight of Muon's part.")
    lr_ratio: float = Field(
        default=0.2, gt=0, description="Root mean square of an update over the rate; AdamW's is near 0.2."
    )
    nesterov: bool = Field(default=True, description="Look one step ahead.")


class Muon(_Own):
    """Muon."""

    name: Literal["muon"] = Field(default="muon", description="Muon: orthogonalised momentum.")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Decay of the momentum.")
    nesterov: bool = Field(default=True, description="Look one step ahead.")
    ns_steps: int = Field(default=5, ge=1, le=20, description="Newton-Schulz iterations.")
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        default="match_rms_adamw",
        description="Scale of the update by shape: so that AdamW's rates apply, or as first published.",
    )
    betas: Betas = Field(
        default=(0.9, 0.95), description="Of the AdamW of embeddings, head, norms and biases."
    )
    eps: float = Field(default=1e-10, gt=0, description="Of that AdamW.")


class Soap(_Own):
    """SOAP (arXiv:2409.11321)."""

    name: Literal["soap"] = Field(
        default="soap", description="SOAP (arXiv:2409.11321): Adam in the eigenbasis of Shampoo."
    )
    betas: Betas = Field(default=(0.95, 0.95), description=_BETAS)
    eps: float = Field(default=1e-8, gt=0, description=_EPS)
    precondition_frequency: int = Field(
        default=10, ge=1, description="Steps between two updates of the basis."
    )
    max_precond_dim: int = Field(default=10_000, ge=1, description="Longer sides keep the identity.")


class BAdam(_Own):
    """BAdam (arXiv:2404.02827), with LISA's order (arXiv:2403.17919)."""

    name: Literal["badam"] = Field(
        default="badam",
        description="BAdam (arXiv:2404.02827): Adam on one block of layers at a time; no gradient and no "
        "state elsewhere.",
    )
    betas: Betas = Field(default=(0.9, 0.999), description=_BETAS)
    eps: float = Field(default=1e-8, gt=0, description=_EPS)
    switch_block_every: int = Field(default=50, ge=1, description="Steps on one block.")
    order: Literal["descending", "ascending", "random", "lisa"] = Field(
        default="random",
        description="Order of the blocks; `lisa` (arXiv:2403.17919) draws active_blocks layers and always "
        "trains embeddings, head and norms.",
    )
    active_blocks: int = Field(default=1, ge=1, description="Layers that are trained at a time.")
    train_embeddings: bool = Field(
        default=False, description="Whether embeddings and head are blocks of their own."
    )


class Lomo(_Own):
    """LOMO (arXiv:2306.09782)."""

    name: Literal["lomo"] = Field(
        default="lomo", description="LOMO (arXiv:2306.09782): plain SGD inside the backward pass, no state."
    )
    step_in_backward: bool = Field(default=True, description="As everywhere; here it is the point.")


class AdaLomo(_Own):
    """AdaLomo (arXiv:2310.10195)."""

    name: Literal["adalomo"] = Field(
        default="adalomo",
        description="AdaLomo (arXiv:2310.10195): LOMO with a factored second moment and grouped clipping.",
    )
    max_grad_norm: float | None = Field(
        default=None, gt=0, description="Clip the norm of the gradient; AdaLomo clips each tensor's update."
    )
    step_in_backward: bool = Field(default=True, description="As everywhere; here it is the point.")


class Adafactor(_Optimizer):
    """Adafactor (arXiv:1804.04235) of PyTorch."""

    name: Literal["adafactor"] = Field(
        default="adafactor", description="Adafactor (arXiv:1804.04235), PyTorch's: factored second moment."
    )
    beta2_decay: float = Field(default=-0.8, lt=0, description="β2 of step t is 1 - t ** beta2_decay.")
    d: float = Field(default=1.0, ge=1, description="Largest root mean square of an update, before the rate.")


class Lion(_Elementwise):
    """Lion (arXiv:2302.06675)."""

    name: Literal["lion"] = Field(
        default="lion", description="Lion (arXiv:2302.06675): the sign of the momentum; one moment."
    )
    betas: Betas = Field(default=(0.9, 0.99), description="Decay of the step's mix and of the momentum.")


class AdamMini(_Optimizer):
    """Adam-mini (arXiv:2406.16793)."""

    name: Literal["adam_mini"] = Field(
        default="adam_mini",
        description="Adam-mini (arXiv:2406.16793): one second moment a head or row, through adam-mini.",
    )
    betas: Betas = Field(default=(0.9, 0.999), description=_BETAS)
    eps: float = Field(default=1e-8, gt=0, description=_EPS)


class Came(_Optimizer):
    """CAME (arXiv:2307.02047)."""

    name: Literal["came"] = Field(
        default="came",
        description="CAME (arXiv:2307.02047): Adafactor guided by its confidence, through came-pytorch.",
    )
    betas: ThreeBetas = Field(
        default=(0.9, 0.999, 0.9999),
        description="Decay of the update's mean, of the squared gradient, and of the instability.",
    )


class ScheduleFreeAdamW(_Optimizer):
    """Schedule-free AdamW (arXiv:2405.15682)."""

    name: Literal["schedule_free_adamw"] = Field(
        default="schedule_free_adamw",
        description="Schedule-free AdamW (arXiv:2405.15682), through schedulefree; wants schedule: constant.",
    )
    betas: AveragedBetas = Field(
        default=(0.9, 0.999),
        description="Where it trains, between the last point (0) and the average (1), and the decay of the "
        "gradient's square.",
    )
    eps: float = Field(default=1e-8, gt=0, description=_EPS)


OptimizerConfig = Annotated[
    AdamW
    | AdamW8bit
    | PagedAdamW8bit
    | Lion8bit
    | Apollo
    | ApolloMini
    | QApollo
    | GaLore
    | NaturalGaLore
    | Frugal
    | Cosmos
    | Muon
    | Soap
    | BAdam
    | Lomo
    | AdaLomo
    | Adafactor
    | Lion
    | AdamMini
    | Came
    | ScheduleFreeAdamW,
    Field(discriminator="name"),
]
