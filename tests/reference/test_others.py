"""DecoQuant, KVQuant, CQ, H2O and RoPE: published invariants, hand-computed cases, byte counts."""

import math

import pytest

torch = pytest.importorskip("torch", reason="gearcpp.reference needs PyTorch")

from gearcpp.errors import ConfigError  # noqa: E402
from gearcpp.reference.methods.cq import cq, learn_codebooks  # noqa: E402
from gearcpp.reference.methods.decoquant import decoquant, matrix_product  # noqa: E402
from gearcpp.reference.methods.h2o import attend, h2o  # noqa: E402
from gearcpp.reference.methods.kvquant import Levels, calibrate, kvquant_keys, kvquant_values, nonuniform_levels  # noqa: E402
from gearcpp.reference.methods.rope import Rope  # noqa: E402

# --- DecoQuant ---


def test_matrix_product_is_exact_and_evenly_split(rng):
    x = torch.randn(2, 50, 64, generator=rng, dtype=torch.float64)
    product = matrix_product(x)
    assert product.t_large.numel() == x.numel()
    assert product.t_small.shape == (2, 16, 16)
    torch.testing.assert_close((product.t_large @ product.t_small).reshape(x.shape), x)
    singular = torch.linalg.svdvals(x.reshape(2, -1, 16))
    torch.testing.assert_close(product.t_large.norm(dim=-2), singular.sqrt())
    torch.testing.assert_close(product.t_small.norm(dim=-1), singular.sqrt())


def test_decoquant_bytes_are_the_published_ratio():
    # 4/16 + 1/D + 256 / (t D) of f16: 25.03 % at D = 4096, t = 1000.
    x = torch.randn(1000, 4096, generator=torch.Generator().manual_seed(1))
    coded = decoquant(x, 4)
    assert coded.n_bytes == 1000 * 4096 // 2 + 2 * 1000 + 2 * 256
    assert coded.bits_per_element / 16 == pytest.approx(0.2503, abs=5e-5)


