"""Qwen3-Next and Qwen 3.5: three of four layers are a gated delta net (linear attention), the fourth attends and gates what it attends to."""

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf
import numpy as np
import numpy.typing as npt

from gearcpp.errors import DataError

from ..architecture import ATTENTION, EXPERTS, FEED_FORWARD, Architecture, Shape
from ..checkpoint import Checkpoint
from ..layout import decay, squeezed
from ..metadata import Metadata
from ..rows import Rows, Selected, SelectedColumns

Indices = npt.NDArray[np.int64]

_NORMS: Mapping[str, Shape] = {"attn_norm": ("model",), "post_attention_norm": ("model",)}
_ATTENTION: Mapping[str, Shape] = {**ATTENTION, **_NORMS, "attn_q": ("query_and_gate", "model"), "attn_q_norm": ("head",), "attn_k_norm": ("head",)}
_DELTA_NET: Mapping[str, Shape] = {
    **_NORMS,
    "attn_qkv": ("delta_qkv", "model"),
    "attn_gate": ("delta_value", "model"),
    "ssm_a": ("delta_heads",),
    "ssm_conv1d": ("delta_qkv", "window"),
    "ssm_dt": ("delta_heads",),
    "ssm_norm": ("delta_value_head",),
    "ssm_out": ("model", "delta_value"),
}
_SHARED_EXPERT: Mapping[str, Shape] = {
    "ffn_gate_inp_shexp": ("one", "model"),
    "ffn_gate_shexp": ("shared_ff", "model"),
    "ffn_up_shexp": ("shared_ff", "model"),
    "ffn_down_shexp": ("model", "shared_ff"),
}
_WITHOUT_NORM = ("ffn_norm",)  # it is post_attention_norm here


def _dense() -> dict[str, Shape]:
    return {kind: shape for kind, shape in FEED_FORWARD.items() if kind not in _WITHOUT_NORM}


def _experts() -> dict[str, Shape]:
    return {kind: shape for kind, shape in {**EXPERTS, **_SHARED_EXPERT}.items() if kind not in _WITHOUT_NORM}


