"""Our files and those of llama.cpp's own converter: the same tensors to the byte, the same metadata, but for what is listed here.

Needs llama.cpp's sources, which come with llama-cpp-python's sdist (vendor/llama.cpp): name the folder in GEARCPP_LLAMA_CPP_SOURCE.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gearcpp.convert import convert_model
from samples import SAMPLES, save_mxfp4, save_sample, sentencepiece

SOURCE = os.environ.get("GEARCPP_LLAMA_CPP_SOURCE", "")
if not SOURCE:
    pytest.skip("GEARCPP_LLAMA_CPP_SOURCE does not name llama.cpp's sources", allow_module_level=True)
pytest.importorskip("transformers", reason="llama.cpp's converter needs transformers")
pytest.importorskip("torch", reason="llama.cpp's converter needs torch")

# It reads these only with tokenizer.model.
NEEDS_MODEL = {"gemma-2": False, "gemma-3": False, "gemma-4": False, "gemma-4-moe": False, "phi-3": True, "ernie-4.5": True}
# It takes a Phi-3 without tokenizer.model for a GPT-2 tokenizer, if told so.
AS_GPT2 = ("phi-3-long",)

# Layers that predict further tokens are left out; it takes the option only for classes that have such.
OPTIONS = {name: ["--no-nextn"] for name in ("qwen-3-next", "qwen-3.5", "qwen-3.5-moe", "glm-4.5", "glm-4.7-flash")}

COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", ".ssm_a")  # equal to 1 ulp

# Keys that only one of the two writes, and why that is no difference.
ONLY_OURS = (
    ".attention.key_length",  # where the head size follows from the width, llama.cpp takes that
    ".attention.value_length",
    ".rope.dimension_count",  # llama.cpp's default is the head size
    ".rope.freq_base",  # llama.cpp's default is 10000, ours is written always
    ".rope.freq_base_swa",
    ".vocab_size",  # llama.cpp counts the tokens
    ".final_logit_softcapping",  # Gemma 4 without: llama.cpp's converter leaves it out, and llama.cpp takes 30 then
    ".attention.layer_norm_rms_epsilon",  # Nemotron-H: llama.cpp takes layer_norm_epsilon for it
    "tokenizer.ggml.pre",  # Gemma 4: llama.cpp goes by the tokenizer's model
    ".rope.scaling.type",  # Phi-3: llama.cpp goes by the factors
    ".attention.head_count_kv",  # GPT-2: equal to the heads
    "tokenizer.ggml.add_bos_token",  # where it leaves llama.cpp's default standing, ours says what the tokenizer's template says
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
)
# Values of SentencePiece tokenizers that differ, and why. The ids of the original decide: test_convert_tokenizers.py.
DIFFERENT = {
    # From tokenizer.json it takes -1000 for all, which makes llama.cpp join pieces in another order, from tokenizer.model the scores there; ours are the
    # merges' ranks.
    "tokenizer.ggml.scores",
    # <unk> is of type unknown in ours, and added tokens are user-defined; in its files they are control and normal.
    "tokenizer.ggml.token_type",
    # From tokenizer.json it writes fewer tokens than the embedding has rows.
    "tokenizer.ggml.tokens",
}


def _reference(name: str, folder: Path, pre: str, outtype: str) -> Path:
    output = folder / f"reference-{outtype}.gguf"
    script = Path(__file__).with_name("reference_converter.py")
    command = [sys.executable, str(script), SOURCE, pre, str(folder), str(output), outtype, *OPTIONS.get(name, [])]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return output


def _save(name: str, folder: Path) -> None:
    save_sample(name, folder, "bfloat16")
    if name in NEEDS_MODEL:
        sentencepiece(prefix=NEEDS_MODEL[name], keep_model=True)(folder)
    changes: dict[str, dict[str, Any]] = {"config.json": {"n_ctx": 256} if name == "gpt-2" else {}}
    changes["config.json"] |= _as_published(name, json.loads((folder / "config.json").read_text()))
    changes["tokenizer_config.json"] = {"tokenizer_class": "GPT2Tokenizer"} if name in AS_GPT2 else {}
    for file, values in changes.items():
        changed = {**json.loads((folder / file).read_text()), **values}
        (folder / file).write_text(json.dumps({key: value for key, value in changed.items() if value is not None or key not in values}))


def _as_published(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """What it does not understand as transformers saves it."""
    if name.startswith("granite-4"):
        return {"layer_types": ["attention" if kind == "full_attention" else "mamba" for kind in config["layer_types"]]}
    if name.startswith("nemotron"):
        letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
        pattern = "".join(letters[kind] for kind in config["layers_block_type"])
        dense = dict.fromkeys(("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group")) if name == "nemotron-h" else {}
        return {
            "hybrid_override_pattern": pattern,
            "layers_block_type": None,
            "num_hidden_layers": len(pattern),
            "model_type": "nemotron_h_published",
            **dense,
        }
    return {}


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", SAMPLES)
def test_parity(name: str, outtype: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    _save(name, folder)
    conversion = convert_model(folder, folder / "ours.gguf", outtype=outtype)
    ours = gguf.GGUFReader(folder / "ours.gguf")
    theirs = gguf.GGUFReader(_reference(name, folder, str(conversion.metadata["tokenizer.ggml.pre"]), outtype))
    _compare_tensors(ours, theirs)
    _compare_metadata(ours, theirs)


def test_parity_of_mxfp4(tmp_path: Path) -> None:
    save_sample("gpt-oss", tmp_path / "stored", "float32")
    folder = tmp_path / "packed"
    save_mxfp4(tmp_path / "stored", folder, tmp_path / "plain", seed=12)
    conversion = convert_model(folder, folder / "ours.gguf", outtype="bf16")
    ours = gguf.GGUFReader(folder / "ours.gguf")
    assert {tensor.tensor_type.name for tensor in ours.tensors} == {"MXFP4", "BF16", "F32"}
    theirs = gguf.GGUFReader(_reference("gpt-oss", folder, str(conversion.metadata["tokenizer.ggml.pre"]), "bf16"))
    _compare_tensors(ours, theirs)
    _compare_metadata(ours, theirs)


def _compare_tensors(ours: gguf.GGUFReader, theirs: gguf.GGUFReader) -> None:
    mine, reference = ({tensor.name: tensor for tensor in reader.tensors} for reader in (ours, theirs))
    assert mine.keys() == reference.keys()
    for name, tensor in mine.items():
        assert (tensor.tensor_type, list(tensor.shape)) == (reference[name].tensor_type, list(reference[name].shape)), name
        if name.endswith(COMPUTED):
            np.testing.assert_array_max_ulp(tensor.data, reference[name].data, maxulp=1)
        else:
            assert np.array_equal(tensor.data.view(np.uint8), reference[name].data.view(np.uint8)), name


def _compare_metadata(ours: gguf.GGUFReader, theirs: gguf.GGUFReader) -> None:
    mine, reference = ({key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")} for reader in (ours, theirs))
    assert {key for key in mine.keys() - reference.keys() if not key.endswith(ONLY_OURS)} == set()
    assert {key for key in reference.keys() - mine.keys() if not key.startswith("general.")} == set()
    shared = mine.keys() & reference.keys() - (DIFFERENT if mine["tokenizer.ggml.model"] in ("llama", "gemma4") else set())
    assert {key: (mine[key], reference[key]) for key in shared if mine[key] != reference[key] and not key.startswith("general.")} == {}
