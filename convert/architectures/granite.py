"""Granite 3 (dense)."""

from typing import ClassVar

import gguf

from .llama import Llama


class Granite(Llama):
    gguf_name = "granite"
    model_arch = gguf.MODEL_ARCH.GRANITE
    classes: ClassVar[tuple[str, ...]] = ("GraniteForCausalLM",)
    copied_keys = {
        "attention.scale": ("attention_multiplier", float),
        "embedding_scale": ("embedding_multiplier", float),
        "residual_scale": ("residual_multiplier", float),
        "logit_scale": ("logits_scaling", float),
    }
    defaults = {
        **Llama.defaults,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
