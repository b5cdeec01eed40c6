"""Models by the names of their architectures: random weights under the metadata and tensors that llama.cpp wants of each, written by the test that needs
one. `models.py` has those that stand for one thing that attention can carry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from models import N_VOCAB, Shape, Weights, add_byte_vocabulary, attention, feed_forward, write_model

Block = Callable[[Weights, int, Shape], None]  # the tensors of one layer

N_EXPERT, N_USED = 4, 3
D_CONV, D_STATE, N_GROUP, N_SSM_HEAD, D_INNER = 4, 16, 2, 4, 64  # of state-space layers
LATENT, N_ROT, D_NOPE, D_V_MLA, Q_RANK = 64, 32, 32, 32, 32  # of multi-head latent attention


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        arch: llama.cpp's name.
        block: writes the tensors of a layer; None: `models.write_model` has it.
        shape: sizes.
        keys: metadata besides the common ones, without the architecture's name.
        extra: writes tensors that belong to no layer.
        recurrent: layers with a recurrent state.
        windows: layers with a sliding window.
        uncached: layers without a KV cache.
    """

    arch: str
    block: Block | None = None
    shape: Shape = field(default_factory=Shape)
    keys: dict[str, Any] = field(default_factory=dict)
    extra: Callable[[Weights, Shape], None] = lambda weights, s: None
    recurrent: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    uncached: tuple[int, ...] = ()


def _dense(weights: Weights, il: int, s: Shape) -> None:
    attention(weights, f"blk.{il}", s)
    feed_forward(weights, f"blk.{il}", s)


def _qwen2(weights: Weights, il: int, s: Shape) -> None:
    _dense(weights, il, s)
    for name, n in (("q", s.n_head * s.d_head), ("k", s.n_head_kv * s.d_head), ("v", s.n_head_kv * s.d_v)):
        # As in Qwen2.5, a key's bias is many times its spread.
        weights.vector(f"blk.{il}.attn_{name}.bias", n, mean=3.0 if name == "k" else 0.0)


def _head_norms(weights: Weights, il: int, s: Shape) -> None:
    for name in ("q", "k"):
        weights.norm(f"blk.{il}.attn_{name}_norm", s.d_head)


def _qwen3(weights: Weights, il: int, s: Shape) -> None:
    _dense(weights, il, s)
    _head_norms(weights, il, s)


def _experts(weights: Weights, il: int, s: Shape, names: tuple[str, ...] = ("gate", "up", "down")) -> None:
    weights.matrix(f"blk.{il}.ffn_gate_inp", N_EXPERT, s.n_embd, gain=4.0)  # so that the expert left out would have had little to say
    for name in names:
        n_out, n_in = (s.n_embd, s.n_ff) if name == "down" else (s.n_ff, s.n_embd)
        weights.matrix(f"blk.{il}.ffn_{name}_exps", n_out, n_in, n_expert=N_EXPERT)


def _qwen3moe(weights: Weights, il: int, s: Shape) -> None:
    attention(weights, f"blk.{il}", s)
    _head_norms(weights, il, s)
    weights.norm(f"blk.{il}.ffn_norm", s.n_embd)
    _experts(weights, il, s)


def _minimax_m2(weights: Weights, il: int, s: Shape) -> None:
    attention(weights, f"blk.{il}", s)
    weights.norm(f"blk.{il}.attn_q_norm", s.n_head * s.d_head)
    weights.norm(f"blk.{il}.attn_k_norm", s.n_head_kv * s.d_head)
    weights.norm(f"blk.{il}.ffn_norm", s.n_embd)
    _experts(weights, il, s)
    weights.vector(f"blk.{il}.exp_probs_b.bias", N_EXPERT)


def _glm4(weights: Weights, il: int, s: Shape) -> None:
    attention(weights, f"blk.{il}", s)
    weights.norm(f"blk.{il}.post_attention_norm", s.n_embd)
    weights.norm(f"blk.{il}.post_ffw_norm", s.n_embd)
    _wide_feed_forward(weights, il, s)


