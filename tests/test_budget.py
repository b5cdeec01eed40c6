"""Bits that fit a given memory (`Llama(kv_budget=...)`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_allocation import GEMMA3_270M
from test_model_info import write_metadata

from gearcpp import PRESETS, ConfigError, GearConfig, Llama
from gearcpp.cache.allocation import GEAR, Allocation, allocated, cache_bytes
from gearcpp.cache.budget import RUNGS, budget_bytes, parse_size, within_budget
from gearcpp.cache.kv_type import normalize_kv_type
from gearcpp.model_info import read_model_info

ALLOCATION = Allocation(8192)


def uniform(bits_k: int, bits_v: int) -> GearConfig:
    return GearConfig(bits_k=bits_k, bits_v=bits_v)


@pytest.mark.parametrize(
    ("size", "n_bytes"), [("512MiB", 2**29), ("4GB", 2**32), ("1.5 GiB", 3 * 2**29), ("24k", 24 * 2**10), ("1000", 1000), (1000, 1000), ("10 B", 10)]
)
def test_sizes(size: str | int, n_bytes: int) -> None:
    assert parse_size(size, "it") == n_bytes


@pytest.mark.parametrize("size", ["", "GiB", "-1", "1 GiX", "1e9", "0", 0, True, None, "2GiB/word", "2/token/token"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="kv_budget wants a size"):
        budget_bytes(size, 1024)


def test_a_size_of_a_token() -> None:
    assert budget_bytes("24KiB/token", 1000) == 24 * 1024 * 1000


def test_more_memory_gives_more_bits_and_none_is_exceeded(bundled_model: Path) -> None:
    info = read_model_info(bundled_model)
    least, most = (cache_bytes(normalize_kv_type(uniform(*bits)), info, ALLOCATION) for bits in (RUNGS[0], RUNGS[-1]))
    taken, seen = 0, set()
    for step in range(41):
        budget = least + (most - least) * step // 40
        kv = within_budget(normalize_kv_type("gear"), budget, info, ALLOCATION)
        assert kv.gear
        n_bytes = cache_bytes(kv, info, ALLOCATION)
        assert taken <= n_bytes <= budget
        taken = n_bytes
        seen.add(kv.name)
        bits = [kv.gear.of_layer(layer.il, info.n_layer) for layer in info.layers]
        sums = [one.bits_k + one.bits_v for one in bits]
        assert sums == sorted(sums, reverse=True) and sums[0] - sums[-1] <= 1
    assert len(seen) > 20  # steps within rungs, too
    ends = [within_budget(normalize_kv_type("gear"), budget, info, ALLOCATION).name for budget in (least, most, 100 * most)]
    assert ends == ["gear(K 2 V 2)", "gear(K 6 V 5)", "gear(K 6 V 5)"]


def test_clips_go_with_the_bits_and_all_else_stays(bundled_model: Path) -> None:
    info = read_model_info(bundled_model)
    gear2 = cache_bytes(normalize_kv_type("gear2(n_tail=64,tile=64)"), info, ALLOCATION)
    kv = within_budget(normalize_kv_type("gear(n_tail=64,tile=64)"), gear2, info, ALLOCATION)
    assert kv.gear == PRESETS["gear2"].replace(n_tail=64, tile=64)
    assert kv.name == "gear(K 2 V 2)"


def test_what_does_not_fit_or_has_no_bits_is_refused(bundled_model: Path) -> None:
    info = read_model_info(bundled_model)
    for kv_type, budget, words in (
        ("gear", "1KiB", "8192 tokens takes .* MiB with 2 bits"),
        ("q8_0", "1GiB", "q8_0 has none to choose"),
        ("gear(0.bits_k=4)", "1GiB", "leave the settings of single layers out"),
    ):
        with pytest.raises(ConfigError, match=words):
            within_budget(normalize_kv_type(kv_type), budget, info, ALLOCATION)


def test_layers_that_would_be_f16_with_more_bits_keep_theirs(tmp_path: Path) -> None:
    """Windows near the bound where packing gains: 2 bits do, 6 do not. The global layers get their bits all the same."""
    path = write_metadata(tmp_path / "m.gguf", "gemma3", **{**GEMMA3_270M, "attention__sliding_window": 1024})
    info, allocation = read_model_info(path), Allocation(32768, 512)
    kinds = {bits: {side.il for side in allocated(normalize_kv_type(uniform(*bits)), info, allocation) if side.kind == GEAR} for bits in RUNGS}
    bound = kinds[RUNGS[0]] - kinds[RUNGS[-1]]
    assert bound and kinds[RUNGS[-1]]
    kv = within_budget(normalize_kv_type("gear"), "4GiB", info, allocation)
    assert kv.gear
    for il in kinds[RUNGS[0]]:
        layer = kv.gear.of_layer(il, info.n_layer)
        assert ((layer.bits_k, layer.bits_v) == RUNGS[-1]) == (il not in bound)
    assert {side.il for side in allocated(kv, info, allocation) if side.kind == GEAR} == kinds[RUNGS[0]]


def test_a_model_holds_to_it(bundled_model: Path) -> None:
    info = read_model_info(bundled_model)
    allocation = Allocation(2048)
    low, high = (cache_bytes(normalize_kv_type(name), info, allocation) for name in ("gear2", "gear3"))
    budget = (low + high) // 2
    llm = Llama(bundled_model, kv_budget=budget, n_ctx=2048, n_threads=1, verbose=False)
    llm.eval([1 + i % 50 for i in range(1500)])
    total = llm.kv_stats()["total"]
    assert total["n_packed"] > 0
    assert low < total["bytes"] <= budget
    assert llm.kv_type.name.startswith("gear(K")
    with pytest.raises(ConfigError, match="none to choose"):
        Llama(bundled_model, kv_type="f16", kv_budget="1GiB", verbose=False)
    llm.close()
