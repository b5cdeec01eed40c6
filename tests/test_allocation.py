"""What will become of a model's layers and what it takes, told from the metadata alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from models import Shape, write_model
from test_model_info import write_metadata

from gearcpp import GearConfig, Llama, native, read_model_info
from gearcpp.cache.allocation import (
    ASKED,
    GEAR,
    SMALL_CONTEXT,
    SMALL_WINDOW,
    Allocation,
    allocated,
    cache_bytes,
    default_ubatch,
    describe,
    group_layers,
    warning,
)
from gearcpp.cache.kv_type import normalize_kv_type
from gearcpp.cache.stats import seen_in

GEMMA3_270M = {
    "block_count": 18,
    "embedding_length": 640,
    "attention__head_count": 4,
    "attention__head_count_kv": 1,
    "attention__key_length": 256,
    "attention__value_length": 256,
    "attention__sliding_window": 512,
}


def groups_of(path: Path, kv_type: Any = "gear", **allocation: Any) -> list[Any]:
    info, asked = read_model_info(path), Allocation(**allocation)
    sides = allocated(normalize_kv_type(kv_type), info, asked)
    return group_layers([(side.il, side.kind, side.n_bytes) for side in sides], info, asked)


def test_gemma_3_at_32k(tmp_path: Path) -> None:
    """By default it takes 45 MiB at most, where f16 takes 103 and whole windows 576 (f16) or 181."""
    info = read_model_info(write_metadata(tmp_path / "m.gguf", "gemma3", **GEMMA3_270M))
    assert default_ubatch(info, swa_full=False) == 256
    mib = {
        (name, swa_full): sum(side.n_bytes for side in allocated(normalize_kv_type(name), info, Allocation(32768, n_ubatch, swa_full=swa_full))) / 2**20
        for name in ("gear", "f16")
        for swa_full, n_ubatch in ((False, 256), (True, 512))
    }
    assert mib["gear", False] < 45
    assert mib["f16", False] == 3 * 32 + 15 * 768 / 1024
    assert mib["f16", True] == 576
    assert 170 < mib["gear", True] < 190
    total = cache_bytes(normalize_kv_type("f16"), info, Allocation(32768, 256))
    assert total == mib["f16", False] * 2**20 + (32768 + 768) * 40  # and a table for each of the two caches


def test_windows_of_many_sequences(tmp_path: Path) -> None:
    info = read_model_info(write_metadata(tmp_path / "m.gguf", "gemma3", **GEMMA3_270M))
    (window, *_), full = info.layers, info.layers[5]
    assert (window.window, full.window) == (512, 0)
    assert Allocation(32768, 512, n_seq=4).cells(window) == 2560
    assert Allocation(1000).cells(window) == Allocation(1000).cells(full) == 1024
    assert Allocation(32768, swa_full=True).cells(window) == 32768


def test_what_layers_are_in_words(tmp_path: Path) -> None:
    gemma = write_metadata(tmp_path / "m.gguf", "gemma3", **GEMMA3_270M)
    groups = groups_of(gemma, n_ctx=32768)
    assert [(group.kind, len(group.layers), group.growth_share) for group in groups] == [(GEAR, 3, 1.0), (SMALL_WINDOW, 15, 0.0)]
    assert describe(groups) == "3 GEAR, 15 f16 (window too small to gain)"
    assert warning(groups) == ""
    assert describe(groups_of(gemma, n_ctx=512)) == "3 f16 (context too small to gain), 15 f16 (window too small to gain)"
    assert describe(groups_of(gemma, GearConfig(bits_k=16, bits_v=16), n_ctx=32768)) == "18 f16 (asked for)"
    assert describe(groups_of(gemma, "q8_0", n_ctx=32768)) == "18 q8_0"
    assert {group.kind for group in groups_of(gemma, GearConfig(bits_k=16, bits_v=16), n_ctx=32768)} == {ASKED}
    llama = write_metadata(tmp_path / "llama.gguf", "llama")
    assert [group.kind for group in groups_of(llama, n_ctx=512)] == [SMALL_CONTEXT]


def test_layers_whose_heads_cannot_be_packed(tmp_path: Path) -> None:
    """They are named with the reason and their share of the growth; of Gemma 4's kind, with larger heads than any build packs."""
    path = write_metadata(
        tmp_path / "m.gguf",
        "gemma4",
        block_count=4,
        attention__head_count_kv=1,
        attention__key_length=1024,
        attention__value_length=1024,
        attention__key_length_swa=256,
        attention__value_length_swa=256,
        attention__sliding_window=4096,
        attention__sliding_window_pattern=[True, True, True, False],
    )
    groups = groups_of(path, n_ctx=32768)
    assert describe(groups) == "3 GEAR, 1 f16 (heads of 1024 channels cannot be packed); 100% of what the context adds stays f16"
    assert warning(groups) == (
        "1 of the 4 layers with a KV cache are not compressed, 100% of what the context adds: layers 3 stay f16 (heads of 1024 channels cannot be packed)"
    )


