"""GLM-4 (of 0414), and its mixtures of experts: GLM-4.5, 4.6 and 4.7, and GLM-4.7-Flash, which has DeepSeek-V3's form."""

from collections.abc import Mapping
from typing import Any

import gguf

from gearcpp.errors import UnsupportedError

from ..architecture import ATTENTION, Architecture, Shape
from .deepseek import DeepseekV3
from .routed import Routed

# Of the mixtures of experts.
_MARKS = {"bos": "[gMASK]", "unk": "<|endoftext|>", "eot": "<|user|>", "eom": "<|observation|>"}


class Glm4(Architecture):
    gguf_name = "glm4"
    model_arch = gguf.MODEL_ARCH.GLM4
    classes = ("Glm4ForCausalLM",)
    layer = {
        **ATTENTION,
        "post_attention_norm": ("model",),
        "ffn_norm": ("model",),
        "ffn_up": ("gate_and_up", "model"),
        "ffn_down": ("model", "ff"),
        "post_ffw_norm": ("model",),
    }
    special_tokens = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>", "eot": "<|user|>"}
    defaults = {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
    }

    def sizes(self) -> dict[str, int]:
        sizes = super().sizes()
        return {**sizes, "gate_and_up": 2 * sizes["ff"]}


class Glm4Moe(Routed):
    gguf_name = "glm4moe"
    model_arch = gguf.MODEL_ARCH.GLM4_MOE
    classes = ("Glm4MoeForCausalLM",)
    attention = {**ATTENTION, "post_attention_norm": ("model",)}
    special_tokens = _MARKS
    defaults = {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
    }

    def layer_tensors(self, index: int) -> Mapping[str, Shape]:
        head_norms: Mapping[str, Shape] = {"attn_q_norm": ("head",), "attn_k_norm": ("head",)} if self.config["use_qk_norm"] else {}
        return {**super().layer_tensors(index), **head_norms}


class Glm4MoeLite(DeepseekV3):
    classes = ("Glm4MoeLiteForCausalLM",)
    special_tokens = _MARKS
    defaults = {
        **DeepseekV3.defaults,
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8,
    }

    def __init__(self, config_json: Mapping[str, Any]) -> None:
        values = dict(config_json)
        if kinds := values.get("mlp_layer_types"):  # transformers' way to say it
            n_dense = kinds.count("dense")
            if kinds != ["dense"] * n_dense + ["sparse"] * (len(kinds) - n_dense):
                raise UnsupportedError(f"the model has mlp_layer_types = {kinds}, but llama.cpp takes dense layers before all others only")
            values["first_k_dense_replace"] = n_dense
        super().__init__(values)
