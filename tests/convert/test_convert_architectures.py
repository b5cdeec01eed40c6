"""llama.cpp, given our file, computes the logits that transformers computes; and its tokens are those of transformers' tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gearcpp.convert import convert_model
from gearcpp.convert.verification import llama_tokens
from samples import N_TOKENS, NASTY_TEXT, SAMPLES, save_mxfp4, save_sample

from gearcpp.errors import DataError, UnsupportedError

torch = pytest.importorskip("torch", reason="logits are compared with those of transformers, which needs torch")
transformers = pytest.importorskip("transformers", reason="logits are compared with those of transformers, which is not installed")

# llama.cpp's CPU code looks GELU up in a table of f16. Where six layers carry that on, transformers is made to round alike.
ROUNDED_GELU = ("gemma-4", "gemma-4-moe")
GELU = ("gemma-2", "gemma-3", "gemma-4", "gemma-4-moe", "gpt-2")
# Their expressions in llama.cpp know no combining marks (a notice says so).
WITHOUT_MARKS = ("gpt-oss", "minimax-m2", "mistral-3", "mistral-nemo", "nemotron-3", "nemotron-h", "phi-3-long")

Saved = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """``saved(name, dtype)``: folder and model of a sample, made once."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made: dict[tuple[str, ...], tuple[Path, Any]] = {}

    def get(name: str, dtype: str = "float32", shard_size: str = "50GB") -> tuple[Path, Any]:
        key = (name, dtype, shard_size)
        if key not in made:
            folder = tmp_path_factory.mktemp("sample") / name
            made[key] = folder, save_sample(name, folder, dtype, shard_size)
        return made[key]

    return get


def _llama_logits(file: Path, ids: list[int], n_ctx: int = 256) -> np.ndarray:
    """[n_tokens, n_vocab], computed with an f32 cache."""
    import llama_cpp

    llm = llama_cpp.Llama(str(file), n_ctx=n_ctx, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1, n_threads_batch=1)
    llm.eval(ids)
    logits = np.array(llm.scores[: len(ids)])
    llm.close()
    return logits


def _transformers_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def _worst(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / expected.std())


def _round_gelu(model: Any) -> None:
    """Let the model's GELU take and give f16, as llama.cpp's table does."""

    def rounded(x: Any) -> Any:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()

    for module in model.modules():
        if hasattr(module, "act_fn"):
            del module.act_fn
            module.act_fn = rounded


@pytest.mark.parametrize("name", SAMPLES)
def test_same_logits_in_f32(name: str, saved: Saved, random: np.random.Generator) -> None:
    folder, model = saved(name)
    file = folder / "f32.gguf"
    convert_model(folder, file, outtype="f32")
    ids = [int(index) for index in random.integers(4, N_TOKENS - 10, 100)]
    if name in ROUNDED_GELU:
        _round_gelu(model)
    assert _worst(_llama_logits(file, ids), _transformers_logits(model, ids)) < (1e-2 if name in GELU else 1e-4)


