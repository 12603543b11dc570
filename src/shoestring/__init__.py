"""shoestring: the best fine-tune of a large language model that a budget can buy."""

__version__ = "0.1.0"