def test_decoquant_error_falls_with_bits_and_few_rows_work(rng):
    x = torch.randn(128, 64, generator=rng)
    errors = [(decoquant(x, bits).xhat - x).square().mean().item() for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3
    few = torch.randn(1, 32, generator=rng)
    assert (decoquant(few, 8).xhat - few).abs().max() < 0.05
    assert torch.equal(decoquant(torch.zeros(4, 32), 4).xhat, torch.zeros(4, 32))
    with pytest.raises(ConfigError):
        decoquant(torch.zeros(4, 40), 4)


# --- KVQuant ---


def test_levels_of_separate_clusters_are_their_weighted_means():
    x = torch.tensor([-1.0, -0.9, 0.5, 0.7, 0.7, 1.0])
    weight = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    levels = nonuniform_levels(x, 1, weight)
    torch.testing.assert_close(levels.encode, torch.tensor([(-1.0 - 2.7) / 4, 2.9 / 4]))


def test_levels_are_no_worse_than_uniform_ones(rng):
    x = torch.randn(20000, generator=rng).clamp(-3, 3) / 3
    for bits in (2, 3, 4):
        learned = nonuniform_levels(x, bits)
        grid = torch.linspace(-1, 1, 2**bits)
        assert (learned(x) - x).square().mean() < 0.8 * (Levels(grid, grid)(x) - x).square().mean()


def test_q_norm_restores_mean_and_deviation(rng):
    x = torch.randn(20000, generator=rng).clamp(-3, 3) / 3 + 0.1
    plain, matched = nonuniform_levels(x, 2)(x), nonuniform_levels(x, 2, q_norm=True)(x)
    assert plain.std() < 0.97 * x.std()
    torch.testing.assert_close(matched.std(), x.std(), rtol=1e-3, atol=0)
    torch.testing.assert_close(matched.mean(), x.mean(), rtol=1e-3, atol=1e-4)


def test_kvquant_keeps_outliers_and_counts_them(rng):
    keys, values = torch.randn(2, 1000, 128, generator=rng), torch.randn(2, 1000, 128, generator=rng)
    tables = calibrate(keys, values, 3, sparsity=0.02)
    assert tables.low.shape == (2, 1, 128)
    x = keys[0, :200].half().float().clone()
    x[3, 5] = 50.0
    coded = kvquant_keys(x, tables.head(0))
    outside = (x < tables.low[0]) | (x > tables.high[0])
    assert outside[3, 5]
    assert outside.float().mean() == pytest.approx(0.02, abs=0.006)
    assert torch.equal(coded.xhat[outside], x[outside])
    assert coded.n_bytes == 200 * 128 * 3 // 8 + 4 * int(outside.sum())
    # V: the quantiles 0.01 and 0.99 of 128 entries leave out two at either end of each token.
    coded = kvquant_values(values[1], tables.head(1))
    assert coded.n_bytes == 1000 * 128 * 3 // 8 + 4 * 1000 * 4 + 4 * 1000
    assert (coded.xhat - values[1]).square().mean() < 0.05


def test_kvquant_value_range_is_that_of_the_token_without_its_outliers():
    grid = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    tables = calibrate(torch.randn(64, 8, generator=torch.Generator().manual_seed(2)), grid.repeat(16, 1), 2, sparsity=0.0)
    token = torch.tensor([[4.0, 6.0, 8.0, 10.0]])
    torch.testing.assert_close(kvquant_values(token, tables).xhat, token)


# --- CQ ---


def test_cq_returns_centroids_and_counts_codes(rng):
    x = torch.randn(600, 16, generator=rng)
    codebooks = learn_codebooks(x, 4, 6)
    assert codebooks.shape == (4, 64, 4)
    coded = cq(x[None], codebooks)
    assert coded.xhat.shape == (1, 600, 16)
    assert coded.n_bytes == 600 * 4 * 6 // 8
    chosen = coded.xhat[0].unflatten(-1, (4, 4))
    for group in range(4):
        distance = torch.cdist(x.unflatten(-1, (4, 4))[:, group], codebooks[group])
        assert torch.equal(chosen[:, group], codebooks[group][distance.argmin(-1)])


def test_cq_of_as_many_points_as_centroids_is_exact(rng):
    x = torch.randn(16, 8, generator=rng)
    torch.testing.assert_close(cq(x, learn_codebooks(x, 2, 4)).xhat, x)


def test_coupling_beats_separate_codes_when_channels_depend_on_each_other(rng):
    first = torch.randn(2000, 1, generator=rng)
    x = torch.cat([first, first + 0.1 * torch.randn(2000, 1, generator=rng)], dim=-1)
    coupled = cq(x, learn_codebooks(x, 2, 4)).xhat  # 2 bits a value
    separate = cq(x, learn_codebooks(x, 1, 2)).xhat
    assert (coupled - x).square().mean() < 0.6 * (separate - x).square().mean()


# --- H2O ---


def test_h2o_keeps_the_recent_and_the_heaviest():
    attention = torch.tensor([[0.5, 0.1, 0.3, 0.0, 0.1, 0.0], [0.4, 0.2, 0.1, 0.1, 0.1, 0.1]])
    kept = h2o(attention, n_heavy=2, n_recent=2, d_head=64)
    assert kept.keep.tolist() == [True, False, True, False, True, True]
    assert kept.n_bytes == 4 * 64 * 2 * 2


def test_h2o_attention_ignores_what_was_dropped(rng):
    q, k, v = (torch.randn(2, n, 16, generator=rng) for n in (3, 10, 10))
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[:, 4:7] = False
    expected = (q @ k[:, keep[0]].transpose(-1, -2) / 4).softmax(-1) @ v[:, keep[0]]
    torch.testing.assert_close(attend(q, k, v, keep), expected)
    with pytest.raises(ConfigError):
        h2o(torch.ones(2, 10), 9, 2, 16)


# --- RoPE ---


@pytest.mark.parametrize("pairs", ["split", "adjacent"])
@pytest.mark.parametrize("n_rotated", [None, 32])
def test_rope_is_undone(pairs, n_rotated, rng):
    rope = Rope(pairs=pairs, n_rotated=n_rotated)
    x = torch.randn(2, 50, 64, generator=rng)
    positions = torch.randint(0, 32768, (50,), generator=rng)
    turned = rope.apply(x, positions)
    assert (turned - x).abs().max() > 1
    torch.testing.assert_close(rope.undo(turned, positions), x, rtol=0, atol=1e-5)
    if n_rotated:
        assert torch.equal(turned[..., 32:], x[..., 32:])


def test_rope_by_hand():
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    split = Rope(theta=100.0).apply(x, torch.tensor([2]))
    # Pairs (0, 2) and (1, 3) turn by 2 and 2 * 100^(-1/2) = 0.2.
    torch.testing.assert_close(split, torch.tensor([[math.cos(2), -math.sin(0.2), math.sin(2), math.cos(0.2)]]))
    adjacent = Rope(theta=100.0, pairs="adjacent").apply(x, torch.tensor([2]))
    torch.testing.assert_close(adjacent, torch.tensor([[math.cos(2), math.sin(2), -math.sin(0.2), math.cos(0.2)]]))
