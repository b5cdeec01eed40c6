"""GEAR as published: the checklist of what the released code gets wrong, and hand-counted bytes."""

import pytest

torch = pytest.importorskip("torch", reason="gearcpp.reference needs PyTorch")

from gearcpp.errors import ConfigError  # noqa: E402
from gearcpp.reference.methods.gear import (  # noqa: E402
    fill_outliers,
    gear,
    gear_l,
    gear_v1,
    low_rank,
    outlier_bytes,
    outlier_mask,
    outlier_reduced,
    outliers_per_side,
)
from gearcpp.reference.methods.quantizers import kcvt, kivi, per_token, round_to_nearest  # noqa: E402

SIDES = ("k", "v")


def squared_error(x, coded):
    """[...] of each matrix"""
    return (coded.xhat - x).square().sum((-1, -2))


@pytest.mark.parametrize("length", [20, 64, 100, 128, 256, 1024])
@pytest.mark.parametrize("sparsity", [0.02, 0.05, 0.25])
@pytest.mark.parametrize("axis", [-1, -2])
def test_outlier_share_on_both_axes_at_every_length(length, sparsity, axis, rng):
    shape = (2, 48, length) if axis == -1 else (2, length, 48)
    x = torch.randn(shape, generator=rng)
    mask = outlier_mask(x, sparsity, axis)
    count = outliers_per_side(sparsity, length)
    assert count == int(sparsity / 2 * length + 0.5)
    assert (mask.sum(axis) == 2 * count).all()
    highest = x.masked_fill(mask, -torch.inf).amax(axis, keepdim=True)
    lowest = x.masked_fill(mask, torch.inf).amin(axis, keepdim=True)
    assert ((x >= highest) | (x <= lowest) | ~mask).all()


def test_outliers_are_signed_not_by_magnitude():
    x = torch.tensor([[1.0, 50.0, 60.0, 2.0, 3.0]])
    assert outlier_mask(x, 0.4, -1).tolist() == [[True, False, True, False, False]]


