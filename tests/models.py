"""Small models with random weights, written as GGUF by the test that needs them: one for each thing that attention can carry.

The vocabulary is three special tokens and the 256 bytes, so any text can be tokenized. Weights are scaled so that activations stay near 1 and attention is
neither flat nor one-hot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 3 + 256


@dataclass(frozen=True)
class Shape:
    """What a test chooses about a model. ``window``: the sliding window of families that have one."""

    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    d_head: int = 64
    d_head_v: int | None = None
    n_embd: int = 128
    n_ff: int = 128
    n_ctx: int = 4096
    window: int = 96
    seed: int = 1

    @property
    def d_v(self) -> int:
        return self.d_head_v or self.d_head


class _Weights:
    """Random tensors of one model."""

    def __init__(self, writer: gguf.GGUFWriter, seed: int) -> None:
        self.writer, self.random = writer, np.random.default_rng(seed)

    def matrix(self, name: str, n_out: int, n_in: int, gain: float = 1.0, n_expert: int = 0) -> None:
        shape = (n_expert, n_out, n_in) if n_expert else (n_out, n_in)
        self.writer.add_tensor(f"{name}.weight", (self.random.standard_normal(shape) * gain / np.sqrt(n_in)).astype(np.float32))

    def norm(self, name: str, n: int) -> None:
        self.vector(f"{name}.weight", n, mean=1.0)

    def vector(self, name: str, *shape: int, mean: float = 0.0) -> None:
        self.writer.add_tensor(name, (mean + 0.1 * self.random.standard_normal(shape)).astype(np.float32))


def _attention(weights: _Weights, block: str, s: Shape) -> None:
    weights.norm(f"{block}.attn_norm", s.n_embd)
    weights.matrix(f"{block}.attn_q", s.n_head * s.d_head, s.n_embd, gain=2.0)
    weights.matrix(f"{block}.attn_k", s.n_head_kv * s.d_head, s.n_embd, gain=2.0)
    weights.matrix(f"{block}.attn_v", s.n_head_kv * s.d_v, s.n_embd)
    weights.matrix(f"{block}.attn_output", s.n_embd, s.n_head * s.d_v)


def _feed_forward(weights: _Weights, block: str, s: Shape) -> None:
    weights.norm(f"{block}.ffn_norm", s.n_embd)
    weights.matrix(f"{block}.ffn_gate", s.n_ff, s.n_embd)
    weights.matrix(f"{block}.ffn_up", s.n_ff, s.n_embd)
    weights.matrix(f"{block}.ffn_down", s.n_embd, s.n_ff)


def _llama(weights: _Weights, block: str, s: Shape) -> None:
    """Plain causal attention with RoPE."""
    _attention(weights, block, s)
    _feed_forward(weights, block, s)


def _gemma2(weights: _Weights, block: str, s: Shape) -> None:
    """Soft-capped scores; every other layer has a sliding window."""
    _llama(weights, block, s)
    weights.norm(f"{block}.post_attention_norm", s.n_embd)
    weights.norm(f"{block}.post_ffw_norm", s.n_embd)


def _gemma3(weights: _Weights, block: str, s: Shape) -> None:
    """Normalized queries and keys; all but every sixth layer have a sliding window."""
    _gemma2(weights, block, s)
    weights.norm(f"{block}.attn_q_norm", s.d_head)
    weights.norm(f"{block}.attn_k_norm", s.d_head)


_N_EXPERT = 2


def _gpt_oss(weights: _Weights, block: str, s: Shape) -> None:
    """Attention sinks; every other layer has a sliding window; a mixture of experts."""
    _attention(weights, block, s)
    weights.vector(f"{block}.attn_output.bias", s.n_embd)
    weights.vector(f"{block}.attn_sinks.weight", s.n_head, mean=1.0)
    weights.norm(f"{block}.post_attention_norm", s.n_embd)
    weights.matrix(f"{block}.ffn_gate_inp", _N_EXPERT, s.n_embd)
    weights.vector(f"{block}.ffn_gate_inp.bias", _N_EXPERT)
    for name, n_out, n_in in (("gate", s.n_ff, s.n_embd), ("up", s.n_ff, s.n_embd), ("down", s.n_embd, s.n_ff)):
        weights.matrix(f"{block}.ffn_{name}_exps", n_out, n_in, n_expert=_N_EXPERT)
        weights.vector(f"{block}.ffn_{name}_exps.bias", _N_EXPERT, n_out)


def _mixtral(weights: _Weights, block: str, s: Shape) -> None:
    """A mixture of four experts, three of which see a token; no windows."""
    _attention(weights, block, s)
    weights.norm(f"{block}.ffn_norm", s.n_embd)
    weights.matrix(f"{block}.ffn_gate_inp", _N_MIXTRAL, s.n_embd, gain=4.0)  # so that the expert left out would have had little to say
    for name, n_out, n_in in (("gate", s.n_ff, s.n_embd), ("up", s.n_ff, s.n_embd), ("down", s.n_embd, s.n_ff)):
        weights.matrix(f"{block}.ffn_{name}_exps", n_out, n_in, n_expert=_N_MIXTRAL)


_N_MIXTRAL = 4


def _lfm2(weights: _Weights, block: str, s: Shape) -> None:
    """A hybrid: short convolutions, whose state is recurrent, in even layers; attention in odd ones. n_head * d_head must be n_embd."""
    if _is_recurrent(int(block.removeprefix("blk."))):
        weights.norm(f"{block}.attn_norm", s.n_embd)
        weights.matrix(f"{block}.shortconv.in_proj", 3 * s.n_embd, s.n_embd)
        weights.matrix(f"{block}.shortconv.conv", s.n_embd, _N_CONV)
        weights.matrix(f"{block}.shortconv.out_proj", s.n_embd, s.n_embd)
    else:
        _attention(weights, block, s)
        weights.norm(f"{block}.attn_q_norm", s.d_head)
        weights.norm(f"{block}.attn_k_norm", s.d_head)
    _feed_forward(weights, block, s)


_N_CONV = 3


def _is_recurrent(il: int) -> bool:
    return il % 2 == 0


def _bert(weights: _Weights, block: str, s: Shape) -> None:
    """An encoder: all tokens see each other, nothing is cached. n_head * d_head must be n_embd and n_head_kv n_head."""
    for name in ("q", "k", "v", "output"):
        weights.matrix(f"{block}.attn_{name}", s.n_embd, s.n_embd)
    for name, n_out, n_in in (("up", s.n_ff, s.n_embd), ("down", s.n_embd, s.n_ff)):
        weights.matrix(f"{block}.ffn_{name}", n_out, n_in)
    for name in ("attn_output_norm", "layer_output_norm"):
        weights.norm(f"{block}.{name}", s.n_embd)
        weights.vector(f"{block}.{name}.bias", s.n_embd)


_LORA_RANK, _N_ROT = 32, 32


def _minicpm3(weights: _Weights, block: str, s: Shape) -> None:
    """Keys and values of different sizes (kept as plain heads). n_head_kv must be n_head."""
    weights.norm(f"{block}.attn_norm", s.n_embd)
    weights.matrix(f"{block}.attn_q_a", _LORA_RANK, s.n_embd)
    weights.norm(f"{block}.attn_q_a_norm", _LORA_RANK)
    weights.matrix(f"{block}.attn_q_b", s.n_head * s.d_head, _LORA_RANK, gain=2.0)
    weights.matrix(f"{block}.attn_kv_a_mqa", _LORA_RANK + _N_ROT, s.n_embd)
    weights.norm(f"{block}.attn_kv_a_norm", _LORA_RANK)
    weights.matrix(f"{block}.attn_kv_b", s.n_head * (s.d_head - _N_ROT + s.d_v), _LORA_RANK, gain=2.0)
    weights.matrix(f"{block}.attn_output", s.n_embd, s.n_head * s.d_v)
    _feed_forward(weights, block, s)


_N_NOPE, _D_MLA = 32, 48  # channels of a head that is taken out of the latent: of K without RoPE, of V


def _deepseek2(weights: _Weights, block: str, s: Shape) -> None:
    """Latent attention (MLA): one row a token is K and, in its first d_v channels, V. d_head is d_v and what RoPE turns; n_head_kv must be 1."""
    n_rot = s.d_head - s.d_v
    weights.norm(f"{block}.attn_norm", s.n_embd)
    weights.matrix(f"{block}.attn_q_a", _LORA_RANK, s.n_embd)
    weights.norm(f"{block}.attn_q_a_norm", _LORA_RANK)
    weights.matrix(f"{block}.attn_q_b", s.n_head * (_N_NOPE + n_rot), _LORA_RANK, gain=2.0)
    weights.matrix(f"{block}.attn_kv_a_mqa", s.d_v + n_rot, s.n_embd)
    weights.norm(f"{block}.attn_kv_a_norm", s.d_v)
    weights.matrix(f"{block}.attn_k_b", s.d_v, _N_NOPE, n_expert=s.n_head)
    weights.matrix(f"{block}.attn_v_b", _D_MLA, s.d_v, n_expert=s.n_head)
    weights.matrix(f"{block}.attn_output", s.n_embd, s.n_head * _D_MLA)
    _feed_forward(weights, block, s)


def _mpt(weights: _Weights, block: str, s: Shape) -> None:
    """ALiBi: positions are a slope over the keys, no RoPE. n_head * d_head must be n_embd."""
    weights.norm(f"{block}.attn_norm", s.n_embd)
    weights.matrix(f"{block}.attn_qkv", s.n_embd + 2 * s.n_head_kv * s.d_head, s.n_embd, gain=1.5)
    weights.matrix(f"{block}.attn_output", s.n_embd, s.n_embd)
    weights.norm(f"{block}.ffn_norm", s.n_embd)
    weights.matrix(f"{block}.ffn_up", s.n_ff, s.n_embd)
    weights.matrix(f"{block}.ffn_down", s.n_embd, s.n_ff)


_FAMILIES: dict[str, Callable[[_Weights, str, Shape], None]] = {
    "llama": _llama,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt-oss": _gpt_oss,
    "minicpm3": _minicpm3,
    "deepseek2": _deepseek2,
    "mpt": _mpt,
    "mixtral": _mixtral,
    "lfm2": _lfm2,
    "bert": _bert,
}
_ARCHITECTURE = {"mixtral": "llama"}  # where it is not the family's own name


def write_model(path: Path, family: str = "llama", shape: Shape | None = None) -> Path:
    """Write a model of one of the families above and return its path."""
    s = shape or Shape()
    writer = gguf.GGUFWriter(path, _ARCHITECTURE.get(family, family))
    writer.add_name(f"random {family}")
    writer.add_block_count(s.n_layer)
    writer.add_context_length(s.n_ctx)
    writer.add_embedding_length(s.n_embd)
    writer.add_feed_forward_length(s.n_ff)
    writer.add_head_count(s.n_head)
    writer.add_head_count_kv([0 if _is_recurrent(il) else s.n_head_kv for il in range(s.n_layer)] if family == "lfm2" else s.n_head_kv)
    writer.add_key_length(s.d_head)
    writer.add_value_length(s.d_v)
    _add_family_keys(writer, family, s)
    add_byte_vocabulary(writer)

    weights = _Weights(writer, s.seed)
    weights.matrix("token_embd", N_VOCAB, s.n_embd, gain=np.sqrt(s.n_embd))
    for il in range(s.n_layer):
        _FAMILIES[family](weights, f"blk.{il}", s)
    if family == "bert":
        weights.matrix("token_types", 1, s.n_embd)
        weights.matrix("position_embd", s.n_ctx, s.n_embd)
        weights.vector("token_embd_norm.bias", s.n_embd)
    weights.norm("token_embd_norm" if family in ("bert", "lfm2") else "output_norm", s.n_embd)
    if family not in ("gemma2", "bert"):  # gemma2 uses the embedding again
        weights.matrix("output", N_VOCAB, s.n_embd, gain=4.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_lora(path: Path, shape: Shape | None = None, rank: int = 4) -> Path:
    """Write a LoRA adapter for the queries, keys and values of a "llama" model; ``shape.seed`` is the adapter's own."""
    s = shape or Shape()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    random = np.random.default_rng(s.seed)
    for il in range(s.n_layer):
        for name, n_out in (("q", s.n_head * s.d_head), ("k", s.n_head_kv * s.d_head), ("v", s.n_head_kv * s.d_v)):
            tensor = f"blk.{il}.attn_{name}.weight"
            writer.add_tensor(f"{tensor}.lora_a", (random.standard_normal((rank, s.n_embd)) / np.sqrt(s.n_embd)).astype(np.float32))
            writer.add_tensor(f"{tensor}.lora_b", random.standard_normal((n_out, rank)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_family_keys(writer: gguf.GGUFWriter, family: str, s: Shape) -> None:
    if family == "mpt":
        writer.add_layer_norm_eps(1e-5)
        writer.add_max_alibi_bias(8.0)
        return
    if family == "bert":
        writer.add_layer_norm_eps(1e-5)
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.MEAN)
        writer.add_token_type_count(1)
        return
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count({"minicpm3": _N_ROT, "deepseek2": s.d_head - s.d_v}.get(family, s.d_head))
    writer.add_rope_freq_base(10000.0)
    if family in ("gemma2", "gemma3", "gpt-oss"):
        writer.add_sliding_window(s.window)
    if family == "minicpm3":
        writer.add_q_lora_rank(_LORA_RANK)
        writer.add_kv_lora_rank(_LORA_RANK)
    if family == "deepseek2":
        writer.add_q_lora_rank(_LORA_RANK)
        writer.add_kv_lora_rank(s.d_v)
        writer.add_key_length_mla(_N_NOPE + s.d_head - s.d_v)
        writer.add_value_length_mla(_D_MLA)
        writer.add_leading_dense_block_count(s.n_layer)
        writer.add_expert_feed_forward_length(s.n_ff)
        writer.add_expert_shared_count(0)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(20.0)
        writer.add_final_logit_softcapping(30.0)
    if family == "lfm2":
        writer.add_shortconv_l_cache(_N_CONV)
    if family == "mixtral":
        writer.add_expert_count(_N_MIXTRAL)
        writer.add_expert_used_count(3)
    if family == "gpt-oss":
        writer.add_expert_count(_N_EXPERT)
        writer.add_expert_used_count(_N_EXPERT)
        writer.add_expert_feed_forward_length(s.n_ff)


def add_byte_vocabulary(writer: gguf.GGUFWriter) -> None:
    """A SentencePiece vocabulary of bytes."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, *[gguf.TokenType.BYTE] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
