"""Prints docs/recipe.md, the reference of all keys: `python -m shoestring.recipes.reference`."""

from typing import Any

from .allowed import describe
from .draft import ENVIRONMENT
from .keys import sections, variants
from .presets import list_presets
from .schema import Recipe, plain_schema
from .short_forms import DEFAULT_NAMES, SHORT_FORMS
from .yaml_text import flow

_HEAD = """\
# The recipe

<!-- Made by `python -m shoestring.recipes.reference > docs/recipe.md`. Edit the schema, not this page. -->

A recipe is one YAML file. It has at least a model, data and a budget; the plan decides all else, prints it,
and writes it to `resolved.yaml` with the origin of each value:

```yaml
model: HuggingFaceTB/SmolLM2-1.7B-Instruct
data: chats.jsonl
budget: 2h
```

- **Closed.** A key that is not in this page is an error, with its line and the nearest key.
- **`auto`** (or `null` where `auto` is allowed) leaves the value to the plan.
- **Short forms.** A section given as one word stands for one of its keys; the sections below say which.
- **Choices by name.** `objective`, `adapter`, `optimizer`, `schedule` and `engine` are chosen by `name`. A
  mapping without a `name` keeps the default one. A section that is left out has its defaults: no `adapter`
  section means **LoRA of rank 16**, and `adapter: null` trains every weight.
- **Command line.** `shoestring train recipe.yaml optimizer.learning_rate=1e-3 data.train.0.weight=0.5`
  changes single keys; `optimizer=lion_8bit` or `budget=30min` replaces a whole section. Values are YAML:
  `null`, `true`, `[a.jsonl, b.jsonl]`. The command line beats the recipe, the recipe beats the environment
  ({environment}).
- **Numbers** may be written `1e-3` or `1_000`; amounts carry their unit: `90s`, `1h30m`, `20 USD`,
  `2.49 USD/h`, `0.5 kWh`, `16 GiB` (2^30) or `16GB` (10^9), `2M` tokens. A plain number where a unit is
  needed is an error.
- **`every`** takes steps (`500`), a share of the budget (`10%`) or time (`5min`).
- The JSON schema for editors is printed by `shoestring schema`.
"""


def reference() -> str:
    """The page, as Markdown."""
    environment = ", ".join(f"`{name}` is `{key}`" for name, key in ENVIRONMENT.items())
    parts = [_HEAD.replace("{environment}", environment)]
    for section in sections():
        parts.append(_section(section))
    rows = [f"| `{preset.name}` | {preset.purpose} | {preset.hardware} |" for preset in list_presets()]
    parts.append(
        "## Presets\n\n`shoestring new NAME` copies one.\n\n"
        "| preset | for | hardware |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    return "\n".join(parts)


def _section(section: str) -> str:
    lines = [f"## {section}", "", str(Recipe.model_fields[section].description)]
    if section in SHORT_FORMS:
        key = SHORT_FORMS[section]
        default = f" The default is `{DEFAULT_NAMES[section]}`." if section in DEFAULT_NAMES else ""
        lines[-1] += f" Short form: `{section}: ...` is `{section}.{key}`.{default}"
    menu = variants(section)
    if not menu:
        return "\n".join([*lines, ""])
    if len(menu) > 1:
        lines += [
            "",
            *(f"- `{name}`: {one['properties']['name']['description']}" for name, one in menu.items()),
        ]
    lines += ["", "| key | allowed | default | what it does |", "|---|---|---|---|"]
    keys = dict.fromkeys(key for one in menu.values() for key in one["properties"])
    for key in sorted(keys, key=lambda key: key != "name"):
        lines.append(_row(section, key, menu))
    if section == "data":
        lines += _nested("Source", "One source, in `data.train` or `data.eval`: a path, or a mapping.")
        lines += _nested("Columns", "The mapping `data.columns`.")
    if section == "engine":
        lines += _nested("AioConfig", "The mapping `engine.aio`.")
        lines += _nested("ZenFlowConfig", "The mapping `engine.zenflow`.")
    if section == "schedule":
        lines += _nested("Piece", "One piece, in `schedule.pieces`: a mapping.")
    return "\n".join([*lines, ""])


def _nested(definition: str, title: str) -> list[str]:
    properties = plain_schema()["$defs"][definition]
    lines = ["", title, "", "| key | allowed | default | what it does |", "|---|---|---|---|"]
    return [*lines, *(_row("", key, {"": properties}) for key in properties["properties"])]


def _row(section: str, key: str, menu: dict[str, dict[str, Any]]) -> str:
    owners = {name: one for name, one in menu.items() if key in one["properties"]}
    first = next(iter(owners.values()))["properties"][key]
    allowed, text = describe(first, plain_schema()["$defs"]), first["description"]
    if key == "name" and len(menu) > 1:
        allowed, text = ", ".join(menu), "Which of these."
    if len(owners) < len(menu):
        without = [name for name in menu if name not in owners]
        few, of = ("Only", list(owners)) if len(owners) <= len(without) else ("Not", without)
        text += f" {few} with {', '.join(f'`{name}`' for name in of)}."
    defaults: dict[str, list[str]] = {}
    for name, one in owners.items():
        defaults.setdefault(_default(key, one, DEFAULT_NAMES.get(section)), []).append(name)
    (usual, _), *others = defaults.items()
    shown = usual + "".join(f" ({', '.join(names)}: {value})" for value, names in others if key != "name")
    return f"| `{key}` | {_cell(allowed)} | {_cell(shown)} | {_cell(text)} |"


def _default(key: str, definition: dict[str, Any], named: str | None) -> str:
    declared = definition["properties"][key]
    if key == "name" and named is not None:
        return f"`{named}`"
    if "default" in declared:
        return f"`{flow(declared['default'])}`"
    return "required" if key in definition.get("required", []) else f"`{declared['x-default']}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
