"""The programs of examples/, each as its docstring says, on the model that comes with gearcpp."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from server_process import PATIENCE, serve

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
STORY = "The old man looked at the sea and said nothing for a long while. Then he took the oars and rowed. "


def run(name: str, *arguments: str | Path, stdin: str = "") -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test() -> None:
    tests = "".join(path.read_text() for path in TESTS.glob("test_*.py"))
    names = [path.name for path in EXAMPLES.glob("*.py")]
    assert len(names) >= 6
    assert [name for name in names if f'"{name}"' not in tests] == []


def test_chat(bundled_model: Path) -> None:
    lines = run("chat.py", "-m", bundled_model, "-c", "512", "-n", "8", stdin="Hello there.\nAnd what then?\n").splitlines()
    assert re.fullmatch(r"\d+ tokens in the cache: [\d.]+ MiB reserved, [\d.]+ MiB as f16", lines[-1])
    assert int(lines[-1].split()[0]) > 16
    assert len(lines) >= 3


def test_long_document(bundled_model: Path, tmp_path: Path) -> None:
    document = tmp_path / "story.txt"
    document.write_text(STORY * 40)
    arguments = ["long_document.py", "-m", bundled_model, document, "Who rowed?", "Where to?", "-c", "2048", "-n", "8"]
    first, second = run(*arguments), run(*arguments)
    assert re.match(r"read \d+ tokens; \S+story\.gear has [\d.]+ MiB\n", first)
    assert re.match(r"loaded \d+ tokens from \S+story\.gear\n", second)
    assert first.splitlines()[1:] == second.splitlines()[1:]  # the session restores the cache bit for bit
    assert "Who rowed?\n  " in first and "Where to?\n  " in first


def test_python_codec(bundled_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text(" ".join(f"{STORY} He had done so {i} times." for i in range(60)))
    printed = run("python_codec.py", "-m", bundled_model, text, "-c", "1024")
    nats = {name: float(value) for name, value in re.findall(r"^(\w+) +([\d.]+) nats", printed, re.MULTILINE)}
    bits = {name: float(value) for name, value in re.findall(r"^(\w+) .* ([\d.]+) bits", printed, re.MULTILINE)}
    assert nats.keys() == {"f16", "gear3", "codec"}
    assert bits["f16"] == 16
    assert 3 < bits["gear3"] < 4
    assert bits["codec"] == 3.5  # 3 bits, and 4 bytes for each row of 64
    assert 0 < abs(nats["codec"] - nats["f16"]) < 0.5  # the codec was called, and what it returned is what attention read


def test_low_level_batch(bundled_model: Path) -> None:
    lines = run("low_level_batch.py", "-m", bundled_model, "Once upon a time", "--sequences", "3", "-n", "12").split("\n")
    starts = [line for line in lines if re.match(r"[012]: Once upon a time", line)]
    assert len(starts) == 3
    assert len({line.partition(":")[2] for line in starts}) > 1  # each sequence goes on in its own way


def test_client(bundled_model: Path) -> None:
    with serve("-m", bundled_model, "-c", "1024", "--parallel", "2") as server:
        printed = run("client.py", f"{server.url}/v1", "What is a key?", "What is a value?", "--plain", "-n", "8")
        assert "What is a key?\n  " in printed and "What is a value?\n  " in printed
        assert server.metrics()["llamacpp:tokens_predicted_total"] >= 2
