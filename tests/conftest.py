"""What several tests share: the models, and one seed for everything random."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from models import Shape, write_model

from gearcpp import DataError
from gearcpp.model_files import find_model
from gearcpp.runtime import amx

SEED = int(os.environ.get("GEARCPP_TEST_SEED", "1"))


def pytest_report_header() -> str:
    return f"gearcpp: GEARCPP_TEST_SEED={SEED}"


@pytest.fixture(scope="session", autouse=True)
def without_broken_amx() -> None:
    """Plain llama_cpp, which many tests compare with, does not know that its AMX kernels crash."""
    if amx.works():
        return
    os.environ["PYTHONWARNINGS"] = "ignore:this build of llama.cpp crashes"  # of commands, whose first lines are tested
    defaults = llama_cpp.llama_model_default_params

    def spared() -> llama_cpp.llama_model_params:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = llama_cpp.llama_cpp.llama_model_default_params = spared


@pytest.fixture
def random() -> np.random.Generator:
    """Random numbers that a failing test can have again: the seed is in pytest's header."""
    return np.random.default_rng(SEED)


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """The model that comes with gearcpp."""
    (model,) = (file for file in (resources.files("gearcpp") / "models").iterdir() if file.name.endswith(".gguf"))
    return Path(str(model))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``random_model(family, shape)``: the path of a model with random weights, made once."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[tuple[str, Shape], Path] = {}

    def model(family: str = "llama", shape: Shape | None = None) -> Path:
        key = (family, shape or Shape())
        if key not in made:
            made[key] = write_model(folder / f"{family}-{len(made)}.gguf", *key)
        return made[key]

    return model


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """``real_model(name)``: a model that somebody trained (gearcpp/model_files.py); the test is skipped where it is absent."""

    def find(name: str) -> Path:
        try:
            return find_model(name)
        except DataError as error:
            pytest.skip(str(error))

    return find