class _Hybrid(Architecture):
    """What the two have in common."""

    norm_offset = 1.0
    renamed = {".dt_bias": ".dt_proj.bias"}
    delta_net: ClassVar[Mapping[str, Shape]] = {**_DELTA_NET, "ssm_alpha": ("delta_heads", "model"), "ssm_beta": ("delta_heads", "model")}
    feed_forward: ClassVar[Mapping[str, Shape]] = _dense()
    defaults = {
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": False,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    }

    @property
    def _recurrent(self) -> list[bool]:
        interval = self.config.positive("full_attention_interval")
        if not (kinds := self.config.get("layer_types")):
            return [(index + 1) % interval != 0 for index in range(self.config.n_layers)]
        if len(kinds) != self.config.n_layers:
            raise DataError(f"config.json has {len(kinds)} layer_types for {self.config.n_layers} layers")
        return [kind == "linear_attention" for kind in kinds]

    @property
    def _heads(self) -> tuple[int, int]:
        """Heads of keys, and heads of values for each of them."""
        n_key, n_value = self.config.positive("linear_num_key_heads"), self.config.positive("linear_num_value_heads")
        if n_value % n_key:
            raise DataError(f"config.json contradicts itself: {n_value} heads of values cannot share {n_key} heads of keys")
        return n_key, n_value // n_key

    def layer_tensors(self, index: int) -> Mapping[str, Shape]:
        return {**(self.delta_net if self._recurrent[index] else _ATTENTION), **self.feed_forward}

    def sizes(self) -> dict[str, int]:
        config, sizes = self.config, super().sizes()
        n_key, values_each = self._heads
        value = n_key * values_each * config.positive("linear_value_head_dim")
        return {
            **sizes,
            "query_and_gate": 2 * sizes["query"],
            "delta_heads": n_key * values_each,
            "delta_value": value,
            "delta_value_head": config.positive("linear_value_head_dim"),
            "delta_qkv": 2 * n_key * config.positive("linear_key_head_dim") + value,
            "window": config.positive("linear_conv_kernel_dim"),
        }

    def metadata(self) -> Metadata:
        config, sizes = self.config, self.sizes()
        return {
            **super().metadata(),
            "ssm.conv_kernel": sizes["window"],
            "ssm.state_size": config.positive("linear_key_head_dim"),
            "ssm.group_count": self._heads[0],
            "ssm.time_step_rank": sizes["delta_heads"],
            "ssm.inner_size": sizes["delta_value"],
            "attention.recurrent_layers": self._recurrent,
            "full_attention_interval": config.positive("full_attention_interval"),
        }

    def tensors(self, checkpoint: Checkpoint) -> dict[str, Rows]:
        """Without the layers that predict further tokens, which llama.cpp needs for drafts only."""
        return super().tensors({name: stored for name, stored in checkpoint.items() if not name.startswith(("mtp.", "model.mtp."))})

    def _reordered(self, name: str, rows: Rows) -> Rows:
        if name.endswith("ssm_norm.weight"):
            return rows
        if name.endswith("ssm_a"):
            return decay(rows)
        return squeezed(rows) if ".ssm_conv1d." in name else super()._reordered(name, rows)


class _MixtureOfExperts(_Hybrid):
    feed_forward = _experts()
    copied_keys = {
        "expert_count": ("num_experts", int),
        "expert_used_count": ("num_experts_per_tok", int),
        "expert_feed_forward_length": ("moe_intermediate_size", int),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", int),
    }
    aliases = {"num_experts": "num_local_experts"}

    def sizes(self) -> dict[str, int]:
        config = self.config
        return {
            **super().sizes(),
            "one": 1,
            "experts": config.positive("num_experts"),
            "expert_ff": config.positive("moe_intermediate_size"),
            "shared_ff": config.positive("shared_expert_intermediate_size"),
        }


class Qwen3Next(_MixtureOfExperts):
    gguf_name = "qwen3next"
    model_arch = gguf.MODEL_ARCH.QWEN3NEXT
    classes = ("Qwen3NextForCausalLM",)
    delta_net = {**_DELTA_NET, "ssm_ba": ("two_each", "model")}
    taken_for_granted = {**Architecture.taken_for_granted, "norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
    defaults = {
        **_Hybrid.defaults,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 512,
        "num_experts_per_tok": 10,
    }

    def sizes(self) -> dict[str, int]:
        sizes = super().sizes()
        return {**sizes, "two_each": 2 * sizes["delta_heads"]}

    def _parted(self, tensors: dict[str, Rows]) -> dict[str, Rows]:
        """Queries, keys, values and gates lie together for each head of keys; llama.cpp has all gates apart, and before them all of each kind."""
        key, (n_key, values_each) = self.config.positive("linear_key_head_dim"), self._heads
        value = values_each * self.config.positive("linear_value_head_dim")
        all_rows = np.arange(n_key * 2 * (key + value)).reshape(n_key, -1)
        *qkv, gates = (part.ravel() for part in np.split(all_rows, [key, 2 * key, 2 * key + value], axis=1))
        parted: dict[str, Rows] = {}
        for name, rows in tensors.items():
            stem, end = name.removesuffix("qkvz.weight"), name.endswith(".linear_attn.in_proj_qkvz.weight")
            if end and rows.shape[0] == all_rows.size:
                parted |= {f"{stem}qkv.weight": Selected(rows, np.concatenate(qkv)), f"{stem}z.weight": Selected(rows, gates)}
            elif end:
                raise DataError(f"tensor {name} has shape {list(rows.shape)}, config.json says {[all_rows.size, self.config.d_model]}")
            else:
                parted[name] = rows
        return parted


class Qwen35(_Hybrid):
    """Heads of values lie beside the head of keys that they share; llama.cpp repeats the keys as a whole, and wants the first of each, then the second."""

    gguf_name = "qwen35"
    model_arch = gguf.MODEL_ARCH.QWEN35
    classes: ClassVar[tuple[str, ...]] = ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration")

    def metadata(self) -> Metadata:
        sections = [*self.config.rope().get("mrope_section", (11, 11, 10)), 0, 0, 0, 0][:4]
        return {**super().metadata(), "rope.dimension_sections": sections}

    def _in_turns(self, width: int, before: int = 0) -> Indices:
        """Rows in llama.cpp's order: `before` as they are, then heads of `width` rows."""
        n_key, values_each = self._heads
        heads = np.arange(n_key * values_each * width).reshape(n_key, values_each, width)
        return np.concatenate([np.arange(before), before + heads.swapaxes(0, 1).ravel()])

    def _reordered(self, name: str, rows: Rows) -> Rows:
        rows, kind = super()._reordered(name, rows), name.split(".")[2] if name.startswith("blk.") else ""
        width, sizes = self.config.positive("linear_value_head_dim"), self.sizes()
        if kind in ("attn_qkv", "ssm_conv1d"):
            order = self._in_turns(width, sizes["delta_qkv"] - sizes["delta_value"])
        elif kind in ("attn_gate", "ssm_out"):
            order = self._in_turns(width)
        elif kind in ("ssm_a", "ssm_dt", "ssm_alpha", "ssm_beta"):
            order = self._in_turns(1)
        else:
            return rows
        if rows.shape[-1 if kind == "ssm_out" else 0] != len(order):
            return rows  # its shape is wrong, which is said later
        return SelectedColumns(rows, order) if kind == "ssm_out" else Selected(rows, order)


class Qwen35Moe(_MixtureOfExperts, Qwen35):
    gguf_name = "qwen35moe"
    model_arch = gguf.MODEL_ARCH.QWEN35MOE
    classes = ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration")
    defaults = {
        **_Hybrid.defaults,
        "hidden_size": 2048,
        "intermediate_size": 512,  # no such layer: the experts have sizes of their own
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
    }

    def __init__(self, config_json: Mapping[str, Any]) -> None:
        super().__init__(config_json)
        self._names_dense_size = "intermediate_size" in config_json

    def metadata(self) -> Metadata:
        return {key: value for key, value in super().metadata().items() if key != "feed_forward_length" or self._names_dense_size}
