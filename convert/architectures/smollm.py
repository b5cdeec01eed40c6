"""SmolLM 3 (SmolLM and SmolLM 2 are of Llama's class)."""

from typing import Any

import gguf

from gearcpp.errors import UnsupportedError

from ..architecture import Architecture
from .llama import Llama

_WITHOUT_ROPE_EVERY = 4  # llama.cpp rotates all layers but each of this number


class SmolLM3(Llama):
    gguf_name = "smollm3"
    model_arch = gguf.MODEL_ARCH.SMOLLM3
    classes = ("SmolLM3ForCausalLM",)
    taken_for_granted = {**Architecture.taken_for_granted, "use_sliding_window": (False, None)}
    defaults = {
        **Llama.defaults,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "no_rope_layer_interval": _WITHOUT_ROPE_EVERY,
        "tie_word_embeddings": True,
    }

    def __init__(self, config_json: Any) -> None:
        super().__init__(config_json)
        interval = self.config.positive("no_rope_layer_interval")
        rotated = self.config.get("no_rope_layers") or [int((index + 1) % interval != 0) for index in range(self.config.n_layers)]
        if [bool(layer) for layer in rotated] != [(index + 1) % _WITHOUT_ROPE_EVERY != 0 for index in range(self.config.n_layers)]:
            raise UnsupportedError(
                f"the model leaves RoPE out of other layers than each fourth (no_rope_layers = {rotated}), llama.cpp leaves it out of those"
            )
