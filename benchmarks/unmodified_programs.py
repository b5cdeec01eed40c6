"""llama.cpp's own programs and tests on the plugin, unmodified: built from its sources, loaded through GGML_BACKEND_PATH.

    python benchmarks/unmodified_programs.py LLAMA_CPP MODEL [--build FOLDER] [--text FILE] [--jobs N] [--threads N]
        [--only NAME,...]

    LLAMA_CPP  llama.cpp's sources of the installed llama-cpp-python: vendor/llama.cpp in the sdist of that release
    MODEL      a GGUF file, such as gearcpp/models/books-6m-q8_0.gguf, or a name such as smollm2-135m (gearcpp/model_files.py)
    --build    where to build, or where it was built before; default: a temporary folder
    --text     what llama-perplexity reads; default: LLAMA_CPP/docs/build.md

Prints one line for each program: ran, failed or skipped, with the reason. The exit status is the number of failures. Needs cmake, ninja and a C++
compiler; the build takes a quarter of an hour on two cores, most of it llama-server.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gearcpp import native
from gearcpp.cli._markdown import markdown_table
from gearcpp.model_files import model_argument

DEVICE = ["-dev", "GEAR0", "-ngl", "99"]
PROGRAMS = [
    "llama-bench",
    "llama-perplexity",
    "test-save-load-state",
    "test-state-restore-fragmented",
    "test-thread-safety",
    "test-recurrent-state-rollback",
    "test-backend-ops",
    "llama-server",
]


@dataclass
class Outcome:
    """What became of one program."""

    verdict: str  # ran, failed or skipped
    note: str


class Programs:
    """The programs of one build."""

    def __init__(self, folder: Path, model: Path, text: Path, threads: int) -> None:
        self.folder, self.model, self.text = (folder / "bin").resolve(), model.resolve(), text.resolve()
        self.scratch = tempfile.TemporaryDirectory()  # where they run: test-save-load-state writes a file
        # By name for those that take it; the limit of GNU OpenMP is for test-backend-ops, which asks for every processor.
        self.threads = ["-t", str(threads)]
        self.environment = {**os.environ, "OMP_THREAD_LIMIT": str(threads), "GGML_BACKEND_PATH": str(native.library_path())}

    def run(self, name: str, *arguments: str, timeout: int = 900) -> subprocess.CompletedProcess[str]:
        command = [str(self.folder / name), *arguments, *(self.threads if name != "test-backend-ops" else [])]
        return subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self.environment,
            cwd=self.scratch.name,
            timeout=timeout,
            check=False,
        )

    def check(self, result: subprocess.CompletedProcess[str], *signs: str, absent: str = r"(?!)") -> Outcome:
        """It ended well, every sign is in what it printed, and `absent` is not."""
        missing = [sign for sign in signs if not re.search(sign, result.stdout)]
        if result.returncode or missing or re.search(absent, result.stdout):
            tail = " / ".join(result.stdout.strip().splitlines()[-3:])
            return Outcome("failed", f"exit status {result.returncode}{', no ' + ', '.join(missing) if missing else ''}: {tail}")
        return Outcome("ran", "")

    def llama_bench(self) -> Outcome:
        result = self.run("llama-bench", "-m", str(self.model), *DEVICE, "-fa", "1", "-p", "256", "-n", "16", "-d", "0,4096", "-r", "1", "-o", "json")
        outcome = self.check(result, r"GEAR0", r"avg_ts")
        return Outcome("ran", "prompt and generation at depths 0 and 4096") if outcome.verdict == "ran" else outcome

    def llama_perplexity(self) -> Outcome:
        values = []
        for device in (["-dev", "none"], DEVICE):
            arguments = ["-m", str(self.model), *device, "-fa", "on", "-c", "4096", "-b", "4096", "-ub", "128", "--chunks", "1", "-f", str(self.text)]
            for _ in range(3):  # its log is written by a thread that the end of the program may overtake
                result = self.run("llama-perplexity", *arguments)
                outcome = self.check(result, r"Final estimate: PPL = ([0-9.]+)")
                if outcome.verdict == "ran":
                    break
            if outcome.verdict != "ran":
                return outcome
            values.append(float(re.search(r"Final estimate: PPL = ([0-9.]+)", result.stdout)[1]))  # type: ignore[index]
        plain, gear = values
        # Equal to all digits would mean that nothing was packed.
        return Outcome("ran" if 0 < abs(gear / plain - 1) < 0.02 else "failed", f"PPL {plain:.4f} on f16, {gear:.4f} on GEAR")

    def test_save_load_state(self) -> Outcome:
        counts = []
        for device in (["-dev", "none"], DEVICE):
            result = self.run("test-save-load-state", "-m", str(self.model), *device, "-fa", "on", "-c", "4096")
            outcome = self.check(result, "PASS|success|SUCCESS")
            if outcome.verdict != "ran":
                return outcome
            counts.append(len(re.findall(r"PASS", result.stdout)))
        return Outcome("ran" if counts[0] == counts[1] > 0 else "failed", f"PASS {counts[1]} times, {counts[0]} without the plugin")

    def simple(self, name: str, *arguments: str, sign: str = "", note: str = "") -> Outcome:
        outcome = self.check(self.run(name, "-m", str(self.model), *DEVICE, "-fa", "on", "-c", "4096", *arguments), *([sign] if sign else []))
        return Outcome("ran", note or sign) if outcome.verdict == "ran" else outcome

    def test_state_restore_fragmented(self) -> Outcome:
        return self.simple("test-state-restore-fragmented", sign="SUCCESS")

    def test_thread_safety(self) -> Outcome:
        return self.simple("test-thread-safety", "-np", "2", "-n", "32", "-p", "Once upon a time", sign="All threads finished without errors")

    def test_recurrent_state_rollback(self) -> Outcome:
        architecture = subprocess.run(
            [sys.executable, "-c", "import sys, gearcpp.model_info as m; print(m.read_model_info(sys.argv[1]).arch)", str(self.model)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if architecture in ("llama", "qwen3", "gemma2", "gemma3"):
            return Outcome("skipped", f"for recurrent and hybrid models; this one is a {architecture}")
        return self.simple("test-recurrent-state-rollback")

    def test_backend_ops(self) -> Outcome:
        """Ops of the device against the CPU's: ours hands them to the CPU, so this shows that nothing is lost on the way."""
        result = self.run("test-backend-ops", "test", "-b", "GEAR0", "-o", "SOFT_MAX,ROPE,SET_ROWS,CPY", timeout=1800)
        if re.search(r"Skipping|0 backends passed|backends? passed: *0", result.stdout) and "GEAR0" not in result.stdout:
            return Outcome("skipped", "it does not know the device")
        passed = re.findall(r"(\d+)/(\d+) tests passed", result.stdout)
        outcome = self.check(result, r"\d+/\d+ backends passed", absent=r"\bFAIL\b")
        return Outcome("ran", f"{passed[-1][0]} of {passed[-1][1]} tests" if passed else "no test") if outcome.verdict == "ran" else outcome

    def llama_server(self) -> Outcome:
        """Eight completions from two slots, each equal to the first of its prompt."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [str(self.folder / "llama-server"), "-m", str(self.model), *DEVICE, "-fa", "on", "-c", "4096", "-np", "2", "--port", str(port)]
        server = subprocess.Popen([*command, *self.threads, "--host", "127.0.0.1"], stdout=log, stderr=subprocess.STDOUT, env=self.environment)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    if server.poll() is not None:
                        break
                    time.sleep(0.5)
            answers = []
            for i in range(8):
                body = json.dumps({"prompt": ["Once upon a time", "The old house"][i % 2], "n_predict": 16, "temperature": 0, "cache_prompt": False})
                request = urllib.request.Request(f"{url}/completion", body.encode(), {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=120) as response:
                    answers.append(json.load(response)["content"])
            same = answers[0::2] == [answers[0]] * 4 and answers[1::2] == [answers[1]] * 4 and all(answers)
            return Outcome("ran" if same else "failed", "8 completions" if same else f"answers differ: {answers}")
        except OSError as error:
            log.seek(0)
            return Outcome("failed", f"{error}: {' / '.join(log.read().strip().splitlines()[-3:])}")
        finally:
            server.terminate()
            server.wait(30)


def build(source: Path, folder: Path, jobs: int) -> dict[str, str]:
    """Build what is not there yet; program -> why it could not be built."""
    absent = [name for name in PROGRAMS if not (folder / "bin" / name).exists()]
    if not absent:
        return {}
    if not shutil.which("cmake"):
        return dict.fromkeys(absent, "there is no cmake")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF"]
    configured = subprocess.run(["cmake", "-S", str(source), "-B", str(folder), *options], capture_output=True, text=True, check=False)
    if configured.returncode:
        return dict.fromkeys(absent, f"cmake: {configured.stderr.strip().splitlines()[-1:]}")
    failures = {}
    for name in absent:
        made = subprocess.run(["cmake", "--build", str(folder), "-j", str(jobs), "--target", name], capture_output=True, text=True, check=False)
        if made.returncode:
            lines = [line for line in made.stdout.splitlines() if "error" in line.lower()] or made.stdout.splitlines()[-1:]
            failures[name] = f"does not build: {lines[0][:120]}"
    return failures


def main() -> int:
    """Build, run and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("model", type=model_argument)
    parser.add_argument("--build", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default=",".join(PROGRAMS))
    options = parser.parse_args()
    if not (options.llama_cpp / "tests" / "test-save-load-state.cpp").exists():
        parser.error(f"{options.llama_cpp} does not hold llama.cpp's sources")
    folder = options.build or Path(tempfile.mkdtemp())
    failures = build(options.llama_cpp, folder, options.jobs)
    programs = Programs(folder, options.model, options.text or options.llama_cpp / "docs" / "build.md", options.threads)
    rows, n_failed = [], 0
    for name in options.only.split(","):
        run: Callable[[], Outcome] = getattr(programs, name.replace("-", "_"))
        try:
            outcome = Outcome("skipped", failures[name]) if name in failures else run()
        except subprocess.TimeoutExpired as error:
            outcome = Outcome("failed", f"did not end within {error.timeout:.0f} s")
        n_failed += outcome.verdict == "failed"
        rows.append((name, outcome.verdict, outcome.note))
        print(f"{name}: {outcome.verdict} {outcome.note}", file=sys.stderr, flush=True)
    print(markdown_table(("program", "", ""), rows))
    return n_failed


if __name__ == "__main__":
    sys.exit(main())
