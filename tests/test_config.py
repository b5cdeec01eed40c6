"""Every form of kv_type, and the errors of configurations."""

from __future__ import annotations

import re

import pytest

from gearcpp import PRESETS, ConfigError, GearConfig, KVType, native, normalize_kv_type
from gearcpp.cache.kv_type import for_sequences, split_kv_types


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_configurations_that_the_library_takes(name: str) -> None:
    assert normalize_kv_type(name).gear == PRESETS[name]
    native.check_config(PRESETS[name])


def test_forms_of_a_gear_type() -> None:
    config = GearConfig(bits_k=3, n_tail=64)
    assert normalize_kv_type(config).gear == config
    assert normalize_kv_type({"bits_k": 3, "n_tail": 64}).gear == config
    assert normalize_kv_type(" GEAR3 ").gear == PRESETS["gear3"]
    assert normalize_kv_type(config).name == "gear(bits_k=3,n_tail=64)"
    assert normalize_kv_type(GearConfig(bits_k=3, bits_v=3, clip_k=0.95, clip_v=0.95)).name == "gear3"
    already = normalize_kv_type("gear")
    assert normalize_kv_type(already) is already


class Halves:
    """A method as `gearcpp.reference` has them, without it."""

    name = "halves"

    def __init__(self, tile: int | None = None) -> None:
        self.tile = tile

    def __call__(self, side, x, written=None, positions=None, *, layer=0, head=0):
        return 0.5 * x, 10.0


def test_a_method_object_is_a_type() -> None:
    method = Halves()
    kv = normalize_kv_type(method)
    assert kv == KVType("sim:halves", GearConfig(), method=method)
    assert kv.type_numbers == (1, 1)
    assert normalize_kv_type(Halves(tile=64)).gear == GearConfig(tile=64)
    assert normalize_kv_type(kv) is kv
    assert kv != normalize_kv_type(Halves()) and len({kv, kv}) == 1
    with pytest.raises(ConfigError, match="tile must be"):
        normalize_kv_type(Halves(tile=100))
    with pytest.raises(ConfigError, match="not type"):
        normalize_kv_type(Halves)  # type: ignore[arg-type]


def test_names_with_a_tail() -> None:
    kv = normalize_kv_type(" Gear3+tail256")
    assert kv == KVType("gear3+tail256", PRESETS["gear3"].replace(n_tail=256))


def test_methods_by_name() -> None:
    reference = pytest.importorskip("gearcpp.reference", reason="the reference methods need PyTorch", exc_type=Exception)
    kv = normalize_kv_type("sim:KVarN42+tail64")
    assert kv.method and kv.method.name == "kvarn42"
    assert (kv.name, kv.gear) == ("sim:kvarn42+tail64", GearConfig(tile=128, n_tail=64))
    assert normalize_kv_type("q4_0+tail32").method.name == "q4_0"  # type: ignore[union-attr]
    assert normalize_kv_type(reference.decoquant(bits=4)).name == "sim:decoquant4"
    recorder = reference.Recorder()
    assert normalize_kv_type(recorder).method is recorder
    with pytest.raises(ConfigError, match="did you mean 'kivi4'"):
        normalize_kv_type("sim:kivi")
    with pytest.raises(ConfigError, match="has to be calibrated"):
        normalize_kv_type("sim:kvquant3")


def test_forms_of_llamas_own_types() -> None:
    assert normalize_kv_type("q8_0") == KVType("q8_0", None, "q8_0", "q8_0")
    assert normalize_kv_type(("q8_0", "q4_0")) == normalize_kv_type("q8_0/q4_0") == KVType("q8_0/q4_0", None, "q8_0", "q4_0")
    assert normalize_kv_type(("q8_0", "q4_0")).type_numbers == (8, 2)
    assert normalize_kv_type("gear").type_numbers == (1, 1)  # nominally f16


