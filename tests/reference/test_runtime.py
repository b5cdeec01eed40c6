"""Methods of the reference inside llama.cpp: what they return is what the cache holds, what they count is what kv_stats() says, and how they fail."""

import ctypes
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="gearcpp.reference needs PyTorch")

import llama_cpp  # noqa: E402

from gearcpp import CodecError, ConfigError, DataError, GearConfig, KVType, Llama, model_params, reference  # noqa: E402
from gearcpp.cli import main  # noqa: E402

TOKENS = [1, *range(3, 250), *range(3, 203)]
SMALL = GearConfig(tile=64, n_tail=32)


class Spy:
    """A method that does what another one does and remembers it."""

    def __init__(self, method):
        self.method, self.name, self.tile, self.coded = method, method.name, method.tile, {}

    def __call__(self, side, x, written=None, positions=None, *, layer=0, head=0):
        xhat, n_bytes = self.method(side, x, written, positions, layer=layer, head=head)
        self.coded[side, layer, head, int(positions[0])] = (x.copy(), written.copy(), xhat, n_bytes)
        return xhat, n_bytes


def load(path, kv_type, **arguments):
    return Llama(str(path), kv_type=kv_type, **{"n_ctx": 1024, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "verbose": False, **arguments})


def test_a_method_as_kv_type(bundled_model, rows_of_state):
    """`Llama(model, kv_type=reference.decoquant(bits=4))`: every packed row of a prompt reads as the method returned it, and its bytes are counted."""
    spy = Spy(reference.decoquant(bits=4))
    llm = load(bundled_model, spy)
    tokens = [100 + i % 900 for i in range(900)]
    llm.eval(tokens)
    stats = llm.kv_stats()
    state = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(llm.ctx, 0))()
    assert llama_cpp.llama_state_seq_get_data(llm.ctx, state, len(state), 0) == len(state)
    rows = rows_of_state(bytes(state), len(tokens))

    assert stats["kv_type"] == "sim:decoquant4"
    n_layer, n_head, d = len(rows["k"]), 2, 64
    tiles = {key[3] for key in spy.coded}
    assert set(spy.coded) == {(side, layer, head, first) for side in "kv" for layer in range(n_layer) for head in range(n_head) for first in tiles}
    assert len(tiles) >= 2
    for (side, layer, head, first), (_, written, xhat, _) in spy.coded.items():
        held = rows[side][layer].reshape(len(tokens), n_head, d)[first : first + 256, head]
        # Sinks and tail are not packed.
        np.testing.assert_array_equal(written, np.arange(first, first + 256) >= 4)
        assert first + 256 <= len(tokens) - 128
        np.testing.assert_array_equal(held[written], xhat[written].astype(np.float16).astype(np.float32))

    total = stats["total"]
    # 4 bits for each entry of T_L, an f16 scale for each token, T_S of 16 x 16 in f16.
    n_bytes = {n: n * 64 // 2 + 2 * n + 2 * 256 for n in (252, 256)}
    assert all(coded[3] == n_bytes[252 if key[3] == 0 else 256] for key, coded in spy.coded.items())
    assert total["codec_bytes"] == pytest.approx(sum(coded[3] for coded in spy.coded.values()))
    assert total["codec_bits_per_element"] == pytest.approx(8 * total["codec_bytes"] / (total["n_packed"] * n_head * d))
    assert total["bits_per_element"] == 16
    assert total["bytes"] >= total["bytes_f16"]
    assert {layer["kind"] for layer in stats["layers"]} == {"codec in Python: tiles kept as f16, no memory saved"}
    assert all(layer["codec_bits_per_element"] == pytest.approx(4.5, abs=0.01) for layer in stats["layers"])
    llm.close()


def test_a_name_is_the_same_as_the_method(random_model):
    logits = []
    for kv_type in ("sim:kivi2+tail32", KVType("mine", GearConfig(n_tail=32), method=reference.kivi(2))):
        llm = load(random_model(), kv_type, logits_all=True)
        llm.eval(TOKENS)
        assert llm.kv_stats()["total"]["n_packed"] > 0
        logits.append(llm.scores[: len(TOKENS)].copy())
        llm.close()
    np.testing.assert_array_equal(*logits)


def test_nothing_coded_yet_has_no_figures(random_model):
    llm = load(random_model(), "sim:kivi2")
    llm.eval(TOKENS[:10])
    total = llm.kv_stats()["total"]
    assert math.isnan(total["codec_bits_per_element"])
    assert total["codec_bytes"] == 0
    llm.close()
    llm = load(random_model(), "gear")
    assert "codec_bytes" not in llm.kv_stats()["total"]
    llm.close()


@pytest.mark.parametrize(("cause", "raised"), [(ZeroDivisionError("a mistake"), CodecError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_what_a_method_raises_reaches_the_caller(random_model, cause, raised):
    def fail(side, x, place):
        raise cause

    llm = load(random_model(), KVType("failing", SMALL, method=reference.Method("failing", fail)))
    with pytest.raises(raised) as caught:
        llm.eval(TOKENS)
    assert cause in (caught.value, caught.value.__cause__)
    llm.close()


def test_shapes_that_a_method_must_not_return(random_model):
    wrong = reference.Method("wrong", lambda side, x, place: reference.methods.tensors.Coded(x[:1, :3], 1))
    llm = load(random_model(), KVType("wrong", SMALL, method=wrong))
    with pytest.raises(CodecError):
        llm.eval(TOKENS)
    llm.close()


def test_a_method_and_a_codec_contradict_each_other(random_model):
    with pytest.raises(ConfigError, match="leave codec out"):
        load(random_model(), "sim:kivi2", codec=lambda *_: None)


def test_the_low_level_api_takes_methods(random_model):
    params, device = model_params(random_model(), reference.kivi(4), n_ubatch=64)
    assert device is not None and params.devices
    assert math.isnan(device.codec.bits_per_element())
    device.close()


def test_there_is_nothing_to_time_about_a_method(bundled_model, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "-m", str(bundled_model), "--kv", "f16,sim:kivi2"])
    assert end.value.code
    assert "nothing to time" in " ".join(capsys.readouterr().err.split())


def test_a_session_belongs_to_its_method(random_model, tmp_path):
    """Tiles that a method coded are f16, others are not, and a session holds tiles as they are."""
    configs = {"halved": lambda side, x, place: reference.methods.tensors.Coded(x / 2, 1), "kept": lambda side, x, place: (x, 1)}
    types = [KVType(name, SMALL, method=reference.Method(name, code)) for name, code in configs.items()]
    saved = load(random_model(), types[0])
    saved.eval(TOKENS)
    saved.save_session(tmp_path / "session")
    for other in (types[1], SMALL):
        llm = load(random_model(), other)
        with pytest.raises(DataError, match="was saved with kv_type='halved'"):
            llm.load_session(tmp_path / "session")
        llm.close()
    again = load(random_model(), types[0])
    again.load_session(tmp_path / "session")
    assert again.n_tokens == len(TOKENS)
    assert again.kv_stats()["total"]["n_packed"] == saved.kv_stats()["total"]["n_packed"] > 0
    saved.close()
    again.close()
