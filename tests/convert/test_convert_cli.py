"""`gearcpp convert` and `gearcpp inspect`, and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gearcpp.convert import convert_model, inspect_model
from samples import write_llama

from gearcpp.cli import main
from gearcpp.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_llama(tmp_path / "tiny")
    return tmp_path / "tiny"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """``run("convert", ...)``: exit code, stdout and stderr of the command."""

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        return int(left.value.code or 0), *capfd.readouterr()

    return command


def test_convert_and_inspect(folder: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run("convert", folder, "-o", tmp_path / "m.gguf", "--outtype", "q8_0", "--verify")
    assert (code, err) == (0, "")
    assert "m.gguf (llama, 0.1M parameters, q8_0" in out
    _, out, _ = run("inspect", tmp_path / "m.gguf", "--ctx", "512", "--json")
    facts = json.loads(out)
    assert facts["metadata"]["general.architecture"] == "llama"
    assert facts["metadata"]["tokenizer.ggml.tokens"] == "640 values"
    assert facts["n_ctx"] == 512
    assert {tensor["name"]: (tensor["type"], tensor["shape"]) for tensor in facts["tensors"]}["blk.0.ffn_up.weight"] == ("Q8_0", [128, 64])
    # one layer of K and V, 2 heads of 16, f16; and llama.cpp's table of cells, which no kv type makes smaller
    needs = {need["kv_type"]: need["n_bytes"] for need in facts["kv"]}
    assert needs["f32"] - needs["f16"] == 512 * 2 * 2 * 16 * 2
    assert needs["q8_0"] < needs["f16"]
    assert "gear" in needs


def test_inspect_as_a_table(folder: Path, tmp_path: Path, run: Run) -> None:
    convert_model(folder, tmp_path / "m.gguf")
    _, output, _ = run("inspect", tmp_path / "m.gguf", "--tensors")
    for text in ("general.architecture", "12 tensors", "F16", "blk.0.attn_q.weight", "KV cache for 256 tokens", "q4_0"):
        assert text in output


def test_dry_run_lists_the_tensors(folder: Path, tmp_path: Path, run: Run) -> None:
    _, output, _ = run("convert", folder, "-o", tmp_path / "m.gguf", "--dry-run")
    assert "would write" in output
    assert "blk.0.attn_v.weight" in output
    assert not (tmp_path / "m.gguf").exists()


def test_default_name(folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, _ = run("convert", folder, "--outtype", "f32")
    assert code == 0
    assert (tmp_path / "tiny-f32.gguf").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("convert", "."), 1, "error: . has no config.json"),
        (("convert", ".", "--outtype", "q1"), 2, "error: unknown outtype 'q1'"),
        (("inspect", "none.gguf"), 1, "error: there is no file none.gguf"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exit_code, out, err = run(*arguments)
    assert (exit_code, out) == (code, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty"), (b"GGUF", "ends inside its header"), (b"not a model at all, but long enough to be read as one", "is not a GGUF model")],
)
def test_inspecting_what_is_no_gguf(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(DataError, match=rf"x.gguf .*{reason}"):
        inspect_model(tmp_path / "x.gguf")


def test_inspecting_an_adapter(folder: Path, tmp_path: Path) -> None:
    """A GGUF file that is no model has no KV cache to size."""
    convert_model(folder, tmp_path / "m.gguf", quantize="Q4_0", recover_rank=2)
    inspection = inspect_model(tmp_path / "m-lora.gguf")
    assert inspection.metadata["general.type"] == "adapter"
    assert (inspection.n_ctx, inspection.kv) == (0, ())