def _wide_feed_forward(weights: Weights, il: int, s: Shape) -> None:
    """The gate is the upper half of what goes up."""
    weights.norm(f"blk.{il}.ffn_norm", s.n_embd)
    weights.matrix(f"blk.{il}.ffn_up", 2 * s.n_ff, s.n_embd)
    weights.matrix(f"blk.{il}.ffn_down", s.n_embd, s.n_ff)


def _phi3(weights: Weights, il: int, s: Shape) -> None:
    weights.norm(f"blk.{il}.attn_norm", s.n_embd)
    weights.matrix(f"blk.{il}.attn_qkv", s.n_embd + 2 * s.n_head_kv * s.d_head, s.n_embd, gain=1.5)
    weights.matrix(f"blk.{il}.attn_output", s.n_embd, s.n_embd)
    _wide_feed_forward(weights, il, s)


def _olmo2(weights: Weights, il: int, s: Shape) -> None:
    for name, n in (("q", s.n_head * s.d_head), ("k", s.n_head_kv * s.d_head), ("v", s.n_head_kv * s.d_v)):
        weights.matrix(f"blk.{il}.attn_{name}", n, s.n_embd)
    weights.matrix(f"blk.{il}.attn_output", s.n_embd, s.n_head * s.d_v)
    weights.norm(f"blk.{il}.attn_q_norm", s.n_head * s.d_head)
    weights.norm(f"blk.{il}.attn_k_norm", s.n_head_kv * s.d_head)
    weights.norm(f"blk.{il}.post_attention_norm", s.n_embd)
    for name, n_out, n_in in (("gate", s.n_ff, s.n_embd), ("up", s.n_ff, s.n_embd), ("down", s.n_embd, s.n_ff)):
        weights.matrix(f"blk.{il}.ffn_{name}", n_out, n_in)
    weights.norm(f"blk.{il}.post_ffw_norm", s.n_embd)


GEMMA4_WINDOWS, D_WINDOW = (0, 2, 4), 64


def _gemma4(weights: Weights, il: int, s: Shape) -> None:
    """Windows with small heads, all tokens with large ones; the last two layers read the cache of those before."""
    d_head = D_WINDOW if il in GEMMA4_WINDOWS else s.d_head
    weights.norm(f"blk.{il}.attn_norm", s.n_embd)
    weights.matrix(f"blk.{il}.attn_q", s.n_head * d_head, s.n_embd)
    weights.vector(f"blk.{il}.attn_q_norm.weight", d_head, mean=2 / np.sqrt(d_head))  # Gemma 4 does not scale its scores
    if il < s.n_layer - 2:
        weights.matrix(f"blk.{il}.attn_k", s.n_head_kv * d_head, s.n_embd)
        weights.matrix(f"blk.{il}.attn_v", s.n_head_kv * d_head, s.n_embd)
        weights.norm(f"blk.{il}.attn_k_norm", d_head)
    weights.matrix(f"blk.{il}.attn_output", s.n_embd, s.n_head * d_head)
    weights.norm(f"blk.{il}.post_attention_norm", s.n_embd)
    weights.norm(f"blk.{il}.post_ffw_norm", s.n_embd)
    weights.vector(f"blk.{il}.layer_output_scale.weight", 1, mean=1.0)
    feed_forward(weights, f"blk.{il}", s)


