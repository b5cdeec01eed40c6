"""ERNIE 4.5 (dense)."""

import gguf

from ..architecture import Architecture


class Ernie45(Architecture):
    gguf_name = "ernie4_5"
    model_arch = gguf.MODEL_ARCH.ERNIE4_5
    classes = ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM")
    defaults = {
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
    }
