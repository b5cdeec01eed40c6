"""DeepSeek-V3 and what has its form (R1, V3.1, GLM-4.7-Flash): attention to one latent vector of each token (MLA)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from gearcpp.errors import DataError

from ..architecture import Shape
from ..metadata import Metadata
from ..rows import ColumnsOfEach, Reshaped, Rows, RowsOfEach
from .routed import Routed

_LATENT: Mapping[str, Shape] = {
    "attn_norm": ("model",),
    "attn_kv_a_mqa": ("latent_and_rotated", "model"),
    "attn_kv_a_norm": ("latent",),
    "attn_k_b": ("heads", "latent", "unrotated"),
    "attn_v_b": ("heads", "value_head", "latent"),
    "attn_output": ("model", "values"),
    "ffn_norm": ("model",),
}
_QUERY: Mapping[str, Shape] = {"attn_q": ("queries", "model")}
_LATENT_QUERY: Mapping[str, Shape] = {"attn_q_a": ("query_latent", "model"), "attn_q_a_norm": ("query_latent",), "attn_q_b": ("queries", "query_latent")}


class DeepseekV3(Routed):
    """llama.cpp multiplies the keys' expansion into the queries, the values' into the output, and wants the two apart."""

    gguf_name = "deepseek2"
    model_arch = gguf.MODEL_ARCH.DEEPSEEK2
    classes = ("DeepseekV3ForCausalLM",)
    attention = _LATENT
    taken_for_granted = {**Routed.taken_for_granted, "rope_interleave": (True,), "attention_bias": (False,)}
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
    }

    def layer_tensors(self, index: int) -> Mapping[str, Shape]:
        query = _QUERY if self.config.get("q_lora_rank") is None else _LATENT_QUERY
        return {**super().layer_tensors(index), **query}

    def sizes(self) -> dict[str, int]:
        config, n_head = self.config, self.config.n_head
        rotated, unrotated, value = (config.positive(name) for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        return {
            **super().sizes(),
            "heads": n_head,
            "queries": n_head * (rotated + unrotated),
            "query_latent": config.get("q_lora_rank") or 0,
            "latent": config.positive("kv_lora_rank"),
            "latent_and_rotated": config.positive("kv_lora_rank") + rotated,
            "unrotated": unrotated,
            "value_head": value,
            "values": n_head * value,
        }

    def metadata(self) -> Metadata:
        """To llama.cpp's cache a token has one key, the latent with what is rotated, and one value, the latent."""
        config, sizes, rope = self.config, self.sizes(), self.config.rope()
        values: Metadata = {
            **super().metadata(),
            "attention.head_count_kv": 1,
            "attention.key_length": sizes["latent_and_rotated"],
            "attention.value_length": sizes["latent"],
            "attention.key_length_mla": sizes["queries"] // sizes["heads"],
            "attention.value_length_mla": sizes["value_head"],
            "attention.kv_lora_rank": sizes["latent"],
            "rope.dimension_count": config.positive("qk_rope_head_dim"),
        }
        if sizes["query_latent"]:
            values["attention.q_lora_rank"] = sizes["query_latent"]
        if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim") is not None:
            values["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale_all_dim"])
        return values

    def _parted(self, tensors: dict[str, Rows]) -> dict[str, Rows]:
        sizes = self.sizes()
        key, both = sizes["unrotated"], sizes["unrotated"] + sizes["value_head"]
        parted: dict[str, Rows] = {}
        for name, rows in super()._parted(tensors).items():
            stem = name.removesuffix("kv_b_proj.weight")
            if stem == name:
                parted[name] = rows
                continue
            if rows.shape != (sizes["heads"] * both, sizes["latent"]):
                raise DataError(f"tensor {name} has shape {list(rows.shape)}, config.json says {[sizes['heads'] * both, sizes['latent']]}")
            heads = Reshaped(rows, (sizes["heads"], both, sizes["latent"]))
            parted |= {f"{stem}k_b_proj.weight": ColumnsOfEach(RowsOfEach(heads, 0, key)), f"{stem}v_b_proj.weight": RowsOfEach(heads, key, both)}
        return parted
