"""OLMo 2 and OLMo 3."""

import gguf

from ..architecture import ATTENTION, FEED_FORWARD, Architecture
from ..metadata import Metadata


def _without_norms_before(layer: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {name: shape for name, shape in layer.items() if name not in ("attn_norm", "ffn_norm")}


class Olmo2(Architecture):
    gguf_name = "olmo2"
    model_arch = gguf.MODEL_ARCH.OLMO2
    classes = ("Olmo2ForCausalLM",)
    layer = {
        **_without_norms_before({**ATTENTION, **FEED_FORWARD}),
        "attn_q_norm": ("query",),
        "attn_k_norm": ("kv",),
        "post_attention_norm": ("model",),
        "post_ffw_norm": ("model",),
    }
    taken_for_granted = {**Architecture.taken_for_granted, "tie_word_embeddings": (False,)}
    defaults = {
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    }


class Olmo3(Olmo2):
    """OLMo 2 with windows, which llama.cpp takes for the same architecture."""

    classes = ("Olmo3ForCausalLM",)
    copied_keys = {"attention.sliding_window": ("sliding_window", int)}
    defaults = {**Olmo2.defaults, "sliding_window": 4096, "rope_theta": 5e5}

    def metadata(self) -> Metadata:
        kinds = self.config.get("layer_types") or [
            "full_attention" if (index + 1) % 4 == 0 else "sliding_attention" for index in range(self.config.n_layers)
        ]
        return {
            **super().metadata(),
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
            "rope.freq_base_swa": float(self.config.rope("sliding_attention")["rope_theta"]),
        }
