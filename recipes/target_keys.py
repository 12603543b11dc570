"""The keys that say where an adapter goes; every kind of adapter has them."""

from typing import Annotated

from pydantic import Field

Targets = Annotated[
    str | Annotated[list[str], Field(min_length=1)],
    Field(
        description="`all-linear` (every linear layer but the output head), a list of module names, or "
        "one regular expression for whole names."
    ),
]
Excluded = Annotated[
    str | list[str] | None,
    Field(description="Modules to leave out: a list of names or one regular expression."),
]
Layers = Annotated[
    list[Annotated[int, Field(ge=0)]] | None,
    Field(description="Numbers of the layers that get an adapter; null is all."),
]
