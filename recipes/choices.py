"""The adapters that a recipe may name (schedules.py, optimizers.py and objectives.py have the other menus).

Each union is discriminated on `name`; the package that owns the classes builds them with one `match`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from .peft_adapter import PeftAdapter
from .section import Auto, Section
from .target_keys import Excluded, Layers, Targets


def _default_alpha(values: dict[str, Any]) -> int:
    """Scale 2 at the default rank 16, for both rules of scaling: alpha / r, and alpha / sqrt(r)."""
    return 8 if values.get("use_rslora") else 32


class LoraAdapter(Section):
    """Low-rank adapters (arXiv:2106.09685) through PEFT; every option has PEFT's name."""

    name: Literal["lora"] = Field(default="lora", description="Low-rank adapters.")
    r: int = Field(default=16, ge=1, le=4096, description="Rank.")
    use_rslora: bool = Field(
        default=False,
        description="Scale by lora_alpha / sqrt(r) in place of lora_alpha / r (arXiv:2312.03732).",
    )
    lora_alpha: int = Field(
        default_factory=_default_alpha,
        json_schema_extra={"x-default": 32},
        ge=1,
        description="Scale of the update, divided by r (or sqrt(r)). The default is 32 whatever the rank "
        "(8 with use_rslora): with a constant alpha the best rate hardly moves when r changes.",
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: Targets = "all-linear"
    exclude_modules: Excluded = None
    modules_to_save: list[str] | None = Field(
        default=None,
        description="Modules trained whole beside the adapter, such as `[embed_tokens, lm_head]`.",
    )
    layers_to_transform: Layers = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={}, description="Ranks for some modules: name or regular expression -> r."
    )
    rank_allocation: Literal["uniform", "block_influence", "angular_distance"] = Field(
        default="uniform",
        description="How `r` is shared out over the decoder layers, at the same number of parameters: the "
        "same for each, or by how much a layer turns its input, as 1 - cosine (ShortGPT, arXiv:2403.03853) "
        "or as an angle (CFSP, arXiv:2409.13199), measured on training rows before the run.",
    )
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={}, description="Alphas for some modules: name or regular expression -> lora_alpha."
    )
    bias: Literal["none", "all", "lora_only"] = Field(default="none", description="Which biases are trained.")
    use_dora: bool = Field(
        default=False, description="Train the norm of each weight column apart (DoRA, arXiv:2402.09353)."
    )
    init_lora_weights: (
        Literal[True, "gaussian", "orthogonal", "olora", "pissa", "corda", "loftq", "eva"]
        | Annotated[
            str, Field(pattern=r"^pissa_niter_[0-9]{1,3}$", json_schema_extra={"x-allowed": "pissa_niter_N"})
        ]
    ) = Field(
        default=True,
        description="Start of the adapter. true: no change at the start; `olora` (arXiv:2406.01775) and "
        "`pissa` (arXiv:2404.02948; `pissa_niter_16` is quicker) start from the weights; `corda` "
        "(arXiv:2406.05223) from the weights as the data use them; `loftq` (arXiv:2310.08659) from the error "
        "of quantisation; `eva` (arXiv:2410.07170) from the data.",
    )
    corda_method: Literal["ipm", "kpm"] = Field(
        default="ipm",
        description="What `init_lora_weights: corda` starts from: the directions that the rows use most "
        "(ipm), or least (kpm), which keeps more of what the model says on such rows.",
    )
    loftq_bits: Literal[4, 8] = Field(
        default=4, description="Bits that `init_lora_weights: loftq` prepares for."
    )
    loftq_iter: int = Field(
        default=1, ge=1, le=100, description="Alternations of `init_lora_weights: loftq`."
    )
    eva_rho: float = Field(
        default=2.0,
        ge=1,
        description="`init_lora_weights: eva` may give a module up to eva_rho * r; 1 keeps all ranks at r.",
    )
    loraplus_lr_ratio: float | None = Field(
        default=None,
        gt=0,
        description="Rate of B over the rate of A (LoRA+, arXiv:2402.12354); null is the same rate.",
    )


class SvfitAdapter(Section):
    """Trained singular values of each weight (arXiv:2409.05926); exported as plain LoRA."""

    name: Literal["svfit"] = Field(
        default="svfit", description="Singular values of the weights (arXiv:2409.05926)."
    )
    r: Auto[Annotated[int, Field(ge=1)]] = Field(
        default=None,
        description="How many of the largest singular values of each matrix are trained, at most all; "
        "`auto` is as many as hold `energy`.",
    )
    energy: float = Field(
        default=0.99,
        gt=0,
        le=1,
        description="Share of the sum of squares of a matrix's singular values that `r: auto` reaches.",
    )
    target_modules: Targets = "all-linear"
    exclude_modules: Excluded = None
    layers_to_transform: Layers = None


class SokaAdapter(Section):
    """Trained Kronecker factors of each weight (arXiv:2506.15251)."""

    name: Literal["soka"] = Field(
        default="soka", description="Kronecker factors of the weights (arXiv:2506.15251)."
    )
    r: int = Field(
        default=16,
        ge=1,
        le=4096,
        description="Most Kronecker terms of a matrix; it gets fewer where these hold `energy` or where its "
        "spectrum turns flat before.",
    )
    energy: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the sum of squares of a matrix's Kronecker spectrum that is enough.",
    )
    target_modules: Targets = "all-linear"
    exclude_modules: Excluded = None
    layers_to_transform: Layers = None


AdapterConfig = Annotated[LoraAdapter | SvfitAdapter | SokaAdapter | PeftAdapter, Field(discriminator="name")]
