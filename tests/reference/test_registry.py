"""Methods by name, as codecs for one tile."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="gearcpp.reference needs PyTorch")

from gearcpp import reference  # noqa: E402
from gearcpp.config import PRESETS, GearConfig  # noqa: E402
from gearcpp.errors import ConfigError  # noqa: E402
from gearcpp.reference.methods.gear_tile import gear_tile  # noqa: E402
from gearcpp.reference.methods.rope import Rope  # noqa: E402


@pytest.mark.parametrize("name", reference.names())
def test_every_name_codes_both_sides(name, rng):
    method = reference.method(name)
    assert method.name == name
    n_token = method.tile or 128
    x = torch.randn(n_token, 64, generator=rng).numpy()
    for side in ("k", "v"):
        xhat, n_bytes = method(side, x)
        assert xhat.dtype == np.float32
        assert xhat.shape == x.shape
        assert 0 < np.square(xhat - x).mean() < 0.5 * np.square(x).mean()
        assert 8 * n_bytes / x.size < 9


def test_bits_not_in_the_list_are_understood():
    assert reference.method("kivi3").name == "kivi3"
    assert reference.method(" KVarN53 ").name == "kvarn53"
    x = np.random.default_rng(1).standard_normal((64, 64))
    assert reference.method("kivi3-g64")("k", x)[1] == 64 * 64 * 3 // 8 + 64 * 4
    assert reference.method("q5_0")("k", x)[1] == 64 * 64 * 5.5 / 8


@pytest.mark.parametrize(
    ("name", "bits_k", "bits_v"),
    [
        # The baselines of the checklist on tiles of 256 x 128, everything counted; the exact tail comes from "+tailN".
        ("q8_0", 8.5, 8.5),
        ("q5_0", 5.5, 5.5),
        ("q4_0", 4.5, 4.5),
        ("kivi4", 5.0, 5.0),
        ("kivi2", 3.0, 3.0),
        ("kivi4-g64", 4.5, 4.5),
        ("kivi2-g64", 2.5, 2.5),
        ("kcvt4", 4.125, 4.25),
        ("gear-paper4", 5.4375, 5.375),
        ("gear-l-paper2", 3.25, 3.25),
    ],
)
def test_bits_of_the_baselines(name, bits_k, bits_v, rng):
    x = torch.randn(256, 128, generator=rng).numpy()
    for side, bits in (("k", bits_k), ("v", bits_v)):
        assert 8 * reference.method(name)(side, x)[1] / x.size == pytest.approx(bits, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("kivi", "kivi4"),
        ("q4-0", "q4_0"),
        ("native-gaer", "native-gear"),
        ("kvquant3", "--calibrate"),
        ("cq-4c8b", "record"),
        ("kvquant9", "did you mean 'kvquant"),
    ],
)
def test_unknown_names_are_answered_with_a_hint(name, hint):
    with pytest.raises(ConfigError, match=hint):
        reference.method(name)


@pytest.mark.parametrize("name", ["kivi2", "gear-paper4", "decoquant4", "turbo3", "kvarn42", "q4_0", "native-gear"])
@pytest.mark.parametrize("n_written", [0, 1, 5, 100])
def test_only_rows_that_were_written_count(name, n_written, rng):
    method = reference.method(name)
    n_token = method.tile or 128
    x = torch.randn(n_token, 64, generator=rng).numpy()
    written = torch.zeros(n_token, dtype=torch.bool)
    written[torch.randperm(n_token, generator=rng)[:n_written]] = True
    written = written.numpy()
    noise = np.where(written[:, None], x, 1e4).astype(np.float32)
    for side in ("k", "v"):
        xhat, n_bytes = method(side, noise, written)
        assert np.isfinite(xhat).all()
        np.testing.assert_array_equal(xhat[~written], 0)
        np.testing.assert_array_equal(xhat[written], method(side, x, written)[0][written])
        assert (n_bytes == 0) == (n_written == 0)


def test_native_is_the_configuration_it_is_given(rng):
    x = torch.randn(64, 32, generator=rng)
    config = GearConfig(bits_k=3, tile=64)
    coded = gear_tile(x, "k", config)
    xhat, n_bytes = reference.native(config)("k", x.numpy())
    np.testing.assert_array_equal(xhat, coded.xhat.numpy())
    assert n_bytes == coded.n_bytes
    assert reference.native("gear2").tile == PRESETS["gear2"].tile
    with pytest.raises(ConfigError, match="gear"):
        reference.native("gaer")


def fill(recorder, rng, n_tile=8, n_layer=2, n_head=2, d=32):
    """Hand the recorder tiles of 64 tokens, as the runtime would, and give back its last keys."""
    for tile in range(n_tile):
        positions = np.arange(64 * tile, 64 * tile + 64)
        for layer in range(n_layer):
            for head in range(n_head):
                before = torch.randn(64, d, generator=rng) * torch.logspace(-1, 1, d)
                keys = recorder.rope.apply(before, torch.from_numpy(positions)) if recorder.rope else before
                for side in ("k", "v"):
                    xhat, n_bytes = recorder(side, keys.numpy(), None, positions, layer=layer, head=head)
                    np.testing.assert_array_equal(xhat, keys.numpy())
                    assert n_bytes == 2 * 64 * d
    return keys.numpy(), positions


@pytest.mark.parametrize("construct", [lambda r: reference.kvquant(r, bits=4), lambda r: reference.cq(r, channels=2, bits=6)])
def test_calibrated_methods_undo_rope(construct, rng):
    recorder = reference.Recorder(rope=Rope(pairs="adjacent"))
    keys, positions = fill(recorder, rng)
    method = construct(recorder)
    for side in ("k", "v"):
        xhat, n_bytes = method(side, keys, None, positions, layer=1, head=1)
        assert 0 < np.square(xhat - keys).mean() < 0.2 * np.square(keys).mean()
        assert 8 * n_bytes / keys.size <= 7
    # Before RoPE every channel has its own size here; after it, pairs are mixed, and positions that are wrong hurt.
    right, wrong = (np.square(method("k", keys, None, where, layer=1, head=1)[0] - keys).mean() for where in (positions, positions * 0))
    assert right < wrong
    with pytest.raises(ConfigError, match="calibrated"):
        method("k", keys, layer=7)


def test_calibrated_methods_by_name(rng):
    recorder = reference.Recorder()
    keys, positions = fill(recorder, rng)
    for name, direct in (("kvquant4", reference.kvquant(recorder, 4)), ("cq-2c6b", reference.cq(recorder, 2, 6))):
        assert reference.needs_calibration(name)
        for given in (recorder, lambda: recorder):
            found = reference.method(name.upper(), given)
            assert found.name == name
            for expected, got in zip(direct("k", keys, None, positions), found("k", keys, None, positions), strict=True):
                np.testing.assert_array_equal(got, expected)
    assert not reference.needs_calibration("kivi2")


def test_a_recorder_may_keep_a_sample_of_each_tile(rng):
    everything, sample = reference.Recorder(), reference.Recorder(rows_per_tile=10)
    state = rng.get_state()
    fill(everything, rng)
    rng.set_state(state)
    fill(sample, rng)
    assert (everything.n_token, sample.n_token, reference.Recorder().n_token) == (512, 80, 0)
    for side in ("k", "v"):
        kept, rows = sample.rows(side, 1), everything.rows(side, 1)
        assert kept.shape == (2, 80, 32)
        at = (kept[:, :, None, :1] == rows[:, None, :, :1]).float().argmax(-2).squeeze(-1)  # [head, 80]
        assert torch.equal(rows.gather(1, at[..., None].expand_as(kept)), kept)
        assert (at.diff() > 0).all()  # in the order in which they came, none twice
        assert (torch.bincount(at[0] // 64) == 10).all()


def test_an_empty_recorder_says_so():
    with pytest.raises(ConfigError, match="saw no"):
        reference.Recorder().rows("k", 0)


def test_bad_shapes_are_refused():
    method = reference.method("kivi2")
    with pytest.raises(ConfigError):
        method("k", np.zeros(64))
    with pytest.raises(ConfigError):
        method("k", np.zeros((64, 64)), np.ones(63))
    with pytest.raises(ConfigError):
        method("k", np.zeros((64, 64)), positions=np.arange(3))
