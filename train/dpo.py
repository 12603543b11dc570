"""Direct preference optimisation (Rafailov et al., arXiv:2305.18290, equation 7).

    h = beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))
    loss = -log sigmoid(h)

p is the model, q the reference model; the log-probability of an answer is the sum over its tokens. An
answer's reward is beta (log p - log q), and the margin is h.

With label_smoothing e, for pairs of which a share e is labelled the wrong way round (cDPO, Mitchell, "A note
on DPO with noisy preferences & relationship to IPO", 2023):

    loss = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

With sft_weight w, w times the mean negative log-likelihood of the chosen answer's tokens is added, as in
Pang et al., arXiv:2404.19733, equation 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..data import Batch
from ..ops import Int8Weight, token_log_probs
from ..ops.int8_weight import from_plain, to_plain
from ..recipes.choices import LoraAdapter
from ..recipes.errors import UserError
from .supervised import base_model, head_is_plain, trained_hidden, trained_logits

if TYPE_CHECKING:
    from ..recipes import AdapterConfig, DpoObjective

Kind = Literal["adapter_off", "frozen"]
_CHANGES_THE_BASE = ("olora", "pissa", "corda", "loftq")


def reference_kind(config: DpoObjective, adapter: AdapterConfig | None) -> Kind:
    """Which reference model a run of dpo has: what the recipe says, or what is right and costs the least.

    Raises:
        UserError: `adapter_off` without an adapter, or with one that is not the base when it is off.
    """
    why_not = _why_not_off(adapter)
    if config.reference == "adapter_off" and why_not:
        raise UserError(
            f"objective.reference: adapter_off {why_not}.\n"
            "  Set objective.reference=frozen, which keeps a copy of the trained weights, or leave it out"
        )
    if config.reference is not None:
        return config.reference
    return (
        "frozen"
        if why_not or (isinstance(adapter, LoraAdapter) and adapter.modules_to_save)
        else "adapter_off"
    )


def _why_not_off(adapter: AdapterConfig | None) -> str:
    """Why the model with its adapter off is not the model that training begins with; empty where it is."""
    if adapter is None:
        return "needs an adapter, and adapter=null trains every weight"
    if not isinstance(adapter, LoraAdapter):  # their start is the base, which they leave as it is
        return ""
    start = adapter.init_lora_weights
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        return f"is not the model at the start: adapter.init_lora_weights={start} changes the base weights"
    if adapter.bias != "none":
        return f"is not the model at the start: adapter.bias={adapter.bias} trains biases of the base"
    return ""


class Reference:
    """The model that training on pairs began with.

    `adapter_off`: the model without its adapter. `frozen`: a detached copy of the trained parameters, put in
    their place for a pass.
    """

    def __init__(self, kind: Kind, model: nn.Module) -> None:
        """Nothing is copied yet: see `set`."""
        self.kind: Kind = kind
        # By name: a parameter may be replaced by a quantised one, or lose its gradient to a block-wise rule.
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._device = next(model.parameters()).device
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Take the trained parameters as they are now; with `adapter_off` there is nothing to take."""
        if self.kind == "frozen":
            parameters = dict(model.named_parameters())
            self._copies = {name: parameters[name].detach().clone() for name in self._names}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` is the reference: without gradients and dropout, and with no cast weight kept.

        Autocast keeps the casts of trained weights until its context ends: they would outlive the swap, and
        casts made without gradients would cut the weights from their graph.
        """
        modes = [(module, module.training) for module in model.modules()]
        device = next(model.parameters()).device.type
        casts = torch.autocast(
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        )
        model.eval()
        try:
            with torch.no_grad(), casts, self._swapped(model):
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def _swapped(self, model: nn.Module) -> Iterator[None]:
        if self.kind == "adapter_off":
            with _without_adapter(model):
                yield
            return
        if not self._copies:
            raise RuntimeError("the frozen reference was not set: Reference.set(model), or load its state")
        parameters = dict(model.named_parameters())
        pairs = [(parameters[name], copy) for name, copy in self._copies.items()]
        for parameter, copy in pairs:
            _exchange(parameter, copy)
        try:
            yield
        finally:
            for parameter, copy in pairs:
                _exchange(parameter, copy)

    def state_dict(self) -> dict[str, Tensor]:
        """The frozen parameters by name, quantised ones in parts; empty with `adapter_off`."""
        state: dict[str, Tensor] = {}
        for name, copy in self._copies.items():
            state.update(to_plain(name, copy) if isinstance(copy, Int8Weight) else {name: copy})
        return state

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what state_dict gave. ValueError when its names are not the trained parameters'."""
        copies = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        for name in self._names:
            if f"{name}.codes" in copies:
                quantised = from_plain(name, copies)
                for part in to_plain(name, quantised):
                    del copies[part]
                copies[name] = quantised
        odd = sorted(copies.keys() ^ set(self._names if self.kind == "frozen" else ()))
        if odd:
            raise ValueError(f"the reference's parameters differ from the model's: {odd[:4]}")
        self._copies = copies


def _exchange(one: Tensor, other: Tensor) -> None:
    """Let two tensors of one kind change places in memory: nothing is copied."""
    if isinstance(one, Int8Weight) and isinstance(other, Int8Weight):
        for part in ("codes", "scale", "zero"):
            held = getattr(one, part)
            setattr(one, part, getattr(other, part))
            setattr(other, part, held)
        return
    one.data, other.data = other.data, one.data


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    # PEFT takes the gradient from an adapter that is off, and gives it to all of one that is on again.
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def preference_loss(
    model: nn.Module, config: DpoObjective, reference: Reference
) -> Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]:
    """The loss of a batch of pairs: its sum over pairs, and sums of what `preference_metrics` shows.

    Both answers run in one forward pass; the reference runs before it, so that its activations are gone.
    """
    log_probs = label_log_probs(model)
    beta, smoothing, sft_weight = config.beta, config.label_smoothing, config.sft_weight

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with reference.applied(model):
            fixed = per_answer(log_probs(model, batch), batch)
        answers = per_answer(log_probs(model, batch), batch)
        chosen, rejected = (beta * (answers - fixed)).unbind(1)
        margin = chosen - rejected
        losses = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
        if sft_weight:
            lengths = per_answer(torch.ones_like(batch.labels, dtype=answers.dtype), batch)
            losses = losses - sft_weight * answers[:, 0] / lengths[:, 0]
        sums = {
            "correct": (margin > 0).float().sum(),
            "margin": margin.detach().sum(),
            "chosen_reward": chosen.detach().sum(),
            "rejected_reward": rejected.detach().sum(),
        }
        return losses.sum(), sums

    return loss


def preference_metrics(
    loss_sum: float,
    pairs: int,
    *,
    correct: float = 0.0,
    margin: float = 0.0,
    chosen_reward: float = 0.0,
    rejected_reward: float = 0.0,
) -> dict[str, float]:
    """Means over pairs; accuracy is the share whose margin is positive."""
    sums = {
        "loss": loss_sum,
        "accuracy": correct,
        "margin": margin,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
    }
    return {name: value / max(pairs, 1) for name, value in sums.items()}


def per_answer(values: Tensor, batch: Batch) -> Tensor:
    """[pairs, 2]: `values` [n], one for each target, summed over the chosen and over the rejected answer."""
    sums = values.new_zeros(2 * batch.pairs).index_add(0, batch.sequence_of_target(), values)
    return sums.view(batch.pairs, 2)


def label_log_probs(model: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
    """Log-probability of each of `batch.labels`, float32 [n]; a plain head never has all logits at once."""

    def chunked(model: nn.Module, batch: Batch) -> Tensor:
        head = base_model(model).get_output_embeddings()
        return token_log_probs(trained_hidden(model, batch), head.weight, batch.labels, bias=head.bias)

    def own_head(model: nn.Module, batch: Batch) -> Tensor:
        logits = trained_logits(model, batch).float()
        return logits.log_softmax(dim=-1).gather(1, batch.labels[:, None]).squeeze(1)

    return chunked if head_is_plain(model) else own_head
