"""llama-cpp-python's own tests, from its sdist, on gearcpp.Llama.

    python benchmarks/llama_cpp_python_tests.py SDIST

    SDIST  the unpacked sdist of the installed llama-cpp-python (pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==VERSION)

`llama_cpp.Llama` is gearcpp's in them. Most of them fetch models from the Hugging Face Hub. Nothing is fetched here: where a test holds a model against
itself, a model of the same kind stands in (the bundled one for a transformer, random ones for a hybrid and an encoder); where it expects the words of the
named model it is skipped and says so. Needs pytest and scipy. The exit status is pytest's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

import pytest

# What a test asks the Hub for -> what stands in for it.
STAND_INS = {"stories15M-q4_0.gguf": "bundled", "Falcon-H1-Tiny-90M-Instruct-Q2_K.gguf": "lfm2", "bge-small-en-v1.5-q4_k_m.gguf": "bert"}


def stand_in(kind: str, folder: Path) -> str:
    """The path of a model of this kind."""
    if kind == "bundled":
        return next(str(file) for file in (resources.files("gearcpp") / "models").iterdir() if file.name.endswith(".gguf"))
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from models import Shape, write_model  # type: ignore[import-not-found]

    path = folder / f"{kind}.gguf"
    shape = Shape(n_layer=4, n_head=2, n_head_kv=1) if kind == "lfm2" else Shape(n_head=2, n_head_kv=2, n_ctx=512)
    return str(path if path.exists() else write_model(path, kind, shape))


def pytest_configure(config: pytest.Config) -> None:
    """As a pytest plugin: put our Llama in the place of the parent's, and the stand-ins in the place of the Hub."""
    import huggingface_hub
    import llama_cpp

    import gearcpp

    folder = Path(tempfile.mkdtemp())

    def fetch(repo_id: str, filename: str, **_: object) -> str:
        name = filename.rsplit("/", 1)[-1]
        if name not in STAND_INS:
            pytest.skip(f"expects the words of {name} from the Hub")
        return stand_in(STAND_INS[name], folder)

    huggingface_hub.hf_hub_download = fetch
    llama_cpp.Llama = gearcpp.Llama


def main() -> int:
    """Run pytest on the sdist's tests with this file as a plugin."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "tests" / "test_llama.py").exists():
        print(__doc__, file=sys.stderr)
        return 2
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "-p", "no:cacheprovider", "-rA", "-q", "tests"]
    sdist = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:  # beside the sdist's own llama_cpp, which is not built, Python would find that one
        shutil.copytree(sdist / "tests", Path(folder) / "tests")
        (Path(folder) / "vendor").symlink_to(sdist / "vendor")
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
