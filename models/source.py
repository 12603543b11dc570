"""Where a model comes from: a hub id, a folder, a GGUF file, or one inside an installed package."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..recipes.errors import UserError
from .weight_files import KEY as KEY
from .weight_files import check_weights, read_object

if TYPE_CHECKING:
    from ..recipes.model_data import ModelConfig


@dataclass(frozen=True)
class Source:
    """A model that exists, located but not read.

    `folder` holds config.json for "folder" (for "hub" too once something is cached; null before); `gguf_file`
    is the file for "gguf". `name` is what the user wrote: it goes into reports and adapter files.
    """

    name: str
    kind: Literal["hub", "folder", "gguf"]
    folder: Path | None = None
    gguf_file: Path | None = None
    revision: str | None = None  # hub: the commit that the name resolved to

    @property
    def load_name(self) -> str:
        """What `from_pretrained` takes (not for GGUF)."""
        return str(self.folder) if self.kind == "folder" else self.name


def locate(model: ModelConfig) -> Source:
    """Find the model of a recipe.

    Raises:
        UserError: nothing is there, it is not a model, or it is not complete; the message says what to do.
    """
    name = model.model_name_or_path
    if name.startswith("package:"):
        return _in_package(name)
    if "://" in name:
        # Whatever stands before the @ may be a password, and messages end in logs.
        shown = re.sub(r"(?<=://)[^/\s]*@", "***@", name.partition("?")[0])
        raise UserError(
            f"{KEY}: {shown} is a URL.\n  Give a hub id (OWNER/NAME), or download it and give the folder."
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(name, path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return Source(name, "gguf", gguf_file=path)
        raise UserError(
            f"{KEY}: {name} is a file, but no .gguf file.\n"
            f"  Give the folder it lies in (with config.json and the weights): {path.parent}"
        )
    if _looks_like_path(name):
        raise UserError(f"{KEY}: {name} does not exist.{_near_paths(path)}")
    return _on_hub(name, model)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(".gguf")


def _near_paths(path: Path) -> str:
    parent = path
    while not parent.is_dir():
        parent = parent.parent
    missing = path.relative_to(parent).parts[0]
    entries = sorted(entry.name for entry in parent.iterdir())
    near = difflib.get_close_matches(missing, entries, n=3, cutoff=0.5)
    if near:
        return "   Did you mean " + " or ".join(str(parent / entry) for entry in near) + " ?"
    return f"\n  {parent.resolve()} has no {missing} in it. Relative paths start at the current folder."


def _in_package(name: str) -> Source:
    package, _, file = name.removeprefix("package:").partition("/")
    if not package.replace("_", "").isalnum():
        raise UserError(f"{KEY}: {name} names no package.   Write package:NAME or package:NAME/FILE.gguf")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{KEY}: the package {package} is not installed in this Python environment.\n"
            f"  Install it: pip install {package.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    found = sorted(path for folder in folders for path in folder.rglob("*.gguf"))
    if file:
        if ".." in Path(file).parts or Path(file).is_absolute():
            raise UserError(f"{KEY}: {name} leads out of the package.   Write package:{package}/FILE.gguf")
        chosen = [folder / file for folder in folders if (folder / file).is_file()]
        if not chosen:
            raise UserError(
                f"{KEY}: the package {package} has no file {file}.{_listed(package, folders, found)}"
            )
        return Source(name, "gguf", gguf_file=chosen[0])
    if not found:
        raise UserError(f"{KEY}: the package {package} is installed, but holds no .gguf file.")
    if len(found) > 1:
        raise UserError(
            f"{KEY}: the package {package} holds {len(found)} models.{_listed(package, folders, found)}"
        )
    return Source(name, "gguf", gguf_file=found[0])


def _listed(package: str, folders: list[Path], found: list[Path]) -> str:
    if not found:
        return "   It holds no .gguf file at all."
    names = [path.relative_to(folder) for path in found for folder in folders if path.is_relative_to(folder)]
    shown = [f"    package:{package}/{path.as_posix()}" for path in names[:3]]
    more = [f"    and {len(names) - 3} more"] if len(names) > 3 else []
    return "\n  Choose one:\n" + "\n".join(shown + more)


def _in_folder(name: str, folder: Path) -> Source:
    if (folder / "config.json").is_file():
        check_weights(name, folder)
        return Source(name, "folder", folder=folder)
    if (folder / "adapter_config.json").is_file():
        raise _adapter_given(name, read_object(folder / "adapter_config.json"))
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return Source(name, "gguf", gguf_file=ggufs[0])
    if ggufs:
        names = ", ".join(path.name for path in ggufs[:4])
        raise UserError(
            f"{KEY}: {name} holds {len(ggufs)} GGUF files: {names}.\n  Give the path of one of them."
        )
    if not any(folder.iterdir()):
        raise UserError(
            f"{KEY}: the folder {name} is empty.\n  Give a folder with config.json and the weights."
        )
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    hint = f"   Did you mean {folder / inner[-1]} ?" if inner else ""
    raise UserError(f"{KEY}: the folder {name} has no config.json, so it is not a model.{hint}")


def _adapter_given(name: str, adapter: dict[str, Any]) -> UserError:
    base = adapter.get("base_model_name_or_path") or "the model it was trained from"
    return UserError(
        f"{KEY}: {name} is an adapter ({adapter.get('peft_type', 'PEFT')}), not a model; its base is "
        f"{base}.\n"
        "  To train on from it, merge it first and give the merged folder; to train anew, give the base:\n"
        f"  model: {base}"
    )


def _on_hub(name: str, model: ModelConfig) -> Source:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        config = Path(hf_hub_download(name, "config.json", revision=model.revision))
    except HFValidationError:
        raise UserError(
            f"{KEY}: {name!r} is neither a path that exists nor a hub id (OWNER/NAME).{_near_here(name)}"
        ) from None
    except GatedRepoError:
        raise UserError(
            f"{KEY}: {name} is gated: its owner asks you to accept a licence first.\n"
            f"  Accept it at https://huggingface.co/{name}, then log in: hf auth login (or set HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"model.revision: {name} has no revision {model.revision}.   Leave the key out for the main "
            "branch"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{KEY}: {name} is not on the hub (or is private), and no such path exists "
            f"here.{_near_here(name)}\n"
            "  For a private model log in first: hf auth login (or set HF_TOKEN)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise _offline(name) from None
    except EntryNotFoundError:
        raise UserError(
            f"{KEY}: {name} is on the hub, but has no config.json: an adapter, a GGUF repository or a data "
            "set.\n"
            "  Give the base model; or download the .gguf file and give its path."
        ) from None
    except HfHubHTTPError as error:
        raise UserError(
            f"{KEY}: the hub did not give {name}: {str(error).splitlines()[0]}\n  Try again, or give a "
            "local folder."
        ) from None
    except OSError:  # no network: name resolution or connection refused, in the HTTP client's own classes
        raise _offline(name) from None
    return Source(name, "hub", folder=config.parent, revision=config.parent.name)


def _offline(name: str) -> UserError:
    switches = [key for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(key)]
    why = f"{switches[0]} is set" if switches else "the hub cannot be reached"
    fix = f"Unset {switches[0]} to download it" if switches else "Connect to download it"
    return UserError(
        f"{KEY}: {name} is no path here, not in the local cache, and {why}.{_near_here(name)}\n"
        f"  {fix}, or give a local folder, a .gguf file or package:NAME."
    )


def _near_here(name: str) -> str:
    """Names in the hub's cache and the current folder that look like `name`."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    cached = [entry.name.removeprefix("models--").replace("--", "/") for entry in cache.glob("models--*")]
    local = [entry.name for entry in Path.cwd().iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    near = difflib.get_close_matches(name, cached + local, n=3, cutoff=0.6)
    return "   Did you mean " + " or ".join(near) + " ?" if near else ""
