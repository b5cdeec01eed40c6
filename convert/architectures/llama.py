"""Llama 2, 3 and 3.x, SmolLM and others of their class; Mistral and Ministral 3; Mixtral."""

from typing import ClassVar

import gguf

from gearcpp.errors import UnsupportedError

from ..architecture import ATTENTION, EXPERTS, Architecture
from ..metadata import Metadata


class Llama(Architecture):
    gguf_name = "llama"
    model_arch = gguf.MODEL_ARCH.LLAMA
    classes: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM",)
    rotary_pairs = True
    defaults = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    }

    def notices(self) -> list[str]:
        window = self.config.get("sliding_window")
        if window is None or window >= self.config["max_position_embeddings"]:
            return []
        return [f"the model attends to the last {window} tokens only; llama.cpp has no such window for this architecture and attends to all"]


class Mistral(Llama):
    classes = ("MistralForCausalLM",)
    defaults = {
        **Llama.defaults,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }


class Mixtral(Llama):
    classes = ("MixtralForCausalLM",)
    layer = {**ATTENTION, **EXPERTS}
    copied_keys = {"expert_count": ("num_local_experts", int), "expert_used_count": ("num_experts_per_tok", int)}
    defaults = {
        **Llama.defaults,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "experts": self.config.positive("num_local_experts"), "expert_ff": self.config.positive("intermediate_size")}


class Mistral3(Llama):
    """Mistral Small 3.1 and 3.2, whose text part is of Mistral's own type, and Ministral 3, whose queries grow with the position."""

    gguf_name = "mistral3"
    model_arch = gguf.MODEL_ARCH.MISTRAL3
    classes = ("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM")
    taken_for_granted = {**Llama.taken_for_granted, "model_type": ("ministral3", "mistral")}
    defaults = {
        **Llama.defaults,
        "vocab_size": 131072,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }

    def metadata(self) -> Metadata:
        values = super().metadata()
        if self.config.get("model_type") != "ministral3":
            return values
        rope = self.config.rope()
        if rope["rope_type"] != "yarn" or rope.get("llama_4_scaling_beta") is None:
            raise UnsupportedError(f"Ministral 3 is computed by llama.cpp with YaRN and llama_4_scaling_beta, config.json has {rope}")
        return {
            **values,
            "rope.scaling.yarn_log_multiplier": float(rope.get("mscale_all_dim", 1.0)),
            "attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
        }