def _rope_freqs(weights: Weights, s: Shape) -> None:
    weights.writer.add_tensor("rope_freqs.weight", np.ones(s.d_head // 2, np.float32))


def _ssm(weights: Weights, il: int, s: Shape, d_inner: int = D_INNER) -> None:
    """A state-space layer (Mamba 2)."""
    n_conv = d_inner + 2 * N_GROUP * D_STATE
    weights.matrix(f"blk.{il}.ssm_in", d_inner + n_conv + N_SSM_HEAD, s.n_embd)
    weights.matrix(f"blk.{il}.ssm_conv1d", n_conv, D_CONV)
    weights.vector(f"blk.{il}.ssm_conv1d.bias", n_conv)
    weights.vector(f"blk.{il}.ssm_dt.bias", N_SSM_HEAD)
    weights.vector(f"blk.{il}.ssm_a", N_SSM_HEAD, 1, mean=-1.0)
    weights.vector(f"blk.{il}.ssm_d", N_SSM_HEAD, 1, mean=1.0)
    weights.vector(f"blk.{il}.ssm_norm.weight", N_GROUP, d_inner // N_GROUP, mean=1.0)
    weights.matrix(f"blk.{il}.ssm_out", s.n_embd, d_inner)


def _granite_hybrid(weights: Weights, il: int, s: Shape) -> None:
    if il % 2:
        attention(weights, f"blk.{il}", s)
    else:
        weights.norm(f"blk.{il}.attn_norm", s.n_embd)
        _ssm(weights, il, s, 2 * s.n_embd)
    feed_forward(weights, f"blk.{il}", s)


def _falcon_h1(weights: Weights, il: int, s: Shape) -> None:
    """Attention and a state in every layer."""
    attention(weights, f"blk.{il}", s)
    _ssm(weights, il, s)
    for name, n_out, n_in in (("gate", s.n_ff, s.n_embd), ("up", s.n_ff, s.n_embd), ("down", s.n_embd, s.n_ff)):
        weights.matrix(f"blk.{il}.ffn_{name}", n_out, n_in)
    weights.vector(f"blk.{il}.ffn_norm", s.n_embd, mean=1.0)  # llama.cpp asks for it under this name


def _nemotron_h(weights: Weights, il: int, s: Shape) -> None:
    """A state, attention, or feed-forward: one in each layer."""
    if il == 0:
        weights.norm("blk.0.attn_norm", s.n_embd)
        _ssm(weights, il, s)
    elif il == 1:
        attention(weights, "blk.1", s)
    else:
        weights.norm(f"blk.{il}.attn_norm", s.n_embd)
        weights.matrix(f"blk.{il}.ffn_up", s.n_ff, s.n_embd)
        weights.matrix(f"blk.{il}.ffn_down", s.n_embd, s.n_ff)


D_DELTA, N_KEY_HEAD, N_VALUE_HEAD = 32, 2, 4  # of gated delta nets


def _delta(weights: Weights, il: int, s: Shape, *, joined: bool) -> None:
    n_key, n_value = D_DELTA * N_KEY_HEAD, D_DELTA * N_VALUE_HEAD
    weights.matrix(f"blk.{il}.attn_qkv", 2 * n_key + n_value, s.n_embd)
    weights.matrix(f"blk.{il}.attn_gate", n_value, s.n_embd)
    weights.matrix(f"blk.{il}.ssm_conv1d", 2 * n_key + n_value, D_CONV)
    weights.vector(f"blk.{il}.ssm_dt.bias", N_VALUE_HEAD)
    weights.vector(f"blk.{il}.ssm_a", N_VALUE_HEAD, mean=-1.0)
    if joined:
        weights.matrix(f"blk.{il}.ssm_ba", 2 * N_VALUE_HEAD, s.n_embd)
    else:
        weights.matrix(f"blk.{il}.ssm_beta", N_VALUE_HEAD, s.n_embd)
        weights.matrix(f"blk.{il}.ssm_alpha", N_VALUE_HEAD, s.n_embd)
    weights.norm(f"blk.{il}.ssm_norm", D_DELTA)
    weights.matrix(f"blk.{il}.ssm_out", s.n_embd, n_value)


def _gated_attention_or_delta(weights: Weights, il: int, s: Shape, *, joined: bool) -> None:
    weights.norm(f"blk.{il}.attn_norm", s.n_embd)
    weights.norm(f"blk.{il}.post_attention_norm", s.n_embd)
    if il % 4 < 3:
        _delta(weights, il, s, joined=joined)
        return
    weights.matrix(f"blk.{il}.attn_q", 2 * s.n_head * s.d_head, s.n_embd, gain=2.0)
    weights.matrix(f"blk.{il}.attn_k", s.n_head_kv * s.d_head, s.n_embd, gain=2.0)
    weights.matrix(f"blk.{il}.attn_v", s.n_head_kv * s.d_v, s.n_embd)
    weights.matrix(f"blk.{il}.attn_output", s.n_embd, s.n_head * s.d_v)
    _head_norms(weights, il, s)


def _qwen35(weights: Weights, il: int, s: Shape) -> None:
    _gated_attention_or_delta(weights, il, s, joined=False)
    for name, n_out, n_in in (("gate", s.n_ff, s.n_embd), ("up", s.n_ff, s.n_embd), ("down", s.n_embd, s.n_ff)):
        weights.matrix(f"blk.{il}.ffn_{name}", n_out, n_in)


def _qwen3next(weights: Weights, il: int, s: Shape) -> None:
    _gated_attention_or_delta(weights, il, s, joined=True)
    _experts(weights, il, s)
    weights.vector(f"blk.{il}.ffn_gate_inp_shexp.weight", s.n_embd)
    for name, n_out, n_in in (("gate", s.n_ff, s.n_embd), ("up", s.n_ff, s.n_embd), ("down", s.n_embd, s.n_ff)):
        weights.matrix(f"blk.{il}.ffn_{name}_shexp", n_out, n_in)


def _deepseek2(weights: Weights, il: int, s: Shape) -> None:
    """Multi-head latent attention: the cache is one vector for all heads."""
    weights.norm(f"blk.{il}.attn_norm", s.n_embd)
    weights.matrix(f"blk.{il}.attn_q_a", Q_RANK, s.n_embd)
    weights.norm(f"blk.{il}.attn_q_a_norm", Q_RANK)
    weights.matrix(f"blk.{il}.attn_q_b", s.n_head * (D_NOPE + N_ROT), Q_RANK, gain=2.0)
    weights.matrix(f"blk.{il}.attn_kv_a_mqa", LATENT + N_ROT, s.n_embd)
    weights.norm(f"blk.{il}.attn_kv_a_norm", LATENT)
    weights.matrix(f"blk.{il}.attn_k_b", LATENT, D_NOPE, n_expert=s.n_head)
    weights.matrix(f"blk.{il}.attn_v_b", D_V_MLA, LATENT, n_expert=s.n_head)
    weights.matrix(f"blk.{il}.attn_output", s.n_embd, s.n_head * D_V_MLA)
    feed_forward(weights, f"blk.{il}", s)


_MOE = {"expert_count": N_EXPERT, "expert_used_count": N_USED, "expert_feed_forward_length": 128}
_SSM = {
    "ssm.conv_kernel": D_CONV,
    "ssm.inner_size": D_INNER,
    "ssm.state_size": D_STATE,
    "ssm.time_step_rank": N_SSM_HEAD,
    "ssm.group_count": N_GROUP,
}
_DELTA = {
    "ssm.conv_kernel": D_CONV,
    "ssm.inner_size": D_DELTA * N_VALUE_HEAD,
    "ssm.state_size": D_DELTA,
    "ssm.time_step_rank": N_VALUE_HEAD,
    "ssm.group_count": N_KEY_HEAD,
    "full_attention_interval": 4,
    "rope.dimension_count": 32,
}
_WIDE = Shape(n_head=2, n_head_kv=1)  # heads as wide as the model, which some families demand
_SQUARE = replace(_WIDE, n_layer=4, window=96)

FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2", _qwen2, _WIDE),
    "qwen3": Family("qwen3", _qwen3, Shape(d_head=128, n_head=2, n_head_kv=1)),
    "qwen3moe": Family("qwen3moe", _qwen3moe, Shape(), _MOE),
    "qwen35": Family(
        "qwen35",
        _qwen35,
        Shape(n_layer=4, d_head=256, n_head=2, n_head_kv=1),
        {**_DELTA, "rope.dimension_sections": [6, 5, 5, 0]},
        recurrent=(0, 1, 2),
    ),
    "qwen3next": Family("qwen3next", _qwen3next, Shape(n_layer=4, d_head=256, n_head=2, n_head_kv=1), {**_DELTA, **_MOE}, recurrent=(0, 1, 2)),
    "gemma3": Family("gemma3", None, Shape(n_layer=6), windows=(0, 1, 2, 3, 4)),
    "gemma4": Family(
        "gemma4",
        _gemma4,
        Shape(n_layer=6, d_head=512, n_head=2, n_head_kv=1),
        {
            "attention.key_length_swa": D_WINDOW,
            "attention.value_length_swa": D_WINDOW,
            "rope.dimension_count_swa": D_WINDOW,
            "attention.sliding_window": 96,
            "attention.sliding_window_pattern": [il in GEMMA4_WINDOWS for il in range(6)],
            "attention.shared_kv_layers": 2,
            "embedding_length_per_layer_input": 0,
            "final_logit_softcapping": 30.0,
        },
        _rope_freqs,
        windows=(0, 2),
        uncached=(4, 5),
    ),
    "gpt-oss": Family("gpt-oss", None, Shape(), windows=(0,)),
    "glm4": Family("glm4", _glm4, Shape(), {"rope.dimension_count": 32}),
    "deepseek2": Family(
        "deepseek2",
        _deepseek2,
        Shape(n_head=4, n_head_kv=1, d_head=LATENT + N_ROT, d_head_v=LATENT),
        {
            "attention.key_length_mla": D_NOPE + N_ROT,
            "attention.value_length_mla": D_V_MLA,
            "attention.q_lora_rank": Q_RANK,
            "attention.kv_lora_rank": LATENT,
            "rope.dimension_count": N_ROT,
            "leading_dense_block_count": 2,
            "expert_feed_forward_length": 128,
            "expert_shared_count": 1,
        },
    ),
    "lfm2": Family("lfm2", None, _WIDE, recurrent=(0,)),
    "granite-hybrid": Family(
        "granitehybrid", _granite_hybrid, Shape(n_layer=2), {**_SSM, "ssm.inner_size": 256, "attention.head_count_kv": [0, 2]}, recurrent=(0,)
    ),
    "nemotron-h": Family(
        "nemotron_h",
        _nemotron_h,
        Shape(n_layer=3),
        {**_SSM, "attention.head_count_kv": [0, 2, 0], "feed_forward_length": [0, 0, 128], "attention.layer_norm_epsilon": 1e-5},
        recurrent=(0,),
        uncached=(2,),
    ),
    "falcon-h1": Family("falcon-h1", _falcon_h1, Shape(), _SSM, recurrent=(0, 1)),
    "mistral3": Family("mistral3", _dense, Shape(d_head=128, n_head=2, n_head_kv=1)),
    "phi4": Family("phi3", _phi3, _WIDE),
    "olmo3": Family("olmo2", _olmo2, _SQUARE, {"attention.sliding_window": 96}, windows=(0, 1, 2)),
    "minimax-m2": Family("minimax-m2", _minimax_m2, Shape(), {**_MOE, "expert_gating_func": 2, "rope.dimension_count": 32}),
    "smollm3": Family("smollm3", _dense, Shape(n_layer=4)),
    "ernie4.5": Family("ernie4_5", _dense, Shape(d_head=128, n_head=2, n_head_kv=1)),
}


def write_family(path: Path, name: str) -> Path:
    """Write the model of a family and return its path."""
    family = FAMILIES[name]
    s = family.shape
    if family.block is None:
        return write_model(path, family.arch, s)
    writer = gguf.GGUFWriter(path, family.arch)
    writer.add_name(f"random {name}")
    keys = {
        "block_count": s.n_layer,
        "context_length": s.n_ctx,
        "embedding_length": s.n_embd,
        "feed_forward_length": s.n_ff,
        "attention.head_count": s.n_head,
        "attention.head_count_kv": s.n_head_kv,
        "attention.key_length": s.d_head,
        "attention.value_length": s.d_v,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": s.d_head,
        "rope.freq_base": 10000.0,
        **family.keys,
    }
    for key, value in keys.items():
        _add_key(writer, f"{family.arch}.{key}", value)
    add_byte_vocabulary(writer)
    weights = Weights(writer, s.seed)
    weights.matrix("token_embd", N_VOCAB, s.n_embd, gain=np.sqrt(s.n_embd) if family.arch != "gemma4" else 1.0)
    for il in range(s.n_layer):
        family.block(weights, il, s)
    family.extra(weights, s)
    weights.norm("output_norm", s.n_embd)
    weights.matrix("output", N_VOCAB, s.n_embd, gain=4.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
