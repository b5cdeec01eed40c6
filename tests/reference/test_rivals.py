"""The rivals: ggml's quantizers bit for bit, pinned codebooks, variance balance, byte counts."""

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="gearcpp.reference needs PyTorch")

from gearcpp.cache.kv_type import LLAMA_CACHE_TYPES  # noqa: E402
from gearcpp.errors import ConfigError  # noqa: E402
from gearcpp.reference.methods.rivals import (  # noqa: E402
    GGML_TYPES,
    balance_variance,
    exllamav3,
    ggml_quantize,
    kvarn,
    llama_cpp,
    lloyd_max,
    turboquant,
)
from gearcpp.reference.methods.tensors import hadamard, half  # noqa: E402


def rows(rng):
    """[6, 96]: ordinary, tiny, large, constant, zero, and with a tie of magnitudes"""
    x = torch.randn(6, 96, generator=rng)
    x[1] *= 1e-6
    x[2] *= 1e3
    x[3] = -2.75
    x[4] = 0.0
    x[5, :4] = torch.tensor([3.0, -3.0, 1.5, -1.5]) * 2
    return x


@pytest.mark.parametrize("kind", GGML_TYPES)
def test_equal_to_the_quantizers_of_gguf(kind, rng):
    quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
    x = rows(rng)
    number = quants.GGMLQuantizationType[kind.upper()]
    packed = quants.quantize(x.numpy(), number)
    coded = ggml_quantize(x, kind)
    np.testing.assert_array_equal(coded.xhat.numpy(), quants.dequantize(packed, number))
    assert coded.n_bytes == packed.nbytes


@pytest.mark.parametrize("kind", GGML_TYPES)
def test_equal_to_ggml_itself(kind, rng):
    quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    found = sorted((Path(package.origin).parent / "lib").glob("libggml-base*"))
    if not found:
        pytest.skip("llama-cpp-python brings no libggml-base of its own")
    quantize = ctypes.CDLL(str(found[0])).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    x = rows(rng).numpy()
    packed = np.zeros(x.nbytes, np.uint8)
    n_bytes = quantize(LLAMA_CACHE_TYPES[kind], x.ctypes.data, packed.ctypes.data, 0, x.shape[0], x.shape[1], None)
    coded = ggml_quantize(torch.from_numpy(x), kind)
    assert coded.n_bytes == n_bytes
    packed = packed[:n_bytes].reshape(x.shape[0], -1)
    np.testing.assert_array_equal(coded.xhat.numpy(), quants.dequantize(packed, quants.GGMLQuantizationType[kind.upper()]))


def test_rotation_is_of_llama_cpps_sizes(rng):
    x = torch.randn(4, 128, generator=rng)
    assert torch.equal(llama_cpp(x, "k", "q4_0").xhat, hadamard(ggml_quantize(hadamard(x, 128), "q4_0").xhat, 128))
    assert torch.equal(llama_cpp(x, "v", "q4_0").xhat, hadamard(ggml_quantize(hadamard(x, 64), "q4_0").xhat, 64))
    x = torch.randn(4, 192, generator=rng)
    assert torch.equal(llama_cpp(x, "k", "q4_0").xhat, hadamard(ggml_quantize(hadamard(x, 64), "q4_0").xhat, 64))
    x = torch.randn(4, 96, generator=rng)  # not a multiple of 64: llama.cpp does not rotate
    assert torch.equal(llama_cpp(x, "k", "q4_0").xhat, ggml_quantize(x, "q4_0").xhat)
    assert torch.equal(llama_cpp(x, "k", "q4_0", rotate=False).xhat, ggml_quantize(x, "q4_0").xhat)


def test_rotation_spreads_an_outlier(rng):
    x = torch.randn(64, 64, generator=rng)
    x[:, 7] = 60.0
    with_rotation, without = ((llama_cpp(x, "k", "q4_0", rotate).xhat - x).square().mean() for rotate in (True, False))
    assert with_rotation < without / 3


