"""The per-layer head table from GGUF metadata, and files that are not what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from models import Shape, add_byte_vocabulary, write_model

from gearcpp import DataError, UnsupportedError, read_model_info
from gearcpp.model_info import KVLayer, LongArray


def write_metadata(path: Path, arch: str, **keys: Any) -> Path:
    """A GGUF without tensors: ``keys`` are those of the architecture, with ``__`` for dots."""
    writer = gguf.GGUFWriter(path, arch)
    for name, value in {"block_count": 4, "embedding_length": 512, "attention__head_count": 8, **keys}.items():
        key = f"{arch}.{name.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def heads(path: Path) -> list[tuple[int, int, int, int]]:
    return [(layer.il, layer.n_head_kv, layer.d_head_k, layer.d_head_v) for layer in read_model_info(path).layers]


def test_a_model(tmp_path: Path) -> None:
    info = read_model_info(write_model(tmp_path / "m.gguf", "llama", Shape(n_layer=3, n_head=8, n_head_kv=2, d_head=32, n_ctx=777)))
    assert (info.arch, info.n_layer, info.n_embd, info.n_ctx_train, info.n_vocab, info.n_head) == ("llama", 3, 128, 777, 259, 8)
    assert info.layers == tuple(KVLayer(il, 2, 32, 32) for il in range(3))
    assert info.kv_elements(1000) == 3 * 2 * 64 * 1000
    assert not info.has_chat_template
    assert info.metadata["tokenizer.ggml.tokens"] == LongArray(259)
    info.check_gear()


def test_sizes_that_are_not_stated(tmp_path: Path) -> None:
    assert heads(write_metadata(tmp_path / "m.gguf", "llama")) == [(il, 8, 64, 64) for il in range(4)]


def test_heads_by_layer(tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "m.gguf", "deci", attention__head_count=[8, 8, 8, 4], attention__head_count_kv=[4, 0, 2, 1])
    assert heads(path) == [(0, 4, 64, 64), (2, 2, 64, 64), (3, 1, 64, 64)]


def test_head_sizes_of_window_layers(tmp_path: Path) -> None:
    sizes = {
        "attention__head_count_kv": [4, 1, 4, 1],
        "attention__key_length": 256,
        "attention__value_length": 128,
        "attention__key_length_swa": 64,
        "attention__value_length_swa": 32,
    }
    expected = [(0, 4, 64, 32), (1, 1, 256, 128), (2, 4, 64, 32), (3, 1, 256, 128)]
    listed = write_metadata(tmp_path / "listed.gguf", "gemma4", **sizes, attention__sliding_window_pattern=[True, False, True, False])
    assert heads(listed) == expected
    every_second = write_metadata(tmp_path / "second.gguf", "gemma4", **sizes, attention__sliding_window_pattern=2)
    assert heads(every_second) == expected
    with pytest.raises(DataError, match="does not say which"):
        read_model_info(write_metadata(tmp_path / "unknown.gguf", "gemma4", **sizes))


def test_layers_without_a_cache_of_their_own(tmp_path: Path) -> None:
    assert [layer[0] for layer in heads(write_metadata(tmp_path / "shared.gguf", "gemma4", attention__shared_kv_layers=1))] == [0, 1, 2]
    assert len(heads(write_metadata(tmp_path / "gemma3n.gguf", "gemma3n", block_count=30))) == 20


def test_layers_that_may_have_no_cache(tmp_path: Path) -> None:
    prediction = read_model_info(write_metadata(tmp_path / "mtp.gguf", "glm4moe", nextn_predict_layers=1))
    assert [layer.certain for layer in prediction.layers] == [True, True, True, False]
    hybrid = read_model_info(write_metadata(tmp_path / "hybrid.gguf", "qwen3next", full_attention_interval=4))
    assert not any(layer.certain for layer in hybrid.layers)


def test_families_without_a_cache(tmp_path: Path) -> None:
    info = read_model_info(write_metadata(tmp_path / "bert.gguf", "bert"))
    assert info.layers == ()
    info.check_gear()


@pytest.mark.parametrize(
    ("arch", "keys", "reason"),
    [
        ("mamba", {"attention__head_count": 0}, "mamba models are recurrent"),
        ("t5", {}, "position bias"),
        ("grok", {}, "without flash attention"),
        ("deepseek32", {}, "indexer"),
    ],
)
def test_refused_families(tmp_path: Path, arch: str, keys: dict[str, Any], reason: str) -> None:
    info = read_model_info(write_metadata(tmp_path / "m.gguf", arch, **keys))
    with pytest.raises(UnsupportedError, match=f"{reason}.*kv_type='f16'"):
        info.check_gear()


def test_latent_attention_has_k_only(tmp_path: Path) -> None:
    keys = {"attention__head_count_kv": 1, "attention__key_length": 576, "attention__value_length": 512}
    latent = {"attention__key_length_mla": 192, "attention__value_length_mla": 128}
    info = read_model_info(write_metadata(tmp_path / "m.gguf", "deepseek2", **keys, **latent))
    info.check_gear()
    assert info.is_latent
    assert {(layer.n_head_kv, layer.d_head_k, layer.d_head_v) for layer in info.layers} == {(1, 576, 0)}
    assert info.kv_elements(100) == 100 * 576 * len(info.layers)
    assert not read_model_info(write_metadata(tmp_path / "n.gguf", "llama")).is_latent


def test_overrides(tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "m.gguf", "llama")
    assert read_model_info(path, {"llama.context_length": 512}).n_ctx_train == 512


def test_split_models(tmp_path: Path) -> None:
    def part(number: int, name: str) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_block_count(1)
        writer.add_embedding_length(64)
        writer.add_head_count(1)
        add_byte_vocabulary(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return tmp_path / name

    first = part(0, "m-00001-of-00002.gguf")
    with pytest.raises(DataError, match=r"m-00002-of-00002\.gguf is missing"):
        read_model_info(first)
    second = part(1, "m-00002-of-00002.gguf")
    assert read_model_info(first).files == (first, second)
    with pytest.raises(DataError, match=r"part 2 of 2; load the first one, m-00001-of-00002\.gguf"):
        read_model_info(second)
    with pytest.raises(DataError, match="only under the name NAME-00001-of-00002"):
        read_model_info(first.rename(tmp_path / "renamed.gguf"))


def test_a_truncated_header(tmp_path: Path) -> None:
    """Every length at which the metadata can end is noticed."""
    whole = write_metadata(tmp_path / "m.gguf", "llama", attention__head_count_kv=[8, 8, 8, 8]).read_bytes()
    end_of_keys = whole.rindex(b"head_count_kv") + len("head_count_kv") + 4 + 4 + 8 + 4 * 4
    cut = tmp_path / "cut.gguf"
    for length in range(end_of_keys):
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_model_info(cut)
    cut.write_bytes(whole[:end_of_keys])
    assert len(read_model_info(cut).layers) == 4


def test_files_that_are_no_models(tmp_path: Path) -> None:
    text = tmp_path / "readme.md"
    text.write_text("# not a model, though it is long enough to be one")
    adapter = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    adapter.add_type("adapter")
    adapter.write_header_to_file()
    adapter.write_kv_data_to_file()
    adapter.close()
    for path, message in [
        (tmp_path / "absent.gguf", "there is no file"),
        (tmp_path, "is a folder, not a GGUF file"),
        (text, "is not a GGUF model"),
        (tmp_path / "adapter.gguf", "has no llama.block_count"),
    ]:
        with pytest.raises(DataError, match=message):
            read_model_info(path)


def test_sizes_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one number for each of the 4 layers"):
        read_model_info(write_metadata(tmp_path / "m.gguf", "llama", attention__head_count_kv=[8, 8, 8]))
    old = bytearray(write_metadata(tmp_path / "old.gguf", "llama").read_bytes())
    old[4] = 1
    (tmp_path / "old.gguf").write_bytes(old)
    with pytest.raises(DataError, match="GGUF version 1"):
        read_model_info(tmp_path / "old.gguf")
