"""Falcon-H1: every layer attends and computes Mamba 2, side by side."""

from collections.abc import Mapping

import gguf
import numpy as np

from gearcpp.errors import DataError, UnsupportedError

from ..architecture import ATTENTION, ENDINGS, FEED_FORWARD, Shape
from ..rows import Mapped, Rows, ScaledRows
from .mamba import MAMBA2, Mamba2


class FalconH1(Mamba2):
    """Its many multipliers are no part of llama.cpp's graph: they are multiplied into the weights."""

    gguf_name = "falcon-h1"
    model_arch = gguf.MODEL_ARCH.FALCON_H1
    classes = ("FalconH1ForCausalLM",)
    layer = {**ATTENTION, **MAMBA2, **FEED_FORWARD}
    endings = {**ENDINGS, "ffn_norm": ""}  # as llama.cpp has it
    taken_for_granted = {
        **Mamba2.taken_for_granted,
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "projectors_bias": (False,),
        "tie_word_embeddings": (False,),  # the two have multipliers of their own
    }
    defaults = {
        "vocab_size": 128000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "mamba_d_ssm": 1024,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_rms_norm": False,
        "mamba_norm_before_gate": True,
        "embedding_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
        "key_multiplier": 1.0,
        "ssm_in_multiplier": 1.0,
        "ssm_out_multiplier": 1.0,
        "mlp_multipliers": [1.0, 1.0],
        "ssm_multipliers": [1.0] * 5,
    }

    def layer_tensors(self, index: int) -> Mapping[str, Shape]:
        if not self.config["mamba_rms_norm"]:
            return {kind: shape for kind, shape in self.layer.items() if kind != "ssm_norm"}
        if self.config["mamba_norm_before_gate"]:
            raise UnsupportedError("the model normalizes what Mamba computes before the gate (mamba_norm_before_gate), llama.cpp does so after it")
        return self.layer

    def ssm_inner(self) -> int:
        return super().ssm_inner() if self.config.get("mamba_d_ssm") is None else self.config.positive("mamba_d_ssm")

    def _multipliers(self, kind: str) -> list[float]:
        config = self.config
        gate, down = config["mlp_multipliers"]
        before = config["attention_in_multiplier"]
        return {
            "token_embd": [config["embedding_multiplier"]],
            "output": [config["lm_head_multiplier"]],
            "attn_q": [before],
            "attn_k": [config["key_multiplier"], before],
            "attn_v": [before],
            "attn_output": [config["attention_out_multiplier"]],
            "ffn_gate": [gate],
            "ffn_down": [down],
            "ssm_in": [config["ssm_in_multiplier"]],
            "ssm_out": [config["ssm_out_multiplier"]],
        }.get(kind, [])

    def _reordered(self, name: str, rows: Rows) -> Rows:
        kind, rows = name.removesuffix(".weight").rpartition(".")[2], super()._reordered(name, rows)
        for multiplier in self._multipliers(kind):
            rows = _times(rows, multiplier)
        return ScaledRows(rows, self._of_the_projection()) if kind == "ssm_in" and rows.shape[0] == self.sizes()["ssm_projection"] else rows

    def _of_the_projection(self) -> list[float]:
        """The multiplier of each row of Mamba's input: the gate's, the input's, those of what is written and read, the step's."""
        sizes, multipliers = self.sizes(), self.config["ssm_multipliers"]
        state = sizes["ssm_groups"] * self.config.positive("mamba_d_state")
        widths = (sizes["ssm_inner"], sizes["ssm_inner"], state, state, sizes["ssm_heads"])
        if len(multipliers) != len(widths):
            raise DataError(f"config.json has {len(multipliers)} ssm_multipliers, not one for each of {len(widths)} parts")
        return [multiplier for multiplier, width in zip(multipliers, widths, strict=True) for _ in range(width)]


def _times(rows: Rows, multiplier: float) -> Rows:
    return Mapped(rows, lambda block: block * np.float32(multiplier))
