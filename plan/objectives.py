"""What an objective costs above supervised fine-tuning: further passes, a reference, a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.facts import ModelFacts, read_facts
from ..models.source import KEY
from ..recipes import (
    AdapterConfig,
    DistillObjective,
    DpoObjective,
    LoraAdapter,
    ModelConfig,
    Recipe,
    SftThenDpoObjective,
)
from ..recipes.errors import UserError
from .measurement import Measurement

_CHANGES_THE_BASE = ("olora", "pissa", "loftq", "corda")
_LOG_BYTES = 2  # a log-probability, float16; one more a position for all tokens that are not kept


@dataclass(frozen=True)
class Teacher:
    """A frozen model that runs without gradients beside the trained one, or once before it.

    bytes: of its weights. layers, head: work of a forward pass over the trained model's. transient: bytes of
    its activations for each token. stored: it runs before training only. bytes_per_target: on disk, then.
    """

    parameters: int
    bytes: int
    layers: float
    head: float
    transient: int
    stored: bool
    bytes_per_target: int


@dataclass(frozen=True)
class Extra:
    """What one micro-batch costs above a plain forward and backward pass.

    forwards: passes of the model itself without gradients. heads: further products with the output head,
    where logits are computed again for the backward pass. reference: a copy of the trained weights.
    """

    forwards: int = 0
    heads: int = 0
    reference: bool = False
    teacher: Teacher | None = None

    @property
    def online(self) -> Teacher | None:
        """The teacher, where it runs in every step."""
        return None if self.teacher is None or self.teacher.stored else self.teacher


@dataclass(frozen=True)
class Work:
    """Seconds and bytes of a micro-batch of a model of `layers` layers under the recipe's objective.

    streaming: seconds in which the layers' weights come from another tier and, trained, go back: of a forward
    pass alone, and of both. They are hidden where computing takes longer. swapping: seconds a token that
    copies of activations to host memory and back add.
    """

    measured: Measurement
    layers: int
    extra: Extra
    streaming: tuple[float, float] = (0.0, 0.0)
    swapping: float = 0.0

    def train_seconds(self, tokens: float, targets: float) -> float:
        """Forward and backward, and what the objective adds."""
        own = max(self.measured.micro_seconds(self.layers, tokens, targets), self.streaming[1])
        own += self.swapping * tokens
        return own + self._added_seconds(tokens, targets) + self._head_seconds(targets)

    def eval_seconds(self, tokens: float, targets: float) -> float:
        """The loss without gradients."""
        return self._forward_seconds(tokens, targets) + self._added_seconds(tokens, targets)

    def teacher_seconds(self, tokens: float, targets: float) -> float:
        """A forward pass of the teacher, by its size beside the model that was measured."""
        teacher = self.extra.teacher
        if teacher is None:
            return 0.0
        layers = self.measured.forward_seconds.at(self.layers, tokens)
        return teacher.layers * layers + teacher.head * self.measured.head_forward_seconds.at(targets)

    def memory(self, tokens: int, targets: int) -> tuple[int, int]:
        """(activations, logits) in bytes. A teacher in the step has logits of its own."""
        activations, logits = self.measured.activation_bytes(self.layers, tokens, targets)
        if self.extra.online is None:
            return activations, logits
        return activations + self.teacher_memory(tokens), 2 * logits

    def teacher_memory(self, tokens: int) -> int:
        """Bytes of the teacher's activations."""
        return 0 if self.extra.teacher is None else tokens * self.extra.teacher.transient

    def _forward_seconds(self, tokens: float, targets: float) -> float:
        return max(self.measured.eval_seconds(self.layers, tokens, targets), self.streaming[0])

    def _added_seconds(self, tokens: float, targets: float) -> float:
        own = self.extra.forwards * self._forward_seconds(tokens, targets)
        return own if self.extra.online is None else own + self.teacher_seconds(tokens, targets)

    def _head_seconds(self, targets: float) -> float:
        return self.extra.heads * self.measured.head_forward_seconds.at(targets)


def teacher_facts(recipe: Recipe) -> ModelFacts | None:
    """The teacher of the recipe, without its weights; None without one. UserError: it cannot be used."""
    if not isinstance(recipe.objective, DistillObjective):
        return None
    wanted = ModelConfig(
        model_name_or_path=recipe.objective.teacher, trust_remote_code=recipe.model.trust_remote_code
    )
    try:
        return read_facts(wanted)
    except UserError as error:
        raise UserError(str(error).replace(KEY, "objective.teacher")) from None


def extra_of(recipe: Recipe, facts: ModelFacts, teacher: ModelFacts | None, itemsize: int) -> Extra:
    """What the recipe's objective adds. `itemsize`: bytes of a weight of the teacher.

    ValueError: sft_then_dpo, whose stages have a plan each.
    """
    objective = recipe.objective
    if isinstance(objective, SftThenDpoObjective):
        raise ValueError("sft_then_dpo is planned stage by stage, with the recipe of each")
    if isinstance(objective, DpoObjective):
        return Extra(forwards=1, heads=1, reference=reference_is_frozen(objective, recipe.adapter))
    if isinstance(objective, DistillObjective):
        assert teacher is not None
        return Extra(teacher=_teacher(objective, facts, teacher, itemsize))
    return Extra()


def reference_is_frozen(objective: DpoObjective, adapter: AdapterConfig | None) -> bool:
    """Whether the reference of dpo is a copy: as asked for, else unless the adapter, off, leaves the base."""
    if objective.reference is not None:
        return objective.reference == "frozen"
    if adapter is not None and not isinstance(adapter, LoraAdapter):
        return False
    if adapter is None or adapter.modules_to_save or adapter.bias != "none":
        return True
    start = adapter.init_lora_weights
    return isinstance(start, str) and start.startswith(_CHANGES_THE_BASE)


def _teacher(objective: DistillObjective, facts: ModelFacts, teacher: ModelFacts, itemsize: int) -> Teacher:
    widest = max(
        (one.out_features for one in teacher.linear_modules if one.out_features != teacher.vocab_size),
        default=teacher.hidden_size,
    )
    index_bytes = 2 if teacher.vocab_size <= 1 << 16 else 4
    return Teacher(
        parameters=teacher.parameters,
        bytes=teacher.parameters * itemsize,
        layers=_in_layers(teacher) / max(1, _in_layers(facts)),
        head=teacher.hidden_size / facts.hidden_size,
        # In one layer at a time: about five tensors as wide as the hidden states, three as the widest.
        transient=itemsize * (5 * teacher.hidden_size + 3 * widest),
        stored=objective.teacher_logits == "stored",
        bytes_per_target=(objective.top_k or teacher.vocab_size) * (index_bytes + _LOG_BYTES) + _LOG_BYTES,
    )


def _in_layers(facts: ModelFacts) -> int:
    return facts.parameters - facts.embedding_parameters