@pytest.mark.parametrize(
    ("kv_type", "message"),
    [
        ("gaer", "did you mean 'gear'"),
        ("q9_0", "unknown kv_type"),
        (("gear", "f16"), "cannot be half of a pair"),
        (("q8_0", "q4"), "unknown cache type 'q4'"),
        ({"bitsk": 3}, "did you mean 'bits_k'"),
        ({"bits_k": 8}, "bits_k must be"),
        ({"bits_v": True}, "bits_v must be"),
        ({"group_k": 48}, "group_k must be"),
        ({"group_k": 512}, "group_k must be"),
        ({"group_v": 7}, "group_v must be"),
        ({"tile": 100}, "tile must be"),
        ({"scale_bits": 4}, "scale_bits must be"),
        ({"rank_k": 17}, "rank_k must be"),
        ({"rank_v": -1}, "rank_v must be"),
        ({"factor_bits": 16}, "factor_bits must be"),
        ({"rounds": 0}, "rounds must be"),
        ({"sparsity": 0.5}, "sparsity must be"),
        ({"clip_k": 0.0}, "clip_k must be"),
        ({"n_tail": -1}, "n_tail must be"),
        ({"seed": 2**32}, "seed must be"),
        ({"rotate_k": 2}, "rotate_k must be"),
        (4, "kv_type must be a name"),
        (None, "kv_type must be a name"),
        ("q8_0/q4_0+tail64", "an exact tail is for one type"),
        ("gear+tail99999999999", "n_tail must be"),
        ("gaer+tail64", "did you mean 'gear'"),
        (lambda side, x: (x, 0.0), "a plain function codes tiles as codec="),
    ],
)
def test_bad_kv_types(kv_type: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        normalize_kv_type(kv_type)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"bits_k": 1},
        {"group_k": 48},
        {"group_v": 48},
        {"tile": 32},
        {"scale_bits": 4},
        {"rank_k": 17},
        {"factor_bits": 5},
        {"rounds": 0},
        {"sparsity": 0.5},
        {"clip_v": 1.5},
        {"n_tail": -1},
    ],
)
def test_the_library_refuses_what_python_refuses(change: dict[str, object]) -> None:
    """GearConfig checks nothing by itself, so a bad one can be handed to the native check directly."""
    with pytest.raises(ConfigError):
        native.check_config(GearConfig(**change))  # type: ignore[arg-type]


def test_replace_knows_its_fields() -> None:
    assert GearConfig().replace(bits_k=3) == GearConfig(bits_k=3)
    with pytest.raises(ConfigError, match=r"did you mean 'bits_[kv]' or 'bits_[kv]'"):
        GearConfig().replace(bits=3)


@pytest.mark.parametrize(("n_seq", "n_ctx", "n_tail"), [(1, 65536, 128), (4, 65536, 512), (8, 65536, 1024), (8, 4096, 512), (8, 512, 128)])
def test_the_tail_grows_with_the_sequences(n_seq: int, n_ctx: int, n_tail: int) -> None:
    kv = for_sequences(normalize_kv_type("gear3"), n_seq, n_ctx)
    assert kv.name == "gear3" and kv.gear == PRESETS["gear3"].replace(n_tail=n_tail)
    assert for_sequences(normalize_kv_type("f16"), n_seq, n_ctx) == normalize_kv_type("f16")


def test_a_preset_is_changed_in_parentheses():
    kv = normalize_kv_type("gear2(rotate_k=True, n_tail=256,clip_k=0.85)")
    assert kv.gear == PRESETS["gear2"].replace(rotate_k=True, n_tail=256, clip_k=0.85)
    assert normalize_kv_type(kv.name) == kv
    assert normalize_kv_type(normalize_kv_type(GearConfig(bits_k=3, bits_v=2)).name).gear == GearConfig(bits_k=3, bits_v=2)
    assert split_kv_types("f16, gear2(rotate_k=auto,n_tail=64) ,q8_0/q4_0,") == ["f16", "gear2(rotate_k=auto,n_tail=64)", "q8_0/q4_0"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q8_0(n_tail=1)", "has no fields to change"),
        ("gear2(rotate_k)", "write fields as in"),
        ("gear2(rotate_k=maybe)", "neither a number nor"),
        ("gear2(bits=3)", "unknown GearConfig field 'bits'"),
        ("gear2(bits_k=9)", "bits_k must be"),
        ("gera(bits_k=3)", "did you mean 'gear'"),
    ],
)
def test_a_change_that_cannot_be_is_refused(name, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        normalize_kv_type(name)
