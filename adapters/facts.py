"""What the adapters need to know of a model; `shoestring.models.ModelFacts` is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Facts(Protocol):
    """A model described without its weights."""

    @property
    def source(self) -> str:
        """The name the user gave the model."""

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""

    @property
    def tied(self) -> bool:
        """Whether input and output embedding are one matrix."""

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device."""
