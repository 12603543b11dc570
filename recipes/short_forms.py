"""Short forms: what a recipe may say in one word, spelled out.

    model: HuggingFaceTB/SmolLM2-135M   ->   model: {model_name_or_path: HuggingFaceTB/SmolLM2-135M}
    data: [a.jsonl, b.jsonl]            ->   data: {train: [{path: a.jsonl}, {path: b.jsonl}]}
    optimizer: {learning_rate: 1e-3}    ->   optimizer: {name: adamw, learning_rate: 1e-3}

Everything here works on plain values and leaves alone what it does not understand: the schema refuses it
later, with the line.
"""

from typing import Any

SHORT_FORMS = {
    "model": "model_name_or_path",
    "data": "train",
    "budget": "time",
    "objective": "name",
    "adapter": "name",
    "optimizer": "name",
    "schedule": "name",
    "engine": "name",
    "track": "report_to",
    "export": "final",
}
"""Section -> the key that a bare value stands for."""

OLD_NAMES = {"train": {"gradient_checkpointing": "activation_checkpointing"}}
"""Section -> names that transformers still understands, and the new name of each."""

DEFAULT_NAMES = {
    "objective": "sft",
    "adapter": "lora",
    "optimizer": "adamw",
    "schedule": "rex",
    "engine": "native",
}
"""Section -> the `name` of a mapping that gives none."""


def is_short(section: str, given: Any) -> bool:
    """Whether a section is given in its short form. A number for the budget is one without its unit."""
    if section not in SHORT_FORMS or isinstance(given, bool):
        return False
    lists, numbers = section in ("data", "track"), section == "budget"
    return (
        isinstance(given, str)
        or (lists and isinstance(given, list))
        or (numbers and isinstance(given, int | float))
    )


def expand_section(section: str, given: Any) -> Any:
    """Spell out one section; values that are neither short nor a mapping come back as they are."""
    if is_short(section, given):
        given = {SHORT_FORMS[section]: given}
    if not isinstance(given, dict):
        return given
    if section in DEFAULT_NAMES and "name" not in given:
        given = {"name": DEFAULT_NAMES[section], **given}
    for old, new in OLD_NAMES.get(section, {}).items():
        if old in given and new not in given:
            given = {new if key == old else key: value for key, value in given.items()}
    if section == "data":
        return expand_data(given)
    if (
        section == "track"
        and isinstance(report_to := given.get("report_to"), str | None)
        and "report_to" in given
    ):
        trackers = [] if report_to in (None, "none", "") else [report_to]
        return {**given, "report_to": trackers}
    return given


def expand_data(given: Any) -> Any:
    """Spell out the sources of the data section."""
    if not isinstance(given, dict):
        return given
    spelled = dict(given)
    for key in ("train", "eval", "preferences"):
        if isinstance(spelled.get(key), str | dict):
            spelled[key] = [spelled[key]]
        if isinstance(spelled.get(key), list):
            spelled[key] = [expand_source(source) for source in spelled[key]]
    return spelled


def expand_source(given: Any) -> Any:
    """A bare string is a path."""
    return {"path": given} if isinstance(given, str) else given


def expand_recipe(given: Any) -> Any:
    """Spell out all sections of a recipe."""
    if not isinstance(given, dict):
        return given
    return {
        key: expand_section(key, value) if isinstance(key, str) else value for key, value in given.items()
    }
