"""What GLM-4.5 and DeepSeek-V3 share: dense layers first, then experts that a sigmoid and a correction choose, beside some that every token has."""

import re
from collections.abc import Mapping
from typing import ClassVar

import gguf

from ..architecture import EXPERTS, FEED_FORWARD, Architecture, Shape
from ..metadata import Metadata
from ..rows import Rows

_SHARED_EXPERTS: Mapping[str, Shape] = {
    "exp_probs_b": ("experts",),
    "ffn_gate_shexp": ("shared_ff", "model"),
    "ffn_up_shexp": ("shared_ff", "model"),
    "ffn_down_shexp": ("model", "shared_ff"),
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Routed(Architecture):
    """A class names what its layers have beside the feed-forward part, norms included."""

    attention: ClassVar[Mapping[str, Shape]]
    renamed = {"e_score_correction_bias": "e_score_correction.bias"}
    aliases = {"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"}
    copied_keys = {
        "expert_count": ("n_routed_experts", int),
        "expert_used_count": ("num_experts_per_tok", int),
        "expert_shared_count": ("n_shared_experts", int),
        "expert_group_count": ("n_group", int),
        "expert_group_used_count": ("topk_group", int),
        "expert_feed_forward_length": ("moe_intermediate_size", int),
        "expert_weights_scale": ("routed_scaling_factor", float),
        "expert_weights_norm": ("norm_topk_prob", bool),
        "leading_dense_block_count": ("first_k_dense_replace", int),
    }
    taken_for_granted = {**Architecture.taken_for_granted, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}

    def layer_tensors(self, index: int) -> Mapping[str, Shape]:
        dense = index < self.config["first_k_dense_replace"]
        feed_forward = FEED_FORWARD if dense else {**EXPERTS, **_SHARED_EXPERTS}
        return {**self.attention, **{kind: shape for kind, shape in feed_forward.items() if kind != "ffn_norm"}}

    def sizes(self) -> dict[str, int]:
        config = self.config
        return {
            **super().sizes(),
            "experts": config.positive("n_routed_experts"),
            "expert_ff": config.positive("moe_intermediate_size"),
            "shared_ff": config.positive("moe_intermediate_size") * config.positive("n_shared_experts"),
        }

    def metadata(self) -> Metadata:
        return {**super().metadata(), "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID)}

    def _parted(self, tensors: dict[str, Rows]) -> dict[str, Rows]:
        """Without the layers after the last that predict further tokens, which llama.cpp needs for drafts only."""
        first = self.config.n_layers
        drafts = {str(first + index) for index in range(self.config.get("num_nextn_predict_layers") or 0)}
        return {name: rows for name, rows in tensors.items() if not ((match := _LAYER.match(name)) and match[1] in drafts)}
