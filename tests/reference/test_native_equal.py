"""The native codec against its PyTorch twin: the same input and configuration give the same codes, scales, zeros, factors and outliers."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="gearcpp.reference needs PyTorch")

from gearcpp import PRESETS, ConfigError, GearConfig, UnsupportedError, native  # noqa: E402
from gearcpp.reference.methods.gear_tile import gear_tile, pack, side_config, tile_bytes, unpack  # noqa: E402
from gearcpp.reference.methods.quantizers import kivi, round_to_nearest  # noqa: E402

SIDES = ("k", "v")
PLAIN = GearConfig(rotate_k=False, rotate_v=False, center_v=False)  # D, L and S alone


@pytest.fixture(autouse=True)
def best_level():
    """Leave the kernel level as it was."""
    before = native.simd_level()
    yield
    native.select_simd(before)


def assert_equal(config, side, x, written=None):
    """Native, at every kernel level, and PyTorch agree on every part of the tile and on what is read back from it.

    With L only the scalar level adds up in the twin's order; of the others, the size of the error is compared.
    """
    settings = side_config(config, side, x.shape[1])
    parts = pack(torch.from_numpy(x), settings, None if written is None else torch.from_numpy(written))
    xhat = unpack(parts, settings).numpy()
    seen = slice(None) if written is None else written
    for level in native.simd_levels():
        native.select_simd(level)
        tile = native.tile_pack(config, side, x, written)
        native_parts = native.tile_parts(config, side, x.shape[1], tile)
        native_xhat = native.tile_unpack(config, side, x.shape[1], tile)
        assert tile_bytes(settings) == len(tile)
        is_exact = level == "scalar" or not settings.rank
        for name in parts._fields if is_exact else ("outlier_index", "outlier_value"):
            np.testing.assert_array_equal(getattr(native_parts, name), getattr(parts, name).numpy(), f"{name} at level {level}")
        if is_exact:
            np.testing.assert_array_equal(native_xhat[seen], xhat[seen], level)
        else:
            error, native_error = (np.square(y[seen] - x[seen], dtype=np.float64).sum() for y in (xhat, native_xhat))
            assert native_error == pytest.approx(error, rel=0.01, abs=1e-9), level


def random_config(random: np.random.Generator) -> GearConfig:
    def pick(*values):
        return values[random.integers(len(values))]

    sparsity = pick(0.0, 0.02, 0.1)
    return GearConfig(
        bits_k=pick(2, 3, 4, 5, 6, 7),
        bits_v=pick(2, 3, 4, 5, 6, 7),
        group_k=pick(0, 32, 64),
        group_v=pick(0, 32, 64),
        scale_bits=pick(8, 16),
        rank_k=pick(0, 0, 1, 4),
        rank_v=pick(0, 0, 2, 3),
        factor_bits=pick(4, 8),
        rounds=pick(1, 2, 3),
        rotate_k=pick(False, True, "auto"),
        rotate_v=pick(False, True, "auto"),
        center_k=sparsity == 0 and pick(False, True),
        center_v=sparsity == 0 and pick(False, True),
        sparsity=sparsity,
        clip_k=pick(1.0, 0.9),
        clip_v=pick(1.0, 0.8),
        tile=pick(64, 128, 256),
        seed=int(random.integers(2**32)),
    )


@pytest.mark.parametrize("trial", range(24))
def test_random_tiles_and_configurations(trial, rng):
    random = np.random.default_rng(rng.initial_seed())
    config = random_config(random)
    d_head = [272, 512, 576][trial // 8] if trial % 8 == 7 else int(random.choice([32, 48, 64, 80, 128, 256]))
    x = (random.standard_normal((config.tile, d_head)) * 10 ** random.uniform(-3, 3)).astype(np.float32)
    if trial % 3 == 0:
        x = np.round(x * 2) / 2  # many equal values, and many halfway between two codes
    written = random.random(config.tile) < 0.6 if trial % 2 else None
    for side in SIDES:
        assert_equal(config, side, x, written)


def ladder(random: np.random.Generator, n_token: int, d: int) -> dict[str, np.ndarray]:
    """Tiles whose structure is known, f32 [n_token, d] each."""
    token, channel = np.arange(n_token)[:, None], np.arange(d)[None, :]
    normal = random.standard_normal((n_token, d))
    spikes = normal.copy()
    spikes[random.integers(n_token, size=20), random.integers(d, size=20)] = 500 * random.choice([-1, 1], 20)
    tiles = {
        "zero": np.zeros((n_token, d)),
        "constant": np.full((n_token, d), -3.7),
        "constant channels": np.broadcast_to(channel / 7 - 3, (n_token, d)),
        "ramp": token / 10 + channel * 0.0,
        "plateaus": (token // 16 + channel // 8) * 0.37,
        "normal": normal,
        "exact rank 3": random.standard_normal((n_token, 3)) @ random.standard_normal((3, d)),
        "outliers": spikes,
        "tiny": normal * 1e-7,
        "beyond f16": normal * 1e5,
        "one value": np.where((token == 5) & (channel == 7), 1000.0, 0.0),
    }
    return {name: np.ascontiguousarray(x, np.float32) for name, x in tiles.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_structured_tiles(preset, rng):
    config = PRESETS[preset]
    for name, x in ladder(np.random.default_rng(rng.initial_seed()), config.tile, 64).items():
        for side in SIDES:
            print(name, side)
            assert_equal(config, side, x)


@pytest.mark.parametrize("preset", PRESETS)
def test_real_tiles(preset, real_rows):
    config = PRESETS[preset]
    for side in SIDES:
        for rows in real_rows[side]:
            assert_equal(config, side, rows[: config.tile])


def test_real_tiles_are_coded_well(real_rows):
    # Two-sided: a broken quantizer is far above, and a bound this low cannot be reached by 4 bits.
    for side in SIDES:
        x = torch.from_numpy(real_rows[side][:, :256])
        coded = gear_tile(x, side, GearConfig())
        share = ((coded.xhat - x).square().sum() / x.square().sum()).item()
        assert 1e-4 < share < 2e-2


@pytest.mark.parametrize(("bits", "share"), [(2, 0.1), (3, 0.02), (4, 0.005), (5, 0.0012), (6, 0.0003), (7, 0.00007)])
@pytest.mark.parametrize("side", SIDES)
def test_error_on_a_normal_tile_lies_between_bounds(bits, share, side, rng):
    # 32 normal values have a range of about 4.1 deviations: squared error (4.1 / levels)^2 / 12 of the variance.
    x = torch.randn(8, 256, 64, generator=rng)
    config = GearConfig(bits_k=bits, bits_v=bits, group_k=32, group_v=32)
    error = (gear_tile(x, side, config).xhat - x).square().mean().item()
    expected = (4.1 / (2**bits - 1)) ** 2 / 12
    assert 0.9 * expected < error < 1.3 * expected


def test_without_terms_it_is_kivi_up_to_where_scales_are_rounded(rng):
    x = torch.randn(3, 256, 64, generator=rng)
    config = replace(PLAIN, bits_k=2, bits_v=2, group_k=64, group_v=32, scale_bits=16)
    for side, group in (("k", 64), ("v", 32)):
        ours, theirs = gear_tile(x, side, config), kivi(x, side, 2, group)
        # Scales are rounded up here and to nearest there: a value on the border of two codes may differ by a step, others by a rounding.
        assert ((ours.xhat - theirs.xhat).abs() > 0.01).float().mean() < 0.005
        assert ours.n_bytes == theirs.n_bytes


def test_low_rank_and_outliers_help_every_tile(rng):
    x = torch.randn(4, 128, 64, generator=rng) + 2 * torch.randn(4, 128, 2, generator=rng) @ torch.randn(4, 2, 64, generator=rng)
    spiked = x.clone()
    spiked[:, 17, 3] = 300.0
    base = replace(PLAIN, bits_k=2, bits_v=2, group_k=0, group_v=0, tile=128)

    def errors(x, side, **changes):
        return (gear_tile(x, side, replace(base, **changes)).xhat - x).square().sum((-1, -2))

    for side in SIDES:
        assert (errors(x, side, rank_k=4, rank_v=4) < errors(x, side)).all()
        assert (errors(x, side, rank_k=4, rank_v=4, rounds=3) < errors(x, side, rank_k=4, rank_v=4)).all()
        assert (errors(spiked, side, sparsity=0.03) < errors(spiked, side)).all()


def test_rounds_move_an_exactly_low_rank_tile_from_d_to_l(rng):
    x = torch.randn(128, 2, generator=rng) @ torch.randn(2, 64, generator=rng)
    base = replace(PLAIN, bits_k=2, bits_v=2, group_k=0, tile=128)
    plain = (gear_tile(x, "k", base).xhat - x).square().sum()
    modelled = (gear_tile(x, "k", replace(base, rank_k=2, rounds=8)).xhat - x).square().sum()
    assert modelled < plain / 2


def test_centering_keeps_every_channels_mean(rng):
    x = torch.randn(3, 256, 64, generator=rng) + 5 * (torch.arange(64) % 7)
    for side in SIDES:
        plain = replace(PLAIN, bits_k=2, bits_v=2)
        centered = replace(plain, center_k=True, center_v=True)
        without, with_means = (gear_tile(x, side, config).xhat - x for config in (plain, centered))
        assert with_means.mean(-2).abs().max() < 0.01 < without.mean(-2).abs().max()  # what is left is f16's rounding of a mean near 30
        assert side == "k" or with_means.square().mean() < without.square().mean() / 20


def test_three_bits_have_eight_levels(rng):
    x = torch.randn(64, 32, generator=rng)
    parts = pack(x, side_config(GearConfig(bits_k=3, group_k=0, tile=64), "k", 32))
    assert (parts.codes.amin(-2) == 0).all()
    assert (parts.codes.amax(-2) == 7).all()
    assert len(parts.codes.unique()) == 8


def test_zero_and_scale_are_rounded_outwards(rng):
    x = torch.randn(5, 128, 64, generator=rng)
    for scale_bits in (8, 16):
        config = replace(PLAIN, scale_bits=scale_bits, group_k=32, tile=128)
        parts = pack(x, side_config(config, "k", 64))
        groups = x.unflatten(-2, (4, 32))  # [5, group, 32, d]
        zero, scale = parts.zero.unflatten(-1, (4, 64)), parts.scale.unflatten(-1, (4, 64))
        slack = 2**-10 * x.abs().max()  # hi and lo are f16
        assert (zero <= groups.amin(-2) + slack).all()
        assert (zero + 15 * scale >= groups.amax(-2) - slack).all()


def test_packing_twice_changes_nothing(rng):
    for side in SIDES:
        for scale_bits in (8, 16):
            config = replace(PLAIN, scale_bits=scale_bits, tile=64)
            once = gear_tile(torch.randn(6, 64, 64, generator=rng), side, config).xhat
            assert torch.equal(gear_tile(once, side, config).xhat, once)


def test_cells_never_written_have_no_say(rng):
    x = torch.randn(2, 64, 64, generator=rng)
    written = torch.rand(64, generator=rng) < 0.5
    noise = torch.where(written.unsqueeze(-1), x, 1e4 * torch.randn(2, 64, 64, generator=rng))
    outliers = replace(PLAIN, rank_k=2, rank_v=2, sparsity=0.1, tile=64)
    means = GearConfig(rank_k=2, rank_v=2, center_k=True, tile=64)
    for side, config in itertools.product(SIDES, (outliers, means)):
        one, other = (gear_tile(tile, side, config, written).xhat[:, written] for tile in (x, noise))
        assert torch.equal(one, other)


def test_bytes_by_hand():
    # K, 4 bits, groups of 32 of 256 tokens, 8-bit scales: codes, 2 bytes a group, f16 extremes of 64 channels.
    plain = 256 * 64 // 2 + 2 * 8 * 64 + 2 * 2 * 64
    assert tile_bytes(side_config(GearConfig(rotate_k=True), "k", 64)) == plain
    # The weights of the channels, 4 bits each, fill up to 64 bytes.
    assert tile_bytes(side_config(GearConfig(), "k", 64)) == plain + 64
    # V, one group a token: codes, 2 bytes a token, one pair of extremes, each part filled up to 16 bytes, f16 means; the whole to 64.
    assert tile_bytes(side_config(GearConfig(), "v", 64)) == 256 * 64 // 2 + 2 * 256 + 2 * 16 + 2 * 64 + 32
    # A place among more than 256 channels takes two bytes: round(0.01 * 512) = 5 at either end of 256 tokens.
    outliers = replace(PLAIN, sparsity=0.02)
    assert tile_bytes(side_config(outliers, "v", 512)) == tile_bytes(side_config(PLAIN, "v", 512)) + 256 * 10 * 4
    # The paper's 2 bits: f16 scales, r = 4 in 8 bits with f32 sigmas, S: round(0.01 * 256) = 3 at either end of 64 channels.
    paper = PRESETS["gear-paper2"]
    assert tile_bytes(side_config(paper, "k", 64)) == 256 * 64 // 4 + 4 * 4 * 64 + 16 + 4 * (256 + 64) + 64 * 6 * 3 + 48


def test_same_backbone_as_round_to_nearest_on_a_grid():
    # Values that are whole multiples of the step within every group come back exactly from either.
    x = torch.arange(16.0).repeat(4)[:, None].expand(64, 32).contiguous()
    config = replace(PLAIN, scale_bits=16, group_k=32, tile=64)
    assert torch.equal(gear_tile(x, "k", config).xhat, x)
    assert torch.equal(round_to_nearest(x, 4, -2, 32).xhat, x)


def test_bad_input_is_refused():
    x = torch.zeros(256, 64)
    with pytest.raises(ConfigError):
        gear_tile(x[:100], "k", GearConfig())
    with pytest.raises(ConfigError):
        gear_tile(x, "k", GearConfig(bits_k=16))
    with pytest.raises(ConfigError):
        gear_tile(x, "k", GearConfig(bits_k=9))
    with pytest.raises(ConfigError):
        gear_tile(x, "x", GearConfig())
    with pytest.raises(UnsupportedError):
        gear_tile(torch.zeros(256, 40), "k", GearConfig())
    with pytest.raises(UnsupportedError, match="a multiple of 16 channels from 32 to 576, not 592"):
        gear_tile(torch.zeros(256, 592), "k", GearConfig())