def test_a_window_is_packed_only_where_that_gains(tmp_path: Path) -> None:
    """By its bytes, whatever the configuration: a window of as many cells gains with 4 bits, not with 7 and everything kept besides."""
    path = write_metadata(tmp_path / "m.gguf", "gemma3", **{**GEMMA3_270M, "attention__sliding_window": 1024})
    info, allocation = read_model_info(path), Allocation(32768, 512)
    for config, kind in ((GearConfig(), GEAR), (GearConfig(bits_k=7, bits_v=7, center_v=False, sparsity=0.25), SMALL_WINDOW)):
        sides = allocated(normalize_kv_type(config), info, allocation)[:2]
        assert {(side.il, side.n_cell, side.kind) for side in sides} == {(0, 1536, kind)}
        assert sum(side.n_bytes for side in sides) <= sum(side.f16_bytes for side in sides)


def test_a_load_that_leaves_growth_f16_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of two sizes, of which one cannot be packed. No such model is at hand that llama.cpp loads with any build: the check is told so."""
    from gearcpp.cache import allocation

    path = write_model(tmp_path / "m.gguf", "llama", Shape())
    lost = [allocation.LayerGroup(GEAR, (0,), 1, 0.5), allocation.LayerGroup("f16: used by GET_ROWS, which GEAR does not cover", (1,), 1, 0.5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Llama(str(path), n_ctx=4096, verbose=False).close()
    monkeypatch.setattr(allocation, "group_layers", lambda *_: lost)
    with pytest.warns(UserWarning, match=r"m\.gguf: 1 of the 2 layers .* 50% of what the context adds: layers 1 stay f16 \(used by GET_ROWS") as caught:
        Llama(str(path), n_ctx=4096, verbose=False).close()
    assert len(caught) == 1


def test_side_bytes_checks_what_it_is_given() -> None:
    assert native.side_bytes(GearConfig(), 0, (2, 64, 64), "k", 4096, 512)[1] == 0
    for heads, n_cell in (((0, 64, 64), 4096), ((2, 64, 64), 0), ((2, 64, 64), -1), ((2, 64, -16), 4096)):
        with pytest.raises(native.library.GearError, match="layer 3"):
            native.side_bytes(GearConfig(), 3, heads, "k", n_cell, 512)


def test_a_model_seen_through_its_stores() -> None:
    """Where no metadata are at hand (xllamacpp), the layers with fewer cells are windows."""
    stores = [
        {"il": il, "side": side, "n_head_kv": 2, "d_head": 64, "n_cell": n_cell, "n_stream": 1} for il, n_cell in ((0, 512), (1, 4096)) for side in (0, 1)
    ]
    info, allocation = seen_in(stores)
    assert [(layer.il, layer.row_elements, allocation.is_window(layer)) for layer in info.layers] == [(0, 256, True), (1, 256, False)]
    assert allocation.n_ctx == 4096
