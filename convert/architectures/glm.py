"""GLM-4 (of 0414)."""

import gguf

from ..architecture import ATTENTION, Architecture


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