@pytest.mark.parametrize(
    ("bits", "positive"),
    [  # Max, Quantizing for minimum distortion (1960), table I
        (1, [0.7980]),
        (2, [0.4528, 1.510]),
        (3, [0.2451, 0.7560, 1.344, 2.152]),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
    ],
)
def test_lloyd_max_levels_are_those_of_max(bits, positive):
    levels = lloyd_max(bits)
    assert levels[len(positive) :] == pytest.approx(positive, rel=4e-4)
    assert levels[: len(positive)] == pytest.approx([-level for level in reversed(positive)], rel=4e-4)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_turboquant_reaches_the_distortion_of_max(bits, distortion, rng):
    x = torch.randn(400, 128, generator=rng)
    x = x / x.norm(dim=-1, keepdim=True) * 7
    coded = turboquant(x, bits, norm_correction=False)
    assert ((coded.xhat - x).square().sum() / x.square().sum()).item() == pytest.approx(distortion, rel=0.03)
    assert coded.n_bytes == 400 * (128 * bits // 8 + 2)


def test_norm_correction_keeps_the_norm(rng):
    x = torch.randn(50, 64, generator=rng) * torch.logspace(-2, 2, 50)[:, None]
    x[0] = 0.0
    torch.testing.assert_close(turboquant(x, 2).xhat.norm(dim=-1), half(x.norm(dim=-1, keepdim=True)).squeeze(-1))
    assert torch.equal(turboquant(x, 2).xhat[0], torch.zeros(64))


def test_variance_is_balanced_on_both_axes(rng):
    # Large, because the published limits let no scale fall below exp(-0.3): weak rows are not raised, strong ones are lowered.
    x = 1000 * torch.randn(3, 64, 128, generator=rng) * torch.logspace(0, 1.5, 128) * torch.logspace(1.5, 0, 64)[:, None]
    scale = balance_variance(x)
    balanced = x / scale.row / scale.column
    for axis in (-1, -2):
        deviation = balanced.std(axis)
        assert (deviation.amax(-1) / deviation.amin(-1) < 1.3).all()
        plain = x.std(axis)
        assert (plain.amax(-1) / plain.amin(-1) > 10).all()


@pytest.mark.parametrize("side", ["k", "v"])
def test_kvarn_bytes_and_error(side, rng):
    x = torch.randn(2, 128, 64, generator=rng) * torch.logspace(0.5, 1.5, 128)[:, None]
    coded = kvarn(x, side, 4)
    n_scale = 2 * 64 + 128 if side == "k" else 64 + 2 * 128
    assert coded.n_bytes == 2 * (128 * 64 // 2 + 2 * n_scale)
    assert (coded.xhat - x).square().sum() / x.square().sum() < 0.02
    # The balance is worth it where tokens differ in size: without iterations K's error is larger.
    if side == "k":
        assert (coded.xhat - x).square().sum() < 0.7 * (kvarn(x, "k", 4, iterations=0).xhat - x).square().sum()
    assert torch.isfinite(kvarn(x[:, :1], side, 4).xhat).all()  # a tile with a single token
    assert (kvarn(torch.zeros(8, 64), side, 2).xhat == 0).all()


def test_exllamav3_levels_lie_in_the_middle_of_cells():
    # One entry of a group: its Hadamard transform is 1 / sqrt(32) everywhere with signs, that is +-1 of the scale: the outermost levels +-0.75 at 2 bits.
    x = torch.zeros(1, 32)
    x[0, 0] = 2.0
    coded = exllamav3(x, 2)
    scale = torch.tensor(2.0 / 32**0.5).half().item()
    assert coded.xhat[0, 0].item() == pytest.approx(0.75 * scale * 32**0.5, rel=1e-6)
    assert coded.n_bytes == 32 * 2 // 8 + 2
    assert exllamav3(torch.zeros(4, 64), 4).bits_per_element == 4.5


def test_bad_input_is_refused():
    x = torch.zeros(4, 48)
    for broken in (lambda: ggml_quantize(x, "q4_0"), lambda: ggml_quantize(torch.zeros(4, 64), "q2_k"), lambda: exllamav3(x, 4), lambda: turboquant(x, 3)):
        with pytest.raises(ConfigError):
            broken()
