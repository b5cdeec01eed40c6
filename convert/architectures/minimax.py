"""MiniMax-M2."""

from collections.abc import Mapping
from typing import Any

import gguf

from ..architecture import ATTENTION, EXPERTS, Architecture
from ..metadata import Metadata


class MiniMaxM2(Architecture):
    """A mixture of experts that a sigmoid chooses; one norm spans all heads of the queries, one those of the keys."""

    gguf_name = "minimax-m2"
    model_arch = gguf.MODEL_ARCH.MINIMAXM2
    classes = ("MiniMaxM2ForCausalLM",)
    layer = {**ATTENTION, "attn_q_norm": ("query",), "attn_k_norm": ("kv",), **EXPERTS, "exp_probs_b": ("experts",)}
    renamed = {"e_score_correction_bias": "e_score_correction.bias"}
    aliases = {"num_local_experts": "num_experts"}
    copied_keys = {
        "expert_count": ("num_local_experts", int),
        "expert_used_count": ("num_experts_per_tok", int),
        "expert_feed_forward_length": ("intermediate_size", int),
    }
    taken_for_granted = {**Architecture.taken_for_granted, "scoring_func": ("sigmoid",), "use_qk_norm": (True,), "qk_norm_type": ("per_layer",)}
    defaults = {
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
    }

    def __init__(self, config_json: Mapping[str, Any]) -> None:
        values = dict(config_json)
        if rotated := values.get("rotary_dim"):  # the channels of a head that are rotated, as the published files have it
            values.setdefault("partial_rotary_factor", rotated / values.get("head_dim", self.defaults["head_dim"]))
        super().__init__(values)

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "experts": self.config.positive("num_local_experts"), "expert_ff": self.config.positive("intermediate_size")}

    def metadata(self) -> Metadata:
        return {**super().metadata(), "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID)}
