"""LFM2 (dense)."""

from collections.abc import Mapping

import gguf

from ..architecture import ATTENTION, FEED_FORWARD, Architecture, Shape
from ..layout import squeezed
from ..metadata import Metadata
from ..rows import Rows

_CONVOLUTION: Mapping[str, Shape] = {
    "attn_norm": ("model",),
    "shortconv.conv": ("model", "window"),
    "shortconv.in_proj": ("conv_in", "model"),
    "shortconv.out_proj": ("model", "model"),
}


class Lfm2(Architecture):
    """Layers of attention among layers of a short convolution."""

    gguf_name = "lfm2"
    model_arch = gguf.MODEL_ARCH.LFM2
    classes = ("Lfm2ForCausalLM",)
    outside = {"token_embd": ("vocab", "model"), "token_embd_norm": ("model",)}
    aliases = {"rms_norm_eps": "norm_eps", "intermediate_size": "block_ff_dim", "tie_word_embeddings": "tie_embedding"}
    taken_for_granted = {"conv_bias": (False,)}
    copied_keys = {"shortconv.l_cache": ("conv_L_cache", int)}
    defaults = {
        "vocab_size": 65536,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "conv_L_cache": 3,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "tie_word_embeddings": True,
    }

    @property
    def _attends(self) -> list[bool]:
        config = self.config
        if kinds := config.get("layer_types"):
            return [kind == "full_attention" for kind in kinds]
        indices = config.get("full_attn_idxs")
        return [indices is None or index in indices for index in range(config.n_layers)]

    @property
    def _d_feed_forward(self) -> int:
        config = self.config
        width = config.positive("intermediate_size")
        if not config["block_auto_adjust_ff_dim"]:
            return width
        width = int(2 * width / 3)
        if config.get("block_ffn_dim_multiplier") is not None:
            width = int(config["block_ffn_dim_multiplier"] * width)
        multiple = config.positive("block_multiple_of")
        return multiple * -(-width // multiple)

    def layer_tensors(self, index: int) -> Mapping[str, Shape]:
        attention = {**ATTENTION, "attn_q_norm": ("head",), "attn_k_norm": ("head",)}
        return {**(attention if self._attends[index] else _CONVOLUTION), **FEED_FORWARD}

    def sizes(self) -> dict[str, int]:
        config = self.config
        return {**super().sizes(), "ff": self._d_feed_forward, "conv_in": 3 * config.d_model, "window": config.positive("conv_L_cache")}

    def metadata(self) -> Metadata:
        heads = [self.config.n_head_kv if attends else 0 for attends in self._attends]
        return {**super().metadata(), "feed_forward_length": self._d_feed_forward, "attention.head_count_kv": heads}

    def _reordered(self, name: str, rows: Rows) -> Rows:
        return squeezed(rows) if ".shortconv.conv." in name else super()._reordered(name, rows)
