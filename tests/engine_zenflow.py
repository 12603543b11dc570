"""ZenFlow in a process of its own against a slow, obvious one: started by test_engine_zenflow, not a test.

    python engine_zenflow.py

Prints JSON: for each case the largest difference of a weight after each step, and the norms of both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from shoestring.recipes import DeepSpeedConfig
from shoestring.recipes.engine import ZenFlowConfig
from shoestring.train.deepspeed_engine import DeepSpeedEngine
from torch import Tensor, nn

RATES = [0.01, 0.02, 0.03, 0.02, 0.02, 0.01, 0.01, 0.005, 0.004, 0.003, 0.002, 0.001]
BETAS, EPS, DECAY = (0.8, 0.95), 1e-8, 0.1


@dataclass
class Moments:
    """AdamW as in arXiv:1711.05101, algorithm 2."""

    first: Tensor
    second: Tensor
    count: int = 0

    def step(self, weight: Tensor, grad: Tensor, rate: float, decay: float) -> Tensor:
        self.count += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * grad
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * grad**2
        first = self.first / (1 - BETAS[0] ** self.count)
        second = self.second / (1 - BETAS[1] ** self.count)
        return weight * (1 - rate * decay) - rate * first / (second.sqrt() + EPS)


@dataclass
class Slow:
    """One tensor under ZenFlow. The host's weight knows of chosen columns' steps from selections alone."""

    weight: Tensor
    decay: float
    config: ZenFlowConfig
    host: Tensor = field(init=False)
    moments: Moments = field(init=False)
    chosen: Tensor = field(init=False)
    own: Moments = field(init=False)

    def __post_init__(self) -> None:
        self.host = self.weight.clone()
        self.moments = Moments(torch.zeros_like(self.weight), torch.zeros_like(self.weight))
        self.summed = torch.zeros_like(self.weight)

    def step(self, number: int, grad: Tensor, rate: float) -> tuple[bool, Tensor]:
        """Whether all is stepped, and the gradient of what is: summed since the last update, or chosen."""
        interval, every = self.config.update_interval, self.config.select_interval
        assert interval is not None
        assert every is not None
        after = number - self.config.full_warm_up_rounds
        self.summed += grad
        if after < 0:
            self.weight = self.host = self.moments.step(self.host, self.summed, rate, self.decay)
            self.summed = torch.zeros_like(grad)
            return True, grad
        if after == 0 or number % every == 0:
            self.host = self.weight.clone()
            if grad.dim() == 2:
                count = max(1, int(grad.shape[1] * self.config.topk_ratio))
                self.chosen = grad.abs().sum(0).topk(count).indices.sort().values
            nothing = torch.zeros_like(self.part(grad))
            self.own = Moments(nothing, nothing)
        part = self.own.step(self.part(self.weight), self.part(grad), rate, self.decay)
        update, applied = (after + 1) % interval == 0 or (number + 1) % every == 0, self.part(grad)
        if update:
            applied = self.summed
            self.host = self.moments.step(self.host, self.summed, rate, self.decay)
            self.weight = self.host.clone()
            self.summed = torch.zeros_like(grad)
        if grad.dim() == 2:
            self.weight[:, self.chosen] = part
        else:
            self.weight = part
        return update, applied

    def part(self, value: Tensor) -> Tensor:
        return value[:, self.chosen] if value.dim() == 2 else value


class Loss(nn.Module):
    """A model with its loss, as LossModule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))

    def forward(self, batch: Any) -> Tensor:
        return (self.model(batch.x) - batch.y).square().sum()


def batches() -> list[Any]:
    drawn = []
    for step in range(len(RATES)):
        draw = torch.Generator().manual_seed(step)
        x, y = (torch.randn(7, size, generator=draw) for size in (6, 5))
        batch = SimpleNamespace(x=x, y=y)
        batch.to = lambda _, batch=batch: batch
        drawn.append(batch)
    return drawn


