"""Gemma 4 (of the multimodal models, the text part)."""

from collections.abc import Mapping
from typing import Any

import gguf
from gguf import TokenType

from gearcpp.errors import UnsupportedError

from ..architecture import Architecture, Shape
from ..layout import with_stacked_experts
from ..metadata import Metadata
from ..rows import Computed, Rows
from ..vocabulary import Vocabulary

_GELU = ("gelu_pytorch_tanh", None)
_NORMS: Mapping[str, Shape] = {
    "attn_norm": ("model",),
    "post_attention_norm": ("model",),
    "ffn_norm": ("model",),
    "post_ffw_norm": ("model",),
    "layer_output_scale": ("one",),
}
_EXPERTS: Mapping[str, Shape] = {
    "pre_ffw_norm_2": ("model",),
    "post_ffw_norm_1": ("model",),
    "post_ffw_norm_2": ("model",),
    "ffn_gate_inp": ("experts", "model"),
    "ffn_gate_inp.scale": ("model",),
    "ffn_gate_up_exps": ("experts", "expert_gate_and_up", "model"),
    "ffn_down_exps": ("experts", "model", "expert_ff"),
    "ffn_down_exps.scale": ("experts",),
}
_OF_THE_LAYER: Mapping[str, Shape] = {"inp_gate": ("layer_input", "model"), "proj": ("model", "layer_input"), "post_norm": ("model",)}
_OF_ALL_LAYERS: Mapping[str, Shape] = {
    "per_layer_token_embd": ("vocab", "layer_inputs"),
    "per_layer_model_proj": ("layer_inputs", "model"),
    "per_layer_proj_norm": ("layer_input",),
}
_NEVER = 1e30  # what divides the frequency of a pair of channels that is not rotated
# What a chat's parser must see in the text, though the tokenizer calls it special.
_VISIBLE = frozenset(("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'))


class Gemma4(Architecture):
    """Global layers have larger heads than windows; the last layers may read the cache of earlier ones; each layer may have an input of its own."""

    gguf_name = "gemma4"
    model_arch = gguf.MODEL_ARCH.GEMMA4
    classes = ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration")
    pieces = "gemma4"
    renamed = {
        ".layer_scalar": ".layer_scalar.weight",
        ".router.scale": ".router.proj.scale",
        ".router.per_expert_scale": ".experts.down_proj.scale",
    }
    taken_for_granted = {
        "hidden_activation": _GELU,
        "tie_word_embeddings": (True,),
        "use_bidirectional_attention": (None, "vision"),
        "attention_bias": (False,),
    }
    copied_keys = {
        "attention.sliding_window": ("sliding_window", int),
        "attention.shared_kv_layers": ("num_kv_shared_layers", int),
        "expert_count": ("num_experts", int),
        "expert_used_count": ("top_k_experts", int),
        "expert_feed_forward_length": ("moe_intermediate_size", int),
    }
    defaults = {
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 512,
        "hidden_size_per_layer_input": 256,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "tie_word_embeddings": True,
    }

    def __init__(self, config_json: Mapping[str, Any]) -> None:
        values = dict(config_json)
        ropes = values.get("rope_parameters") or {}
        full, sliding = ropes.get("full_attention", {}), ropes.get("sliding_attention", {})
        if (full.get("rope_type", "proportional"), sliding.get("rope_type", "default")) != ("proportional", "default"):
            raise UnsupportedError(
                f"Gemma 4 is computed by llama.cpp with proportional RoPE in global layers and unscaled in windows, config.json has {ropes}"
            )
        self._rotated = float(full.get("partial_rotary_factor", 0.25))  # of a global head
        values["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": full.get("rope_theta", 1e6)},
            "sliding_attention": {"rope_type": "default", "rope_theta": sliding.get("rope_theta", 1e4)},
        }
        for layer, changes in (values.get("per_layer_config") or {}).items():  # as transformers saves what published files have under these names
            if int(layer) < len(values.get("layer_types") or []) and values["layer_types"][int(layer)] == "full_attention":
                values["global_head_dim"] = changes.get("head_dim", values.get("global_head_dim", 512))
                values["num_global_key_value_heads"] = changes.get("num_key_value_heads", values.get("num_global_key_value_heads"))
        super().__init__(values)

    @property
    def _sliding(self) -> list[bool]:
        kinds = self.config.get("layer_types") or ["sliding_attention" if (index + 1) % 6 else "full_attention" for index in range(self.config.n_layers)]
        return [kind == "sliding_attention" for kind in kinds]

    @property
    def _n_head_kv_global(self) -> int:
        few = self.config.get("num_global_key_value_heads") if self.config["attention_k_eq_v"] else None
        return self.config.n_head_kv if few is None else self.config.positive("num_global_key_value_heads")

    def _reads_another_cache(self, index: int) -> bool:
        return index >= self.config.n_layers - self.config["num_kv_shared_layers"]

    def may_lack(self, index: int, kind: str) -> bool:
        return kind in ("attn_k", "attn_v", "attn_k_norm") and self._reads_another_cache(index)

    def outside_tensors(self) -> Mapping[str, Shape]:
        return {**self.outside, **(_OF_ALL_LAYERS if self.config.get("hidden_size_per_layer_input") else {})}

    def layer_tensors(self, index: int) -> Mapping[str, Shape]:
        config, kind = self.config, "" if self._sliding[index] else "global_"
        wide = "wide_ff" if config["use_double_wide_mlp"] and self._reads_another_cache(index) else "ff"
        tensors: dict[str, Shape] = {
            **_NORMS,
            "attn_q": (f"{kind}query", "model"),
            "attn_k": (f"{kind}kv", "model"),
            "attn_v": (f"{kind}kv", "model"),
            "attn_q_norm": (f"{kind}head",),
            "attn_k_norm": (f"{kind}head",),
            "attn_output": ("model", f"{kind}query"),
            "ffn_gate": (wide, "model"),
            "ffn_up": (wide, "model"),
            "ffn_down": ("model", wide),
        }
        if config["attention_k_eq_v"] and kind:
            del tensors["attn_v"]
        return {**tensors, **(_EXPERTS if config["enable_moe_block"] else {}), **(_OF_THE_LAYER if config.get("hidden_size_per_layer_input") else {})}

    def sizes(self) -> dict[str, int]:
        config, sizes = self.config, super().sizes()
        head, inputs = config.positive("global_head_dim"), config.get("hidden_size_per_layer_input") or 0
        experts = {}
        if config["enable_moe_block"]:
            width = config.positive("moe_intermediate_size")
            experts = {"experts": config.positive("num_experts"), "expert_ff": width, "expert_gate_and_up": 2 * width}
        return {
            **sizes,
            **experts,
            "one": 1,
            "wide_ff": 2 * sizes["ff"],
            "global_head": head,
            "global_query": config.n_head * head,
            "global_kv": self._n_head_kv_global * head,
            "layer_input": inputs,
            "layer_inputs": config.n_layers * inputs,
        }

    def metadata(self) -> Metadata:
        config, sizes = self.config, self.sizes()
        values: Metadata = {
            **super().metadata(),
            "attention.sliding_window_pattern": self._sliding,
            "final_logit_softcapping": float(config.get("final_logit_softcapping") or 0.0),  # llama.cpp takes 30 where there is none
            "attention.key_length": sizes["global_head"],
            "attention.value_length": sizes["global_head"],
            "attention.key_length_swa": sizes["head"],
            "attention.value_length_swa": sizes["head"],
            "embedding_length_per_layer_input": sizes["layer_input"],
            "rope.dimension_count": sizes["global_head"],
            "rope.dimension_count_swa": sizes["head"],
            "rope.freq_base_swa": float(config.rope("sliding_attention")["rope_theta"]),
        }
        if self._n_head_kv_global != config.n_head_kv:
            values["attention.head_count_kv"] = [config.n_head_kv if slides else self._n_head_kv_global for slides in self._sliding]
        if config["use_double_wide_mlp"]:
            values["feed_forward_length"] = [sizes["wide_ff" if self._reads_another_cache(index) else "ff"] for index in range(config.n_layers)]
        return values

    def computed_tensors(self) -> dict[str, Rows]:
        """A global head's first pairs of channels turn as they would if all did; the others stand still."""
        pairs = self.config.positive("global_head_dim") // 2
        turning = int(2 * pairs * self._rotated / 2)
        return {"rope_freqs.weight": Computed([1.0] * turning + [_NEVER] * (pairs - turning))}

    def amend_vocabulary(self, vocabulary: Vocabulary) -> None:
        for index, token in enumerate(vocabulary.tokens):
            if token in _VISIBLE:
                vocabulary.types[index] = TokenType.USER_DEFINED

    def _stacked(self, tensors: dict[str, Rows]) -> dict[str, Rows]:
        """llama.cpp takes the experts' gate and up projections in one tensor, as they are stored."""
        fused = {f"{name}.weight": rows for name, rows in tensors.items() if name.endswith("experts.gate_up_proj")}
        return fused | with_stacked_experts(
            {name: rows for name, rows in tensors.items() if f"{name}.weight" not in fused}, self.sizes().get("experts", 0)
        )