@pytest.mark.parametrize(("outtype", "tolerance"), [("f32", 1e-5), ("f16", 2e-3), ("auto", 2e-2)])
def test_logits_of_a_bf16_checkpoint_in_shards(outtype: str, tolerance: float, saved: Saved, random: np.random.Generator) -> None:
    """f32 is exact. With f16 and bf16 weights llama.cpp rounds activations, too, to 11 and 8 bits: the root mean square is held to a few of those."""
    folder, model = saved("llama-3", "bfloat16", "100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    conversion = convert_model(folder, folder / f"{outtype}.gguf", outtype=outtype)
    assert conversion.outtype == outtype.replace("auto", "bf16")
    ids = [int(index) for index in random.integers(4, N_TOKENS - 10, 100)]
    difference = _llama_logits(conversion.path, ids) - _transformers_logits(model, ids)
    assert np.sqrt(np.mean(difference**2)) / _transformers_logits(model, ids).std() < tolerance


def test_long_factors_beyond_the_original_context(saved: Saved, random: np.random.Generator) -> None:
    folder, model = saved("phi-3-long")
    convert_model(folder, folder / "long.gguf", outtype="f32")
    ids = [int(index) for index in random.integers(4, N_TOKENS - 10, 300)]  # the original context is 256
    assert _worst(_llama_logits(folder / "long.gguf", ids, n_ctx=512), _transformers_logits(model, ids)) < 2e-4


@pytest.mark.parametrize("name", SAMPLES)
def test_same_tokens_as_transformers(name: str, saved: Saved) -> None:
    folder, _ = saved(name)
    convert_model(folder, folder / "tokens.gguf")
    text = NASTY_TEXT.replace("हिन्दी ไทย ", "") if name in WITHOUT_MARKS else NASTY_TEXT
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (ids,) = llama_tokens(folder / "tokens.gguf", [text], add_special=True)
    assert ids == tokenizer(text).input_ids


@pytest.mark.parametrize("name", SAMPLES)
def test_old_config_files(name: str, saved: Saved) -> None:
    """Before transformers 5, configs had rope_theta and rope_scaling, and left out what equals the class's defaults: the result is the same."""
    folder, _ = saved(name)
    expected = convert_model(folder, folder / "x.gguf", dry_run=True)
    config = json.loads((folder / "config.json").read_text())
    old = _without_defaults(_with_old_rope(config))
    (folder / "config.json").write_text(json.dumps(old))
    try:
        converted = convert_model(folder, folder / "x.gguf", dry_run=True)
    finally:
        (folder / "config.json").write_text(json.dumps(config))
    assert converted.metadata == expected.metadata
    assert converted.tensors == expected.tensors


def _with_old_rope(config: dict[str, Any]) -> dict[str, Any]:
    old = dict(config)
    if rope := old.pop("rope_parameters", None):
        if "full_attention" in rope:
            old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        old["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        if scaling.get("rope_type", "default") != "default":
            old["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    return old


def _without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    config_class = type(transformers.AutoConfig.for_model(config["model_type"]))
    defaults = config_class().to_dict()
    return {name: value for name, value in config.items() if name in ("architectures", "model_type") or defaults.get(name) != value}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama-2", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("qwen-3-moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("gemma-2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar = 24"),
        ("qwen-2.5", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' has no equivalent"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, change: dict[str, Any], message: str, saved: Saved) -> None:
    folder, _ = saved(name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    try:
        with pytest.raises(UnsupportedError, match=message):
            convert_model(folder, folder / "x.gguf", dry_run=True)
    finally:
        (folder / "config.json").write_text(json.dumps(config))


def test_fused_experts_are_parted(saved: Saved, tmp_path: Path) -> None:
    """Experts as transformers 5 holds them in memory, gate and up in one tensor, give the file that single experts give."""
    from safetensors.torch import load_file, save_file

    folder, _ = saved("qwen-3-moe")
    single = load_file(folder / "model.safetensors")
    fused = {name: tensor for name, tensor in single.items() if ".experts." not in name}
    for index in range(3):
        experts = [f"model.layers.{index}.mlp.experts.{expert}" for expert in range(4)]
        gate_up = [torch.cat([single[f"{name}.gate_proj.weight"], single[f"{name}.up_proj.weight"]]) for name in experts]
        fused[f"model.layers.{index}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        fused[f"model.layers.{index}.mlp.experts.down_proj"] = torch.stack([single[f"{name}.down_proj.weight"] for name in experts])
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(fused, tmp_path / "model.safetensors")
    files = [folder / "single.gguf", folder / "fused.gguf"]
    for source, file in zip((folder, tmp_path), files, strict=True):
        convert_model(source, file)
    assert _tensor_bytes(files[0]) == _tensor_bytes(files[1])


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_multimodal_model(prefix: str, saved: Saved, tmp_path: Path) -> None:
    """Gemma 3 with vision: the same file as its text model gives, the rest is left out."""
    from safetensors.torch import load_file, save_file

    folder, _ = saved("gemma-3")
    tensors = {name.replace("model.", prefix, 1): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] = torch.zeros(2, 2)
    tensors["multi_modal_projector.mm_input_projection_weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    for file in folder.glob("tokenizer*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text_config = json.loads((folder / "config.json").read_text())
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {**text_config, "architectures": None}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_config": {"hidden_size": 2}}))
    files = [folder / "text.gguf", folder / "multimodal.gguf"]
    for source, file in zip((folder, tmp_path), files, strict=True):
        convert_model(source, file)
    assert _tensor_bytes(files[0]) == _tensor_bytes(files[1])


@pytest.mark.parametrize(("name", "prefix"), [("qwen-3.5", "mtp."), ("glm-4.5", "model.layers.3.")])
def test_layers_that_draft_are_left_out(name: str, prefix: str, saved: Saved, tmp_path: Path) -> None:
    """Checkpoints of Qwen 3.5 and GLM-4.5 have a layer that predicts a further token, which transformers does not load either."""
    from safetensors.torch import load_file, save_file

    folder, _ = saved(name)
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    drafts = {f"{prefix}eh_proj.weight": torch.zeros(64, 128), f"{prefix}input_layernorm.weight": torch.zeros(64)}
    save_file(load_file(folder / "model.safetensors") | drafts, tmp_path / "model.safetensors")
    files = [folder / "without.gguf", folder / "with.gguf"]
    for source, file in zip((folder, tmp_path), files, strict=True):
        convert_model(source, file)
    assert _tensor_bytes(files[0]) == _tensor_bytes(files[1])


def test_experts_of_mxfp4_keep_their_bits(saved: Saved, tmp_path: Path) -> None:
    """Whatever the outtype, their type is MXFP4, and what they stand for equals what the format's definition says."""
    import gguf

    folder, _ = saved("gpt-oss")
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    save_mxfp4(folder, packed, plain, seed=11)
    for source in (packed, plain):
        convert_model(source, source / "f32.gguf", outtype="f32", verify=True)
    kept, expected = ({tensor.name: tensor for tensor in gguf.GGUFReader(source / "f32.gguf").tensors} for source in (packed, plain))
    assert kept.keys() == expected.keys()
    for name, tensor in kept.items():
        is_packed = name.endswith("_exps.weight")
        assert tensor.tensor_type.name == ("MXFP4" if is_packed else "F32"), name
        values = gguf.dequantize(tensor.data, tensor.tensor_type) if is_packed else tensor.data
        assert np.array_equal(values, expected[name].data), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj_scales"), "down_proj_blocks alone"),
        (lambda tensors: tensors["model.layers.1.mlp.experts.down_proj_scales"].fill(255), "a scale that is no number"),
    ],
)
def test_damaged_mxfp4_is_refused(change: Callable[[dict[str, np.ndarray]], object], message: str, saved: Saved, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder, _ = saved("gpt-oss")
    save_mxfp4(folder, tmp_path / "packed", tmp_path / "plain", seed=11)
    file = tmp_path / "packed" / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(DataError, match=message):
        convert_model(tmp_path / "packed", tmp_path / "x.gguf")


def test_a_yarn_that_llama_cpp_rounds_has_a_notice(saved: Saved) -> None:
    """The published gpt-oss have truncate = False: with it, llama.cpp's logits differ from the second token on; without it (the sample) they agree."""
    folder, _ = saved("gpt-oss")
    config = json.loads((folder / "config.json").read_text())
    expected = convert_model(folder, folder / "x.gguf", dry_run=True)
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": {**config["rope_parameters"], "truncate": False}}))
    try:
        converted = convert_model(folder, folder / "x.gguf", dry_run=True)
    finally:
        (folder / "config.json").write_text(json.dumps(config))
    assert converted.metadata == expected.metadata
    assert [notice for notice in converted.notices if notice not in expected.notices] == [notice for notice in converted.notices if "YaRN" in notice]
    assert len(converted.notices) == len(expected.notices) + 1


def test_pickled_weights_give_the_same_file(saved: Saved, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder, _ = saved("gpt-2")
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    files = [folder / "safe.gguf", folder / "pickled.gguf"]
    for source, file in zip((folder, tmp_path), files, strict=True):
        convert_model(source, file)
    assert _tensor_bytes(files[0]) == _tensor_bytes(files[1])


def _tensor_bytes(file: Path) -> dict[str, bytes]:
    import gguf

    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(file).tensors}
