"""shoestring: the best fine-tune of a large language model that a budget can buy.

`import shoestring` costs milliseconds: what needs more is imported when it is first asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipes import load_recipe

__version__ = "0.1.0"
__all__ = ["__version__", "load_recipe"]


def __getattr__(name: str) -> object:
    """Import a public name's home only when it is asked for."""
    if name == "load_recipe":
        from .recipes import load_recipe

        return load_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
