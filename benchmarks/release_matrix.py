"""gearcpp on several releases of llama-cpp-python, each built from source in a virtual environment of its own.

    python benchmarks/release_matrix.py [--releases 0.3.36,0.3.35,...] [--newest 5] [--python PYTHON] [--work FOLDER] [--jobs N] [--threads N]

    --releases  which; default: the newest ones that the package index has
    --python    the interpreter of the virtual environments; default: this one
    --work      where wheels and virtual environments are kept; what is there is used again. Default: a temporary folder
    --tests     test files and pytest options in place of the default ones

gearcpp is built once, and the same wheel is installed beside every release. For each release: whether it can be installed, whether gearcpp proves the
layout of its ggml (native/plugin/abi.cpp), text generated with the bundled model on f16 and on a packed GEAR cache, and the tests. A release that gearcpp
cannot take has to be refused with an error that says so: that counts as a refusal, any other end as a failure. Prints a table; the exit status is the
number of failures. CMAKE_ARGS reaches the builds of llama-cpp-python, which take some ten processor minutes each; -DLLAVA_BUILD=OFF leaves out what is
not needed here. Needs what installing gearcpp needs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/test_abi.py tests/test_native.py tests/test_llama.py tests/test_llama_state.py tests/test_sessions.py tests/test_cache_operations_llama.py"

# Asked of each release. What the library of ggml says of itself comes by ctypes, so that it is known of a release that gearcpp refuses, too.
PROOF = """
import ctypes, json, llama_cpp
library = llama_cpp.llama_cpp._lib
try:
    library.ggml_version.restype = ctypes.c_char_p
    ggml = library.ggml_version().decode()
except AttributeError:
    ggml = "unknown"
answer = {"llama_cpp_python": llama_cpp.__version__, "ggml": ggml, "problem": ""}
try:
    from gearcpp import AbiError, native
    native.open_ggml()
except AbiError as error:
    answer["problem"] = str(error)
print(json.dumps(answer))
"""

GENERATE = """
import json, sys
from importlib import resources
import numpy as np
from gearcpp import Llama
(model,) = (str(file) for file in (resources.files("gearcpp") / "models").iterdir() if file.name.endswith(".gguf"))
text = "It was a long walk to the sea, and the old man told her about every house on the way. " * 100
logits = {}
for kv_type in ("f16", "gear"):
    llm = Llama(model, kv_type=kv_type, n_ctx=4096, n_threads=int(sys.argv[1]), n_threads_batch=int(sys.argv[1]), verbose=False)
    words = llm.create_completion(text, max_tokens=24, temperature=0)["choices"][0]["text"]
    chat = llm.create_chat_completion([{"role": "user", "content": text[:200]}], max_tokens=8, temperature=0)["choices"][0]["message"]["content"]
    llm.reset()
    llm.eval(llm.tokenize(text.encode())[:2000])
    logits[kv_type] = np.array(np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)), np.float64)
    share = llm.kv_stats()["total"]["packed_share"]
    assert words and chat, kv_type
    llm.close()
log_p = {kv_type: row - row.max() - np.log(np.exp(row - row.max()).sum()) for kv_type, row in logits.items()}
print(json.dumps({"packed_share": share, "kl": float((np.exp(log_p["f16"]) * (log_p["f16"] - log_p["gear"])).sum())}))
"""


@dataclass
class Row:
    """What was found of one release."""

    release: str
    ggml: str = ""
    installed: str = "no"
    proof: str = ""
    generated: str = ""
    tests: str = ""
    reason: str = ""
    is_failure: bool = False


def run(command: list[str], log: Path, *, folder: Path = ROOT, timeout: int = 3600, **environment: str) -> tuple[int, str]:
    """Exit status and output, which is also written to `log`. This process's settings of gearcpp and Python do not reach the command."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "GEARCPP_KV", "GGML_BACKEND_PATH")}
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            env={**inherited, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            text=True,
            errors="replace",
        )
        status, output = result.returncode, result.stdout
    except subprocess.TimeoutExpired as error:
        status, output = -signal.SIGALRM, f"{(error.stdout or b'').decode(errors='replace')}\nit did not end within {timeout} s"
    log.write_text(f"{' '.join(command)}\n{output}\nexit status {status}\n")
    return status, output


