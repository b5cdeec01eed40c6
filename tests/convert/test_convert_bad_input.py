"""Whatever is wrong with a model folder is said, and no half-written file is left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gearcpp.convert import container, convert_model
from safetensors.numpy import load_file, save_file
from samples import N_TOKENS, write_llama

from gearcpp.errors import ConfigError, DataError, GearError, UnsupportedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_llama(tmp_path / "model")
    return tmp_path / "model"


def _fails(folder: Path, error: type[Exception], message: str, **options: Any) -> None:
    """Conversion fails as said and leaves nothing behind."""
    output = folder.parent / "out"
    output.mkdir(exist_ok=True)
    with pytest.raises(error, match=message):
        convert_model(folder, output / "model.gguf", **options)
    assert list(output.iterdir()) == []


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def _change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["BertModel"]}, UnsupportedError, "BertModel cannot be converted: supported are .*GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"architectures": ...}, DataError, "does not name its model class"),
        ({"num_hidden_layers": 2}, DataError, "lacks 9 tensors of a llama model of 2 layers: blk.1.attn_norm.weight"),
        ({"hidden_size": 128}, DataError, r"shape \[.*\], config.json says"),
        ({"intermediate_size": 100}, DataError, r"mlp.down_proj.weight has shape \[64, 128\], config.json says \[64, 100\]"),
        ({"num_key_value_heads": 3}, DataError, "4 attention heads cannot share 3 key-value heads"),
        ({"hidden_size": "wide"}, DataError, "hidden_size = 'wide': expected a positive integer"),
        ({"num_hidden_layers": -1}, DataError, "num_hidden_layers = -1"),
        ({"vocab_size": N_TOKENS - 100}, DataError, rf"vocab_size = {N_TOKENS - 100}: .* from {N_TOKENS - 100} on .* resize"),
        ({"rope_scaling": {"rope_type": "llama3"}}, DataError, "'llama3' without its factor"),
    ],
)
def test_config_that_does_not_fit(folder: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    _change_config(folder, **changes)
    _fails(folder, error, message)


@pytest.mark.parametrize("value", [None, "x", -1, 0, 1e30, [], {}, [None]])
def test_values_of_the_wrong_kind_never_crash(folder: Path, value: Any) -> None:
    """Any key of any JSON file of the folder: converted, or a clear error."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        for key in [*content, "rope_scaling", "rope_parameters", "head_dim", "text_config", "tie_word_embeddings"]:
            path.write_text(json.dumps({**content, key: value}))
            with contextlib.suppress(GearError):
                convert_model(folder, folder / "out.gguf", dry_run=True)
        path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer"), ("model.safetensors", "holds no weights")],
)
def test_missing_file(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    _fails(folder, DataError, message)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_damaged_json(folder: Path, name: str, content: str) -> None:
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    _fails(folder, DataError, name)


def test_tokenizer_of_the_wrong_form(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "merges": [["a"]], "vocab": {}}}')
    _fails(folder, DataError, "tokenizer.json is damaged")


def test_missing_tensor(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    _fails(folder, DataError, "lacks 1 tensors.*blk.0.ffn_up.weight")


def test_missing_output_matrix(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    _fails(folder, DataError, "no output matrix .lm_head.weight., but config.json says that embeddings are not tied")


def test_unknown_tensor(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.gadget.weight": np.zeros((2, 2), np.float32)}))
    _fails(folder, UnsupportedError, "model.layers.0.gadget.weight")


def test_integer_weights(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((N_TOKENS, 64), np.int8)}))
    _fails(folder, UnsupportedError, "lm_head.weight has type I8.*unquantized")


@pytest.mark.parametrize("n_bytes", [4, 100, 100_000])
def test_truncated_shard(folder: Path, n_bytes: int) -> None:
    os.truncate(folder / "model.safetensors", n_bytes)
    _fails(folder, DataError, "truncated")


def test_header_that_lies_about_a_tensor(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b'"shape":[64,64]', b'"shape":[64,63]', 1))
    _fails(folder, DataError, r"shape \[64, 63\].*cannot have 16384 bytes")


def test_tensor_in_two_shards(folder: Path) -> None:
    save_file({"model.norm.weight": np.ones(64, np.float32)}, folder / "model-extra.safetensors")
    _fails(folder, DataError, "model.norm.weight is in two files, model-extra.safetensors and model.safetensors")


def test_tensor_twice_in_one_header(folder: Path) -> None:
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    _fails(folder, DataError, "names x twice")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"model.norm.weight": "model-00002-of-00002.safetensors"}, "model-00002-of-00002.safetensors is missing.*incomplete"),
        ({"model.norm2.weight": "model.safetensors"}, "model.norm2.weight is in model.safetensors, but it is missing"),
        ({"model.norm.weight": "../secret.safetensors"}, "must give a file of this folder"),
        (["model.norm.weight"], "must give a file of this folder"),
    ],
)
def test_index_that_does_not_fit(folder: Path, weight_map: Any, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _fails(folder, DataError, message)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(folder: Path, value: float) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][5, 3] = value

    _change_tensors(folder, damage)
    _fails(folder, DataError, "blk.0.ffn_up.weight has a NaN or an infinity in row 5", verify=True)


def test_output_in_a_folder_that_is_not_there(folder: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write .*No such file or directory"):
        convert_model(folder, folder / "nowhere" / "model.gguf")


def test_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(container.os, "fsync", full)
    _fails(folder, DataError, "cannot write .*No space left on device")


def test_a_failure_keeps_the_file_that_was_there(folder: Path) -> None:
    output = folder.parent / "model.gguf"
    convert_model(folder, output)
    before = output.read_bytes()
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    with pytest.raises(DataError, match="truncated"):
        convert_model(folder, output)
    assert output.read_bytes() == before


def test_a_shard_that_shrinks_while_it_is_read(folder: Path) -> None:
    """A download that is replaced under our feet."""
    path = folder / "model.safetensors"
    _fails(folder, DataError, "ended while it was read", progress=lambda *_: os.truncate(path, 5000))


def test_no_folder_and_no_repository(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a model folder nor a repository"):
        convert_model(tmp_path / "nothing here", tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outtype": "q4_0"}, "unknown outtype 'q4_0': choose one of auto, f32"),
        ({"quantize": "Q9_X"}, "unknown quantization 'Q9_X': choose one of .*Q4_K_M"),
        ({"quantize": "Q4_K_M", "outtype": "q8_0"}, "starts from f32, f16 or bf16"),
        ({"imatrix": "x"}, "imatrix goes with quantize"),
        ({"recover_rank": 4}, "recover_rank goes with quantize"),
        ({"quantize": "Q4_K_M", "recover_rank": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, options: dict[str, Any], message: str) -> None:
    _fails(folder, ConfigError, message, **options)


def test_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    conversion = convert_model(folder, tmp_path / "m.gguf", dry_run=True)
    assert not (tmp_path / "m.gguf").exists()
    assert conversion.tensors["blk.0.attn_k.weight"] == ("F16", (32, 64))
    assert conversion.tensors["blk.0.attn_norm.weight"] == ("F32", (64,))
