"""llama.cpp's own converter in place of ours: from a stub of a checkout, and from the real one where GEARCPP_LLAMA_CPP_SOURCE names it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import pytest
from gearcpp.convert import convert_model
from samples import write_llama

from gearcpp.cli import main
from gearcpp.errors import ConfigError, DataError, UnsupportedError

SOURCE = os.environ.get("GEARCPP_LLAMA_CPP_SOURCE", "")

# It "converts" a folder by copying the file ready.gguf in it, and does what the folder's file "misbehave" says.
STUB = """
import pathlib, shutil, sys
folder, values = pathlib.Path(sys.argv[1]), dict(zip(sys.argv[2::2], sys.argv[3::2]))
(folder / "python").write_text(sys.prefix)
what = folder / "misbehave"
exec(what.read_text() if what.exists() else 'shutil.copy(folder / "ready.gguf", values["--outfile"])')
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    stub = tmp_path / "llama {cpp}"
    (stub / "requirements").mkdir(parents=True)
    (stub / "convert_hf_to_gguf.py").write_text(STUB)
    (stub / "requirements" / "requirements-convert_hf_to_gguf.txt").write_text("-r ./more.txt\n")
    (stub / "requirements" / "more.txt").write_text("# nothing\n")
    return stub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of a class that ours does not know, and what the stub makes of it."""
    model = tmp_path / "model"
    write_llama(model)
    convert_model(model, model / "ready.gguf", outtype="f32")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["NovelForCausalLM"]}))
    return model


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.gguf"


def test_an_unknown_class_names_the_way_out(folder: Path, output: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"NovelForCausalLM cannot be converted: .*--upstream LLAMA_CPP_CHECKOUT"):
        convert_model(folder, output)


def test_current_python(checkout: Path, folder: Path, output: Path) -> None:
    conversion = convert_model(folder, output, upstream=checkout, upstream_python=True, verify=True)
    assert output.read_bytes() == (folder / "ready.gguf").read_bytes()
    assert (conversion.architecture, conversion.outtype, conversion.n_bytes) == ("llama", "f32", output.stat().st_size)
    assert conversion.tensors["blk.0.attn_k.weight"] == ("F32", (32, 64))
    assert conversion.metadata["llama.block_count"] == 1
    assert list(output.parent.iterdir()) == [output]


def test_quantized_afterwards(checkout: Path, folder: Path, output: Path) -> None:
    conversion = convert_model(folder, output, upstream=checkout, upstream_python=True, quantize="Q4_0")
    assert conversion.outtype == "Q4_0"
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(output).tensors}
    assert types["blk.0.ffn_up.weight"] == "Q4_0"


def test_an_environment_is_made_once(checkout: Path, folder: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said: list[str] = []
    for _ in range(2):
        convert_model(folder, output, upstream=checkout, report=said.append)
    assert sum("installing" in line for line in said) == 1
    (kept,) = (tmp_path / "cache" / "gearcpp" / "upstream").iterdir()
    assert Path((folder / "python").read_text()).resolve() == kept.resolve()
    assert output.read_bytes() == (folder / "ready.gguf").read_bytes()


def test_requirements_that_cannot_be_installed(checkout: Path, folder: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (checkout / "requirements" / "more.txt").write_text("./no-such-folder-here\n")
    with pytest.raises(DataError, match=r"(?s)could not be installed .*--upstream-python.*no-such-folder-here"):
        convert_model(folder, output, upstream=checkout)
    assert list((tmp_path / "cache" / "gearcpp" / "upstream").iterdir()) == []
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("misbehave", "message"),
    [
        (
            "print('reading'); raise NotImplementedError('Novel is not supported')",
            r"(?s)exit status 1.*reading.*NotImplementedError: Novel is not supported",
        ),
        ("sys.exit(3)", r"exit status 3\); its last lines: nothing"),
        ("pass", "without an error and without a file"),
        ("pathlib.Path(values['--outfile']).write_bytes(b'no model')", "cannot be read as a GGUF file"),
    ],
)
def test_a_converter_that_fails(misbehave: str, message: str, checkout: Path, folder: Path, output: Path) -> None:
    (folder / "misbehave").write_text(misbehave)
    with pytest.raises(DataError, match=message):
        convert_model(folder, output, upstream=checkout, upstream_python=True)
    assert list(output.parent.iterdir()) == []


def test_a_failure_leaves_the_file_that_was_there(checkout: Path, folder: Path, output: Path) -> None:
    output.write_text("before")
    (folder / "misbehave").write_text("pathlib.Path(values['--outfile']).write_bytes(b'half'); sys.exit(1)")
    with pytest.raises(DataError, match="exit status 1"):
        convert_model(folder, output, upstream=checkout, upstream_python=True)
    assert output.read_text() == "before"


def test_what_does_not_go_together(checkout: Path, folder: Path, output: Path) -> None:
    for options, message in (
        ({"upstream": folder / "none"}, "there is no folder"),
        ({"upstream": folder}, "no checkout of llama.cpp: it has no convert_hf_to_gguf.py"),
        ({"upstream_python": True}, "goes with upstream"),
        ({"upstream": checkout, "pre": "gpt-2"}, "pre is for gearcpp's own"),
        ({"upstream": checkout, "dry_run": True}, "dry_run is for gearcpp's own"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert_model(folder, output, **options)  # type: ignore[arg-type]
    (checkout / "requirements" / "requirements-convert_hf_to_gguf.txt").unlink()
    with pytest.raises(ConfigError, match="it has no requirements"):
        convert_model(folder, output, upstream=checkout)


def test_the_command(checkout: Path, folder: Path, output: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["convert", str(folder), "-o", str(output), "--upstream", str(checkout), "--upstream-python"])
    out, err = capfd.readouterr()
    assert not left.value.code
    assert "model.gguf (llama, 0.1M parameters, f32" in out
    assert "converting by" in err


@pytest.mark.skipif(not SOURCE, reason="GEARCPP_LLAMA_CPP_SOURCE does not name llama.cpp's sources")
def test_the_real_converter(tmp_path: Path, output: Path) -> None:
    """The tokenizer of a test is none that it has seen: it must say so, and its reason must be shown."""
    pytest.importorskip("transformers", reason="llama.cpp's converter needs transformers")
    pytest.importorskip("torch", reason="llama.cpp's converter needs torch")
    write_llama(tmp_path / "model")
    with pytest.raises(DataError, match="BPE pre-tokenizer was not recognized"):
        convert_model(tmp_path / "model", output, upstream=SOURCE, upstream_python=True)
    assert list(output.parent.iterdir()) == []
