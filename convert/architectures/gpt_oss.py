"""OpenAI's gpt-oss."""

from collections.abc import Mapping

import gguf

from ..architecture import ATTENTION, EXPERTS, Architecture, Shape
from ..checkpoint import Checkpoint, with_mxfp4
from ..metadata import Metadata
from ..mxfp4 import Mxfp4
from ..rows import ColumnsOfEach, Rows, SelectedColumns

_FEED_FORWARD: Mapping[str, Shape] = {kind: shape for kind, shape in EXPERTS.items() if kind != "ffn_norm"}  # the norm is post_attention_norm here


class GptOss(Architecture):
    """Every other layer has a window, every head a sink; experts have biases, and are stored transposed or as MXFP4, gate and up in turns."""

    gguf_name = "gpt-oss"
    model_arch = gguf.MODEL_ARCH.GPT_OSS
    classes = ("GptOssForCausalLM",)
    layer = {**ATTENTION, "post_attention_norm": ("model",), "attn_sinks": ("heads",), **_FEED_FORWARD}
    required_biases = frozenset(("attn_output", *_FEED_FORWARD))
    renamed = {".self_attn.sinks": ".self_attn.sinks.weight"}
    aliases = {"num_local_experts": "num_experts"}
    copied_keys = {
        "attention.sliding_window": ("sliding_window", int),
        "expert_count": ("num_local_experts", int),
        "expert_used_count": ("num_experts_per_tok", int),
        "expert_feed_forward_length": ("intermediate_size", int),
    }
    taken_for_granted = {**Architecture.taken_for_granted, "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)}
    defaults = {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    }

    def notices(self) -> list[str]:
        rope = self.config.rope()
        if rope["rope_type"] != "yarn" or rope.get("truncate", True):
            return []
        return ["the model's YaRN begins and ends between two channels (truncate = false), llama.cpp rounds that to whole channels, and its logits differ"]

    def sizes(self) -> dict[str, int]:
        config = self.config
        return {
            **super().sizes(),
            "heads": config.n_head,
            "experts": config.positive("num_local_experts"),
            "expert_ff": config.positive("intermediate_size"),
        }

    def metadata(self) -> Metadata:
        usual = ["full_attention" if index % 2 else "sliding_attention" for index in range(self.config.n_layers)]
        kinds = self.config.get("layer_types") or usual
        pattern: Metadata = {} if kinds == usual else {"attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds]}
        return {**super().metadata(), **pattern}

    def tensors(self, checkpoint: Checkpoint) -> dict[str, Rows]:
        """Experts of MXFP4, as they are published, keep their bits."""
        return super().tensors(with_mxfp4(checkpoint))

    def _stacked(self, tensors: dict[str, Rows]) -> dict[str, Rows]:
        parted: dict[str, Rows] = {}
        for name, rows in tensors.items():
            stem, _, kind = name.rpartition(".experts.")
            if not stem:
                parted[name] = rows
            elif kind == "down_proj":
                parted[f"{name}.weight"] = rows if isinstance(rows, Mxfp4) else ColumnsOfEach(rows)
            elif kind == "gate_up_proj":
                for first, half in enumerate(("gate", "up")):
                    chosen = rows.rows_of_each(first, 2) if isinstance(rows, Mxfp4) else ColumnsOfEach(rows, first, 2)
                    parted[f"{stem}.experts.{half}_proj.weight"] = chosen
            elif kind == "gate_up_proj_bias":
                for first, half in enumerate(("gate", "up")):
                    parted[f"{stem}.experts.{half}_proj.bias"] = SelectedColumns(rows, range(rows.n_columns)[first::2])
            else:
                parted[f"{name.removesuffix('_bias')}.bias" if name.endswith("_bias") else name] = rows
        return parted
