"""Nemotron-H and Nemotron 3: each layer is Mamba 2, attention without positions, a feed-forward part or a mixture of experts."""

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from gearcpp.errors import DataError

from ..architecture import ATTENTION, Architecture, Shape
from ..metadata import Metadata
from ..rows import Rows
from .mamba import ATTENTION_NAMES, MAMBA2, Mamba2

_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}  # of hybrid_override_pattern
_FEED_FORWARD: Mapping[str, Shape] = {"ffn_up": ("ff", "model"), "ffn_down": ("model", "ff")}
_EXPERTS: Mapping[str, Shape] = {
    "ffn_gate_inp": ("experts", "model"),
    "exp_probs_b": ("experts",),
    "ffn_up_exps": ("experts", "expert_ff", "expert_model"),
    "ffn_down_exps": ("experts", "expert_model", "expert_ff"),
    "ffn_up_shexp": ("shared_ff", "model"),
    "ffn_down_shexp": ("model", "shared_ff"),
}
_LATENT: Mapping[str, Shape] = {"ffn_latent_down": ("expert_model", "model"), "ffn_latent_up": ("model", "expert_model")}
_WITHOUT_POSITIONS = 1 << 20


class NemotronH(Mamba2):
    gguf_name = "nemotron_h"
    model_arch = gguf.MODEL_ARCH.NEMOTRON_H
    classes: ClassVar[tuple[str, ...]] = ("NemotronHForCausalLM",)
    rotary_pairs = True  # there is no RoPE: llama.cpp's converter reorders queries and keys alike, which changes nothing
    aliases = {
        "mamba_n_heads": "mamba_num_heads",
        "mamba_n_groups": "n_groups",
        "mamba_d_state": "ssm_state_size",
        "mamba_d_conv": "conv_kernel",
        "rms_norm_eps": "layer_norm_epsilon",
        "head_dim": "attention_head_dim",
    }
    taken_for_granted = {**Mamba2.taken_for_granted, "mlp_hidden_act": ("relu2",), "mamba_hidden_act": ("silu",)}
    defaults = {
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "mamba_n_heads": 128,
        "mamba_head_dim": 64,
        "mamba_n_groups": 8,
        "mamba_d_state": 128,
        "mamba_d_conv": 4,
        "tie_word_embeddings": False,
    }

    def __init__(self, config_json: Mapping[str, Any]) -> None:
        kinds = config_json.get("hybrid_override_pattern") or config_json.get("layers_block_type")
        if not kinds:
            raise DataError("config.json lacks hybrid_override_pattern (or layers_block_type), which says what each layer is")
        self._kinds = [_LETTERS.get(kind, kind) for kind in kinds]
        super().__init__({**config_json, "num_hidden_layers": len(self._kinds)})

    @classmethod
    def for_config(cls, config_json: Mapping[str, Any]) -> Architecture:
        """llama.cpp has another architecture for models with experts."""
        dense = cls(config_json)
        return NemotronHMoe(config_json) if "moe" in dense._kinds else dense

    def ssm_inner(self) -> int:
        return self.config.positive("mamba_n_heads") * self.config.positive("mamba_head_dim")

    def layer_tensors(self, index: int) -> Mapping[str, Shape]:
        kind, norm = self._kinds[index], {"attn_norm": ("model",)}
        if kind in ATTENTION_NAMES:
            return ATTENTION
        return {**norm, **({"mlp": _FEED_FORWARD, "moe": self._experts()}.get(kind, MAMBA2))}

    def _experts(self) -> Mapping[str, Shape]:
        return {}

    def metadata(self) -> Metadata:
        config = self.config
        return {
            **super().metadata(),
            "context_length": _WITHOUT_POSITIONS,
            "feed_forward_length": [self._width(kind) for kind in self._kinds],
            "attention.head_count_kv": [config.n_head_kv if kind in ATTENTION_NAMES else 0 for kind in self._kinds],
            "attention.layer_norm_epsilon": float(config["rms_norm_eps"]),
            "rope.scaling.finetuned": False,
        }

    def _width(self, kind: str) -> int:
        return self.config.positive("intermediate_size") if kind == "mlp" else 0

    def _parted(self, tensors: dict[str, Rows]) -> dict[str, Rows]:
        """Under the names of gguf's map, without the layers that predict further tokens."""
        parted = {}
        for name, rows in tensors.items():
            if not name.startswith("mtp."):
                known = name.replace("model.layers.", "backbone.layers.", 1) if ".mixer." in name else name
                parted[known.replace("backbone.", "model.", 1).replace(".mixer.", ".mlp.", 1) if ".experts." in known else known] = rows
        return parted


class NemotronHMoe(NemotronH):
    gguf_name = "nemotron_h_moe"
    model_arch = gguf.MODEL_ARCH.NEMOTRON_H_MOE
    classes = ()
    renamed = {**NemotronH.renamed, "e_score_correction_bias": "e_score_correction.bias"}
    copied_keys = {
        **NemotronH.copied_keys,
        "expert_count": ("n_routed_experts", int),
        "expert_used_count": ("num_experts_per_tok", int),
        "expert_shared_count": ("n_shared_experts", int),
        "expert_group_count": ("n_group", int),
        "expert_group_used_count": ("topk_group", int),
        "expert_feed_forward_length": ("moe_intermediate_size", int),
        "expert_shared_feed_forward_length": ("moe_shared_expert_intermediate_size", int),
        "expert_weights_scale": ("routed_scaling_factor", float),
        "expert_weights_norm": ("norm_topk_prob", bool),
        "moe_latent_size": ("moe_latent_size", int),
    }
    defaults = {
        **NemotronH.defaults,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
    }

    def _experts(self) -> Mapping[str, Shape]:
        return {**_EXPERTS, **(_LATENT if self.config.get("moe_latent_size") else {})}

    def sizes(self) -> dict[str, int]:
        config = self.config
        return {
            **super().sizes(),
            "experts": config.positive("n_routed_experts"),
            "expert_ff": config.positive("moe_intermediate_size"),
            "expert_model": config.get("moe_latent_size") or config.d_model,
            "shared_ff": config.positive("moe_shared_expert_intermediate_size"),
        }

    def _width(self, kind: str) -> int:
        return self.config.positive("moe_intermediate_size") if kind == "moe" else super()._width(kind)