def engine_of(config: ZenFlowConfig, stage: Literal[1, 2] = 2) -> DeepSpeedEngine:
    module = Loss()
    matrices = [p for p in module.parameters() if p.dim() == 2]
    vectors = [p for p in module.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=BETAS,
        eps=EPS,
    )
    own = DeepSpeedConfig(zero_stage=stage, offload_optimizer="cpu", zenflow=config)  # type: ignore[arg-type]
    return DeepSpeedEngine(Accelerator(cpu=True), module, optimizer, False, config=own)  # type: ignore[arg-type]


def compare(config: ZenFlowConfig, stage: Literal[1, 2] = 2) -> dict[str, Any]:
    engine, plain = engine_of(config, stage), Loss()
    slow = {
        name: Slow(p.detach().clone(), DECAY if p.dim() == 2 else 0.0, config)
        for name, p in plain.named_parameters()
    }
    engine.begin()
    differences, norms, expected, since = [], [], [], 0
    for number, (batch, rate) in enumerate(zip(batches(), RATES, strict=True)):
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        engine.forward_backward([batch], 7, lambda: False)
        norms.append(float(engine.step(None)))
        (plain(batch) / 7).backward()
        since, square, update = since + 1, 0.0, False
        for name, p in plain.named_parameters():
            assert p.grad is not None
            update, applied = slow[name].step(number, p.grad, rate)
            square += float(applied.square().sum())
            p.grad = None
            p.data = slow[name].weight.clone()
        expected.append(square**0.5 / (since if update else 1))
        since = 0 if update else since
        now = dict(engine.loss_module.named_parameters())
        differences.append(
            max(float((now[name] - p).detach().abs().max()) for name, p in plain.named_parameters())
        )
    states = dict(engine.whole_states())
    moments = max(
        float((states[name][key] - getattr(slow[f"model.{name}"].moments, own)).abs().max())
        for name in states
        for key, own in (("exp_avg", "first"), ("exp_avg_sq", "second"))
    )
    engine.put_states(states)
    again = dict(engine.whole_states())
    same = all(torch.equal(again[name][key], states[name][key]) for name in states for key in states[name])
    engine.end()
    plainly = all(p.is_contiguous() for p in engine.loss_module.parameters())
    return {
        "differences": differences,
        "norms": norms,
        "expected": expected,
        "moments": moments,
        "put_back": same,
        "contiguous": plainly,
    }


def broken_gradient(key: str) -> dict[str, Any]:
    """The second batch has an infinite number: an input, whose column is not chosen, or a target."""
    engine = engine_of(ZenFlowConfig(update_interval=4))
    engine.begin()
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.01
    drawn = batches()
    getattr(drawn[1], key)[0, 0] = float("inf")
    norms = []
    while engine.sharding:
        before = {name: p.detach().clone() for name, p in engine.loss_module.named_parameters()}
        engine.forward_backward([drawn[len(norms)]], 7, lambda: False)
        norms.append(str(float(engine.step(None))))
    kept = all(torch.equal(before[name], p) for name, p in engine.loss_module.named_parameters())
    return {"norms": norms, "kept": kept}


CASES = {
    "defaults": {"select_interval": 32, "update_interval": 4},
    "chosen anew": {"select_interval": 5, "update_interval": 2, "topk_ratio": 0.3},
    "warm-up": {"select_interval": 6, "update_interval": 3, "topk_ratio": 0.4, "full_warm_up_rounds": 3},
}

if __name__ == "__main__":
    results: dict[str, Any] = {name: compare(ZenFlowConfig(**case)) for name, case in CASES.items()}  # type: ignore[arg-type]
    results["stage 1"] = compare(ZenFlowConfig(**CASES["chosen anew"]), stage=1)  # type: ignore[arg-type]
    results["broken"] = {key: broken_gradient(key) for key in ("x", "y")}
    print("RESULTS " + json.dumps(results))
