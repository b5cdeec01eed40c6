"""GLM-4 (of 0414), and its mixture of experts (GLM-4.5, 4.6 and 4.7)."""

from collections.abc import Mapping

import gguf

from ..architecture import ATTENTION, Architecture, Shape
from .routed import Routed


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
    special_tokens = {"bos": "[gMASK]", "unk": "<|endoftext|>", "eot": "<|user|>", "eom": "<|observation|>"}
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
