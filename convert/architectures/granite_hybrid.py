"""Granite 4: layers of Mamba 2 with some of attention among them, dense or with experts; the smallest models have attention only."""

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf
import numpy as np

from gearcpp.errors import DataError, UnsupportedError

from ..architecture import ATTENTION, EXPERTS, FEED_FORWARD, Architecture, Shape
from ..metadata import Metadata
from ..rows import Rows, RowsOfEach, Selected
from .granite import Granite
from .mamba import ATTENTION_NAMES, MAMBA2, Mamba2

_SHARED_EXPERT: Mapping[str, Shape] = {
    "ffn_gate_shexp": ("shared_ff", "model"),
    "ffn_up_shexp": ("shared_ff", "model"),
    "ffn_down_shexp": ("model", "shared_ff"),
}
_WITHOUT_POSITIONS = 1 << 20  # tokens of context: nothing in such a model limits it


class GraniteHybrid(Mamba2, Granite):
    gguf_name = "granitehybrid"
    model_arch = gguf.MODEL_ARCH.GRANITE_HYBRID
    classes: ClassVar[tuple[str, ...]] = ("GraniteMoeHybridForCausalLM",)
    taken_for_granted = {**Granite.taken_for_granted, **Mamba2.taken_for_granted, "mamba_expand": (2,)}
    copied_keys = {
        **Granite.copied_keys,
        **Mamba2.copied_keys,
        "expert_count": ("num_local_experts", int),
        "expert_used_count": ("num_experts_per_tok", int),
        "expert_shared_feed_forward_length": ("shared_intermediate_size", int),
    }
    defaults = {
        **Granite.defaults,
        "shared_intermediate_size": 1024,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    }

    @classmethod
    def for_config(cls, config_json: Mapping[str, Any]) -> Architecture:
        """llama.cpp has another architecture for models without Mamba."""
        hybrid = cls(config_json)
        if not all(hybrid._attends):
            return hybrid
        if hybrid._n_experts:
            raise UnsupportedError("a Granite 4 with experts and without layers of Mamba cannot be converted: none has been published")
        return GraniteOfAttention(config_json)

    @property
    def _attends(self) -> list[bool]:
        kinds = self.config.get("layer_types") or ["mamba"] * self.config.n_layers
        if len(kinds) != self.config.n_layers:
            raise DataError(f"config.json has {len(kinds)} layer_types for {self.config.n_layers} layers")
        return [kind in ATTENTION_NAMES for kind in kinds]

    @property
    def _n_experts(self) -> int:
        return self.config.get("num_local_experts") or 0

    def layer_tensors(self, index: int) -> Mapping[str, Shape]:
        mixer: Mapping[str, Shape] = ATTENTION if self._attends[index] else {"attn_norm": ("model",), **MAMBA2}
        return {**mixer, **({**EXPERTS, **_SHARED_EXPERT} if self._n_experts else FEED_FORWARD)}

    def sizes(self) -> dict[str, int]:
        config, sizes = self.config, super().sizes()
        shared = config.positive("shared_intermediate_size")
        if not self._n_experts:
            return {**sizes, "ff": shared}
        return {**sizes, "experts": self._n_experts, "expert_ff": sizes["ff"], "shared_ff": shared}

    def metadata(self) -> Metadata:
        config, rotates = self.config, self.config.get("position_embedding_type") == "rope"
        values: Metadata = {
            **super().metadata(),
            "feed_forward_length": self.sizes()["ff"],
            "attention.head_count_kv": [config.n_head_kv if attends else 0 for attends in self._attends],
            "rope.scaling.finetuned": rotates,  # by which llama.cpp knows whether there is RoPE at all
        }
        return values if rotates else {**values, "context_length": _WITHOUT_POSITIONS}

    def _parted(self, tensors: dict[str, Rows]) -> dict[str, Rows]:
        """Gate and up projections lie in one tensor; a model without experts calls its feed-forward part the shared one."""
        shared = "mlp.shared_expert" if self._n_experts else "mlp"
        parted: dict[str, Rows] = {}
        for name, rows in tensors.items():
            half = rows.shape[-2] // 2 if len(rows.shape) > 1 else 0
            if name.endswith(".block_sparse_moe.input_linear.weight"):
                stem = name.removesuffix("input_linear.weight")
                parted |= {f"{stem}experts.w1.weight": RowsOfEach(rows, 0, half), f"{stem}experts.w3.weight": RowsOfEach(rows, half, 2 * half)}
            elif name.endswith(".shared_mlp.input_linear.weight"):
                stem = name.removesuffix("shared_mlp.input_linear.weight") + shared
                parted |= {
                    f"{stem}.gate_proj.weight": Selected(rows, np.arange(half)),
                    f"{stem}.up_proj.weight": Selected(rows, np.arange(half, 2 * half)),
                }
            elif name.endswith(".shared_mlp.output_linear.weight"):
                parted[name.removesuffix("shared_mlp.output_linear.weight") + f"{shared}.down_proj.weight"] = rows
            else:
                parted[name] = rows
        return parted


class GraniteOfAttention(GraniteHybrid):
    gguf_name = "granite"
    model_arch = gguf.MODEL_ARCH.GRANITE
    classes = ()