def ended(status: int) -> str:
    """An exit status in words."""
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def last_line(output: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")


def newest_releases(n: int) -> list[str]:
    """The last releases that the package index has, newest first."""
    listing = subprocess.run([sys.executable, "-m", "pip", "index", "versions", "llama-cpp-python"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.*)", listing)
    if not found:
        raise SystemExit(f"pip lists no releases of llama-cpp-python: {listing}")
    return [release.strip() for release in found[1].split(",")][:n]


class Matrix:
    """Releases, one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work = (options.work or Path(tempfile.mkdtemp())).resolve()
        self.wheels, self.logs = self.work / "wheels", self.work / "logs"
        self.wheels.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        self.python, self.jobs, self.threads, self.tests = options.python, options.jobs, options.threads, options.tests.split()

    def build_gearcpp(self) -> Path:
        """The wheel of this tree, made anew."""
        folder = self.work / "gearcpp-wheel"
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(folder), "-C", "cmake.define.GEARCPP_CUDA=OFF", str(ROOT)]
        status, output = run(command, self.logs / "gearcpp-wheel.log", CMAKE_BUILD_PARALLEL_LEVEL=str(self.jobs))
        if status:
            raise SystemExit(f"gearcpp does not build: {last_line(output)}")
        return max(folder.glob("gearcpp-*.whl"), key=lambda wheel: wheel.stat().st_mtime)

    def llama_wheel(self, release: str) -> tuple[Path | None, str]:
        """The wheel of a release, built if it is not there; else why not."""
        found = list(self.wheels.glob(f"llama_cpp_python-{release}-*.whl"))
        if found:
            return found[0], ""
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(self.wheels), f"llama-cpp-python=={release}"]
        status, output = run(command, self.logs / f"{release}-wheel.log", timeout=7200, CMAKE_BUILD_PARALLEL_LEVEL=str(self.jobs))
        found = list(self.wheels.glob(f"llama_cpp_python-{release}-*.whl"))
        return (found[0], "") if status == 0 and found else (None, f"does not build: {last_line(output)}")

    def examine(self, release: str, gearcpp: Path) -> Row:
        """Everything about one release."""
        row = Row(release)
        wheel, row.reason = self.llama_wheel(release)
        if not wheel:
            return row
        venv = self.work / f"venv-{release}"
        python = str(venv / "bin" / "python")
        log = lambda step: self.logs / f"{release}-{step}.log"  # noqa: E731
        if not Path(python).exists():
            run([self.python, "-m", "venv", str(venv)], log("venv"))
        # gearcpp apart from its dependencies: its range of releases must not decide what is looked at here.
        steps = (
            [str(wheel), "numpy", "jinja2", "diskcache", "typing-extensions"],
            ["cffi", "gguf", "huggingface_hub", "prompt_toolkit", "rich", "safetensors", "sentencepiece", "tokenizers", "typer", "pytest", "hypothesis"],
            ["--no-deps", "--force-reinstall", str(gearcpp)],
        )
        for i, step in enumerate(steps):
            status, output = run([python, "-m", "pip", "install", "-q", "--find-links", str(self.wheels), *step], log(f"install-{i}"))
            if status:
                row.reason = f"does not install: {last_line(output)}"
                row.is_failure = True
                return row
        row.installed = "yes"

        status, output = run([python, "-c", PROOF], log("proof"), folder=venv, timeout=120)  # not ROOT: its gearcpp is not the one that is meant
        if status:
            row.proof, row.reason, row.is_failure = "failed", f"{ended(status)}: {last_line(output)}", True
            return row
        answer = json.loads(last_line(output))
        row.ggml, row.proof = answer["ggml"], "refused" if answer["problem"] else "passed"
        if answer["problem"]:
            row.reason = answer["problem"]
            return row

        status, output = run([python, "-c", GENERATE, str(self.threads)], log("generate"), folder=venv, timeout=900)
        if status:
            row.generated, row.reason, row.is_failure = "failed", f"{ended(status)}: {last_line(output)}", True
        else:
            result = json.loads(last_line(output))
            row.generated = f"{result['packed_share']:.0%} packed, KL {result['kl']:.1e}"
            row.is_failure = not (result["packed_share"] > 0.5 and result["kl"] < 0.05)
        status, output = run([str(venv / "bin" / "pytest"), "-q", "-p", "no:cacheprovider", *self.tests], log("tests"), OMP_THREAD_LIMIT=str(self.threads))
        row.tests = re.sub(r" in [0-9.]+s.*", "", last_line(output)).strip("= ")
        if status:
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
            row.reason = "; ".join(filter(None, (row.reason, ended(status), *failed)))
            row.is_failure = True
        return row


def main() -> int:
    """Examine and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--releases")
    parser.add_argument("--newest", type=int, default=5)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tests", default=TESTS)
    options = parser.parse_args()
    releases = options.releases.split(",") if options.releases else newest_releases(options.newest)
    matrix = Matrix(options)
    gearcpp = matrix.build_gearcpp()
    rows = []
    for release in releases:
        row = matrix.examine(release, gearcpp)
        rows.append(row)
        print(
            f"{release}: ggml {row.ggml or '?'}, proof {row.proof or '-'}, {row.generated or '-'}, {row.tests or '-'} {row.reason}",
            file=sys.stderr,
            flush=True,
        )
    print(f"{matrix.work}: wheels, virtual environments, logs", file=sys.stderr)
    print("| llama-cpp-python | ggml | installed | layout proof | bundled model, 2,000 tokens | tests | reason |\n|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (row.release, row.ggml, row.installed, row.proof, row.generated, row.tests, row.reason.replace("|", "\\|"))
        print("| " + " | ".join(cells) + " |")
    return sum(row.is_failure for row in rows)


if __name__ == "__main__":
    sys.exit(main())