def test_fills_by_hand():
    x = torch.tensor([[100.0, 1.0, 2.0, 6.0, -100.0]])
    mask = torch.tensor([[True, False, False, False, True]])
    assert fill_outliers(x, mask, -1, "mean").tolist() == [[3.0, 1.0, 2.0, 6.0, 3.0]]
    assert fill_outliers(x, mask, -1, "middle").tolist() == [[3.5, 1.0, 2.0, 6.0, 3.5]]
    assert fill_outliers(x, mask, -1, "zero").tolist() == [[0.0, 1.0, 2.0, 6.0, 0.0]]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("backbone", "plain"), [("kivi", kivi), ("kcvt", kcvt), ("per-token", None)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_terms_it_is_its_backbone_bit_for_bit(side, backbone, plain, bits, rng):
    x = torch.randn(3, 128, 64, generator=rng)
    expected = per_token(x, bits, 64) if plain is None else plain(x, side, bits)
    coded = gear(x, side, bits, backbone=backbone, rank=0, sparsity=0.0)
    assert torch.equal(coded.xhat, expected.xhat)
    assert coded.n_bytes == expected.n_bytes


def test_three_bits_have_eight_levels():
    x = torch.linspace(-1, 1, 4096).reshape(1, 4096)
    assert len(gear(x, "v", 3, backbone="kcvt", rank=0, sparsity=0.0).xhat.unique()) == 8


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", [2, 4])
def test_low_rank_helps_every_item_and_head(side, bits, rng):
    # The released kernel uses item 0's basis for the whole batch: items with different subspaces would get worse.
    n_item, n_head, n, d = 3, 2, 128, 32
    common = torch.randn(n_item, n_head, n, 4, generator=rng) @ torch.randn(n_item, n_head, 4, d, generator=rng)
    x = (common + 0.1 * torch.randn(n_item, n_head, n, d, generator=rng)).transpose(1, 2).flatten(-2)  # [item, n, head * d]
    plain = gear(x, side, bits, rank=0, sparsity=0.0, n_head=n_head)
    helped = gear_l(x, side, bits, rank=4, n_head=n_head)
    errors = [(coded.xhat - x).unflatten(-1, (n_head, d)).square().sum((1, 3)) for coded in (plain, helped)]  # [item, head]
    assert (errors[1] < errors[0]).all()
    alone = torch.stack([gear_l(item, side, bits, rank=4, n_head=n_head).xhat for item in x])
    torch.testing.assert_close(helped.xhat, alone)


def test_heads_have_their_own_low_rank_model(rng):
    x = torch.randn(100, 3 * 32, generator=rng)
    together = gear(x, "v", 4, backbone="kivi", group=32, rank=2, sparsity=0.0, n_head=3)
    alone = torch.cat([gear(head, "v", 4, backbone="kivi", group=32, rank=2, sparsity=0.0).xhat for head in x.split(32, -1)], dim=-1)
    torch.testing.assert_close(together.xhat, alone)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_power_iteration_takes_nearly_the_energy_of_the_exact_svd(rank, rng):
    n, d = 256, 64
    spectrum = torch.cat([torch.linspace(20, 10, rank), torch.linspace(4, 1, d - rank)])
    left = torch.linalg.qr(torch.randn(n, d, generator=rng)).Q
    right = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q
    residual = left * spectrum @ right.T
    best = spectrum[:rank].square().sum()
    for loops, share in [(3, 0.9), (8, 0.999)]:
        found = low_rank(residual, rank, loops).product.square().sum()
        assert share * best <= found <= best * 1.0001


def test_three_loops_are_nearly_the_exact_svd_for_every_head_of_every_item(rng):
    # The released kernel, given a batch, has a relative error of 0.15 on item 0 and 0.997 on the others.
    residual = torch.randn(3, 4, 256, 4, generator=rng) @ torch.randn(3, 4, 4, 64, generator=rng) + 0.3 * torch.randn(3, 4, 256, 64, generator=rng)
    u, s, vt = torch.linalg.svd(residual, full_matrices=False)
    best = (u[..., :4] * s[..., None, :4]) @ vt[..., :4, :]
    size = residual.norm(dim=(-2, -1))
    found, exact = ((residual - model).norm(dim=(-2, -1)) / size for model in (low_rank(residual, 4).product, best))
    assert (exact < 0.2).all()
    assert (found < 1.005 * exact).all()


def test_low_rank_has_a_fixed_start_and_works_in_float32(rng):
    residual = torch.randn(2, 64, 32, generator=rng)
    first, again, other = low_rank(residual, 4), low_rank(residual, 4), low_rank(residual, 4, seed=2)
    assert torch.equal(first.a, again.a) and torch.equal(first.b, again.b)
    assert not torch.equal(first.a, other.a)
    assert first.a.dtype == first.b.dtype == torch.float32
    assert gear(residual.half(), "k", 2).xhat.dtype == torch.float32


# Bits per element of f16 factors, r (d + n) / (d n) of f16's 16.
@pytest.mark.parametrize(
    ("n", "rank", "d", "bits"),
    [(20, 2, 128, 1.85), (64, 2, 128, 0.75), (128, 2, 128, 0.50), (256, 2, 64, 0.62), (128, 4, 64, 1.50), (256, 4, 128, 0.75), (1000, 4, 128, 0.56)],
)
def test_what_the_factors_of_a_chunk_cost(n, rank, d, bits):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    with_l, without = (gear_l(x, "k", 2, rank=r).n_bytes for r in (rank, 0))
    assert with_l - without == 2 * rank * (n + d)
    assert 8 * (with_l - without) / x.numel() == pytest.approx(bits, abs=0.006)


@pytest.mark.parametrize(("length", "n_bytes"), [(64, 3), (256, 3), (257, 4), (65536, 4), (65537, 6)])
def test_an_outlier_takes_its_value_and_the_least_index(length, n_bytes):
    assert outlier_bytes(1, length) == n_bytes
    assert outlier_bytes(10, length) == 10 * n_bytes


def test_two_percent_of_outliers_in_a_tile_cost_half_a_bit():
    # 24 bits for each of 2 % is 0.48; of 256 tokens round(2.56) = 3 are kept at either end.
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    with_s, without = (gear(x, "k", 4, rank=0, sparsity=s).n_bytes for s in (0.02, 0.0))
    assert with_s - without == 64 * 6 * 3
    assert 8 * (with_s - without) / x.numel() == pytest.approx(0.5625)


@pytest.mark.parametrize("fill", ["mean", "middle", "zero"])
@pytest.mark.parametrize("side", SIDES)
def test_every_fill_narrows_the_groups_and_keeps_the_outliers(fill, side, rng):
    x = torch.randn(128, 64, generator=rng)
    x[::40, ::9] *= 50
    x = x.half().float()
    mask = outlier_mask(x, 0.1, -2 if side == "k" else -1)
    coded = gear(x, side, 2, rank=0, sparsity=0.1, fill=fill)
    assert torch.equal(coded.xhat[mask], x[mask])
    rest = (coded.xhat - x)[~mask].square().mean()
    assert rest < (gear(x, side, 2, rank=0, sparsity=0.0).xhat - x)[~mask].square().mean() / 4


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("n", [20, 64, 100, 256, 1000])
def test_the_share_of_exact_entries_is_s_at_every_length(side, n, rng):
    """The released code takes K's count from the hidden size: of a 64-token chunk of LLaMA2-7B it keeps everything."""
    x = torch.randn(n, 128, generator=rng)
    length = n if side == "k" else 128
    share = 2 * outliers_per_side(0.02, length) / length
    coded = gear(x, side, 2, backbone="kcvt")
    assert abs(share - 0.02) <= 1 / length
    # A group's extremes come back nearly exactly, too, but L moves them.
    assert (coded.xhat == x.half().float()).float().mean() == pytest.approx(share, abs=0.002)


def test_exact_low_rank_matrix_is_found_exactly(rng):
    residual = torch.randn(5, 100, 3, generator=rng) @ torch.randn(5, 3, 32, generator=rng)
    torch.testing.assert_close(low_rank(residual, 3).product, residual, rtol=1e-4, atol=1e-4)
    orthonormal = low_rank(residual, 3).a
    torch.testing.assert_close(orthonormal.transpose(-1, -2) @ orthonormal, torch.eye(3).expand(5, 3, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_outliers_come_back_exactly(side, rng):
    x = torch.randn(64, 64, generator=rng).half().float()
    x[5, 7], x[40, 50] = 1000.0, -2000.0
    coded = gear(x, side, 2, rank=0)
    mask = outlier_mask(x, 0.02, -2 if side == "k" else -1)
    assert mask[5, 7]
    assert mask[40, 50]
    assert torch.equal(coded.xhat[mask], x[mask])
    assert squared_error(x, coded) < squared_error(x, gear_l(x, side, 2, rank=0)) / 2


def test_every_row_is_really_compressed(rng):
    # In the released SDPA path a prompt's compressed keys are never written back; in its K path with S a 64-token chunk comes back bit-exact.
    x = torch.randn(64, 64, generator=rng)
    exact = (gear(x, "k", 2).xhat == x.half().float()).float().mean(-1)
    assert (exact < 0.2).all()


def test_rounds_do_not_increase_the_error(rng):
    x = torch.randn(4, 128, 64, generator=rng) + torch.randn(4, 128, 2, generator=rng) @ torch.randn(4, 2, 64, generator=rng) * 3
    once = squared_error(x, gear_l(x, "k", 2, rank=4))
    thrice = squared_error(x, gear_l(x, "k", 2, rank=4, rounds=3))
    assert (thrice < once).all()


def test_bytes_by_hand():
    x = torch.randn(2, 128, 3 * 64, generator=torch.Generator().manual_seed(1))
    # KCVT at 4 bits: codes, and an f16 pair for each of 192 channels. L: r (n + d_head) f16 for 2 x 3 heads. S of K: round(0.01 * 128) = 1 at
    # either end of 192 channels, f16 and one byte of index each.
    assert gear(x, "k", 4, n_head=3).n_bytes == 2 * (128 * 192 // 2 + 192 * 4) + 6 * 4 * (128 + 64) * 2 + 2 * 192 * 2 * 3
    # KIVI at 2 bits, V: 3 groups of 64 a token; S of V: round(0.01 * 192) = 2 at either end of 128 tokens.
    assert gear(x, "v", 2, n_head=3).n_bytes == 2 * (128 * 192 // 4 + 128 * 3 * 4) + 6 * 4 * (128 + 64) * 2 + 2 * 128 * 4 * 3
    # v1: one pair for the matrix, r = int(0.02 * 128) = 2, S: round(0.01 * 24576) = 246 at either end, two bytes of index.
    assert gear_v1(x, 4).n_bytes == 2 * (128 * 192 // 2 + 4 + 2 * (128 + 192) * 2 + 2 * 246 * 4)
    assert outlier_reduced(x, 4).n_bytes == 2 * (128 * 192 // 2 + 4 + 2 * 246 * 4)


def test_first_version_quantizes_the_whole_matrix(rng):
    x = torch.randn(3, 64, 32, generator=rng)
    coded = outlier_reduced(x, 4, sparsity=0.0)
    assert torch.equal(coded.xhat, round_to_nearest(x.flatten(1).unsqueeze(1), 4, -1).xhat.reshape(x.shape))
    x[1, 3, 4] = 1e4  # only item 1's range grows, and S takes it out again
    assert torch.equal(outlier_reduced(x, 4, sparsity=0.0).xhat[[0, 2]], coded.xhat[[0, 2]])
    assert squared_error(x, outlier_reduced(x, 4))[1] < squared_error(x, outlier_reduced(x, 4, sparsity=0.0))[1] / 100
    assert (squared_error(x, gear_v1(x, 4)) < squared_error(x, outlier_reduced(x, 4))).all()


def test_bad_input_is_refused():
    x = torch.zeros(64, 64)
    for broken in (
        lambda: gear(x, "k", 4, backbone="nf4"),
        lambda: gear(x, "k", 4, rank=65),
        lambda: gear(x, "k", 4, sparsity=1.0),
        lambda: gear(x, "k", 4, n_head=3),
        lambda: gear(x, "k", 4, rounds=0),
        lambda: gear(x, "k", 4, fill="median"),
        lambda: gear_v1(x, 4, rank_share=2.0),
    ):
        with pytest.raises(ConfigError):
            broken()
