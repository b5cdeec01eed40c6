"""Calibration on a real model: RoPE as llama.cpp turns it, what is refused, and the methods that learn from it."""

from dataclasses import replace

import llama_cpp
import models
import numpy as np
import pytest
from models import Shape, write_model

torch = pytest.importorskip("torch", reason="gearcpp.reference needs PyTorch")

from gearcpp import ConfigError, DataError, UnsupportedError, normalize_kv_type, read_model_info, reference  # noqa: E402
from gearcpp.evaluation import calibration  # noqa: E402
from gearcpp.reference.methods.rope import Rope  # noqa: E402

NORM, NEOX = llama_cpp.LLAMA_ROPE_TYPE_NORM, llama_cpp.LLAMA_ROPE_TYPE_NEOX


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"Chapter {i}. It was a dark night, and the {i % 7} ships lay still." for i in range(120)))
    return file


def test_keys_of_the_bundled_model_are_recorded_before_rope(bundled_model, text):
    text.write_text(text.read_text() * 3)
    recorder = reference.record(bundled_model, text, n_token=300, n_chunk=2, n_threads=1)
    info = read_model_info(bundled_model)
    assert recorder.rope == Rope(info.metadata["llama.rope.freq_base"], "adjacent", 64)
    assert recorder.layers() == [layer.il for layer in info.layers]
    # 300 of 4096 tokens are 19 of a tile of 256; of each chunk the last ones stay exact.
    assert recorder.n_token == 2 * 7 * 19
    assert recorder.source == "266 tokens of each head, out of 2 chunks of 2048 of text.txt"
    for side in ("k", "v"):
        rows = recorder.rows(side, 0)
        assert rows.shape == (2, 266, 64)
        assert rows.isfinite().all() and rows.std() > 0.01


# What keeps the self-check honest: it is llama.cpp that turns the keys here.
SCALED = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("family", "shape", "n_rotated", "factors", "scaling", "expected"),
    [
        ("llama", Shape(), 64, None, {}, Rope(10000.0, "adjacent", 64)),
        ("gemma2", Shape(), 64, None, {}, Rope(10000.0, "split", 64)),
        ("llama", Shape(), 64, range(1, 33), {}, Rope(10000.0, "adjacent", 64, tuple(map(float, range(1, 33))))),
        ("llama", Shape(), 64, None, SCALED, Rope(10000.0, "adjacent", 64, (4.0,) * 32)),
        ("mpt", Shape(n_head=2, n_head_kv=2, n_embd=128), None, None, {}, None),
    ],
)
def test_rope_of_each_kind_is_undone(family, shape, n_rotated, factors, scaling, expected, text, tmp_path, monkeypatch):
    add_keys = models._add_family_keys

    def add(writer, *arguments):
        add_keys(writer, *arguments)
        if n_rotated:
            writer.kv_data[-1].pop(f"{family}.rope.dimension_count", None)
            writer.add_rope_dimension_count(n_rotated)
        for key, value in scaling.items():
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
        if factors:
            writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))

    monkeypatch.setattr(models, "_add_family_keys", add)
    model = write_model(tmp_path / "model.gguf", family, shape)
    recorder = reference.record(model, text, n_chunk=1, n_threads=1)
    assert recorder.rope == expected
    assert recorder.n_token > 256


@pytest.mark.parametrize("wrong", [Rope(10000.0, "split", 64), Rope(20000.0, "adjacent", 64), Rope(10000.0, "adjacent", 32)])
def test_a_rope_that_is_not_the_models_is_noticed(random_model, text, wrong, monkeypatch):
    monkeypatch.setattr(calibration, "rope_of", lambda info, kind: wrong)
    with pytest.raises(UnsupportedError, match="layer 0 are not turned in the way that its metadata say"):
        reference.record(random_model(), text, n_chunk=1, n_threads=1)


def test_a_rope_on_the_last_channels_is_noticed(random_model, text):
    """MiniCPM3 turns the last 32 channels, which no key of its metadata says."""
    with pytest.raises(UnsupportedError, match=r"minicpm3 model: the keys of layer 0 are not turned"):
        reference.record(random_model("minicpm3", Shape(n_head_kv=4)), text, n_chunk=1, n_threads=1)


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"llama.rope.scaling.type": "yarn"}, NORM, "scaled by yarn"),
        ({"llama.rope.scaling.type": "longrope"}, NEOX, "scaled by longrope"),
        ({"llama.rope.scaling.attn_factor": 1.2}, NORM, "scales the keys"),
        ({}, llama_cpp.LLAMA_ROPE_TYPE_MROPE, "order of its own"),
    ],
)
def test_rope_that_cannot_be_undone_is_refused(random_model, changes, kind, reason):
    info = read_model_info(random_model())
    with pytest.raises(UnsupportedError, match=reason):
        calibration.rope_of(replace(info, metadata={**info.metadata, **changes}), kind)


def test_texts_and_numbers_that_cannot_be_used(random_model, text, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(DataError, match="too few to calibrate on"):
        reference.record(random_model(), tmp_path / "short.txt")
    with pytest.raises(DataError, match="No such file"):
        reference.record(random_model(), tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="1 or more"):
        reference.record(random_model(), text, n_chunk=0)


def test_calibrated_methods_code_what_they_learned_from(random_model, text):
    """On its own calibration tokens CQ at 3 bits a number is far below the variance, and KVQuant with more bits is better than with less."""
    recorder = reference.record(random_model(), text, n_token=600, n_chunk=1, n_threads=1)
    positions = np.arange(256, 512)
    before = recorder.rows("k", 1)[0, :256]
    keys = recorder.rope.apply(before, torch.from_numpy(positions)).numpy()

    def error(name):
        method = normalize_kv_type(f"sim:{name}", recorder=recorder).method
        return np.square(method("k", keys, None, positions, layer=1, head=0)[0] - keys).mean() / np.square(keys).mean()

    errors = [error(name) for name in ("kvquant5", "kvquant4", "kvquant3", "kvquant2")]
    assert errors == sorted(errors)
    assert errors[0] < 0.003
    assert 1e-4 < error("cq-2c6b") < 0.1
