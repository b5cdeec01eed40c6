"""What the converter must know of a model class, and how its checkpoint becomes the tensors and the metadata of a GGUF file.

An architecture is a class with a few attributes (see ``architectures/``): its names, the defaults of its config class, the tensors of a layer with their
shapes, and which of the three usual reorderings its weights need. Names of tensors come from gguf's TensorNameMap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import gguf

from gearcpp.errors import DataError, UnsupportedError

from .checkpoint import Checkpoint
from .config import Config
from .layout import text_part, with_stacked_experts
from .metadata import Metadata
from .rope import rope_metadata, rope_tensors
from .rows import RotaryPairs, Rows, Shifted, Transposed
from .vocabulary import Vocabulary

Shape = tuple[str, ...]  # of named sizes, see Architecture.sizes

ATTENTION: Mapping[str, Shape] = {
    "attn_norm": ("model",),
    "attn_q": ("query", "model"),
    "attn_k": ("kv", "model"),
    "attn_v": ("kv", "model"),
    "attn_output": ("model", "query"),
}
FEED_FORWARD: Mapping[str, Shape] = {
    "ffn_norm": ("model",),
    "ffn_gate": ("ff", "model"),
    "ffn_up": ("ff", "model"),
    "ffn_down": ("model", "ff"),
}
EXPERTS: Mapping[str, Shape] = {
    "ffn_norm": ("model",),
    "ffn_gate_inp": ("experts", "model"),
    "ffn_gate_exps": ("experts", "expert_ff", "model"),
    "ffn_up_exps": ("experts", "expert_ff", "model"),
    "ffn_down_exps": ("experts", "model", "expert_ff"),
}

# Tensors of a layer whose names do not end in ".weight".
ENDINGS: Mapping[str, str] = {"ssm_a": "", "ssm_d": "", "ssm_dt": ".bias", "exp_probs_b": ".bias", "scale": ""}

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+(?:\.\w+)??)(?:\.(?:weight|bias))?")
_MOST_LAYERS = 512  # llama.cpp's limit


class Architecture:
    """One model class (or several that share their layout). Instances are made for one config.json."""

    gguf_name: ClassVar[str]  # general.architecture
    model_arch: ClassVar[gguf.MODEL_ARCH]
    classes: ClassVar[tuple[str, ...]]  # "architectures" of config.json
    defaults: ClassVar[Mapping[str, Any]]  # of the config class, where the value matters here
    layer: ClassVar[Mapping[str, Shape]] = {**ATTENTION, **FEED_FORWARD}
    outside: ClassVar[Mapping[str, Shape]] = {"token_embd": ("vocab", "model"), "output_norm": ("model",)}
    rotary_pairs: ClassVar[bool] = False  # llama.cpp rotates neighbouring channels of this architecture
    norm_offset: ClassVar[float] = 0.0  # added to norm weights
    required_biases: ClassVar[frozenset[str]] = frozenset()  # tensors that llama.cpp does not load without a bias
    transposed: ClassVar[frozenset[str]] = frozenset()  # tensors stored as [in, out]
    ignored: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq",)  # endings of names that llama.cpp does not need
    renamed: ClassVar[Mapping[str, str]] = {}  # an ending of a tensor's name -> the one that gguf's map knows
    aliases: ClassVar[Mapping[str, str]] = {}  # the usual name of a config value <- the one this class gives it
    copied_keys: ClassVar[Mapping[str, tuple[str, type]]] = {}  # further GGUF keys (less the architecture) <- config names and their type
    endings: ClassVar[Mapping[str, str]] = ENDINGS
    pieces: ClassVar[str] = "llama"  # llama.cpp's name of a tokenizer of pieces with bytes to fall back to: "llama" joins by scores, "gemma4" by merges
    special_tokens: ClassVar[Mapping[str, str]] = {}  # bos, eos, eot ... <- their text, where tokenizer_config.json names none
    taken_for_granted: ClassVar[Mapping[str, tuple[Any, ...]]] = {"hidden_act": ("silu", "swish")}  # what llama.cpp computes, whatever the config says

    def __init__(self, config_json: Mapping[str, Any]) -> None:
        values = dict(config_json)
        values |= {name: values[alias] for name, alias in self.aliases.items() if alias in values}
        self.config = Config(values, self.defaults)
        for name, allowed in self.taken_for_granted.items():
            if name in self.config and self.config.get(name) not in allowed:
                raise UnsupportedError(
                    f"the model has {name} = {self.config.get(name)!r}, but llama.cpp computes {self.gguf_name} models with {allowed[0]!r}"
                )

    @classmethod
    def for_config(cls, config_json: Mapping[str, Any]) -> Architecture:
        """An instance; a class that llama.cpp knows under several names decides which it is."""
        return cls(config_json)

    def notices(self) -> list[str]:
        """What the user should know: where llama.cpp computes something else than transformers."""
        return []

    def layer_tensors(self, index: int) -> Mapping[str, Shape]:
        """The tensors of one layer: hybrids have layers of several kinds."""
        return self.layer

    def outside_tensors(self) -> Mapping[str, Shape]:
        """The tensors that belong to no layer."""
        return self.outside

    def may_lack(self, index: int, kind: str) -> bool:
        """Whether llama.cpp can do without a tensor of a layer."""
        return False

    def amend_vocabulary(self, vocabulary: Vocabulary) -> None:
        """What llama.cpp wants to know of this architecture's tokenizer and the tokenizer's files do not say."""
        ids = {token: index for index, token in enumerate(vocabulary.tokens)} if self.special_tokens else {}
        for name, text in self.special_tokens.items():
            if text in ids:
                vocabulary.special_ids.setdefault(name, ids[text])

    def sizes(self) -> dict[str, int]:
        """The sizes that shapes are made of.

        Raises:
            DataError: config.json lacks one, or they contradict each other.
        """
        config = self.config
        if config.n_layers > _MOST_LAYERS:
            raise DataError(f"config.json has {config.n_layers} layers, llama.cpp takes at most {_MOST_LAYERS}")
        if config.n_head % config.n_head_kv:
            raise DataError(f"config.json contradicts itself: {config.n_head} attention heads cannot share {config.n_head_kv} key-value heads")
        return {
            "vocab": config.positive("vocab_size"),
            "model": config.d_model,
            "query": config.n_head * config.d_head,
            "kv": config.n_head_kv * config.d_head,
            "head": config.d_head,
            "ff": config.positive("intermediate_size"),
        }

    def metadata(self) -> Metadata:
        """Keys of the architecture, without its name before them."""
        config = self.config
        values: Metadata = {
            "block_count": config.n_layers,
            "context_length": config.positive("max_position_embeddings"),
            "embedding_length": config.d_model,
            "feed_forward_length": config.positive("intermediate_size"),
            "attention.head_count": config.n_head,
            "attention.head_count_kv": config.n_head_kv,
            "attention.key_length": config.d_head,
            "attention.value_length": config.d_head,
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "vocab_size": config.positive("vocab_size"),
        }
        copied: Metadata = {key: kind(config[name]) for key, (name, kind) in self.copied_keys.items() if config.get(name) is not None}
        return {**values, **rope_metadata(config), **copied}

    def computed_tensors(self) -> dict[str, Rows]:
        """Tensors that no checkpoint has."""
        return rope_tensors(self.config)

    def tensors(self, checkpoint: Checkpoint) -> dict[str, Rows]:
        """The GGUF file's tensors by name, in the order of the layers, each reading from the checkpoint when asked.

        Raises:
            UnsupportedError: a tensor that this architecture does not have, or of a type that cannot be converted.
            DataError: a tensor is missing, comes twice, or contradicts config.json in its shape.
        """
        expected = self._expected_shapes()
        found = self._renamed(self._parted(self._stacked(text_part(checkpoint, self.ignored))))
        if self.config["tie_word_embeddings"]:
            found.pop("output.weight", None)
        else:
            _require_output(found)
        tensors = {}
        for name, (stored_name, stored) in found.items():
            tensors[name] = self._reordered(name, stored)
            _check_shape(stored_name, name, tensors[name].shape, expected)
        if missing := [name for name in self._required(expected) if name not in found]:
            raise DataError(f"the checkpoint lacks {len(missing)} tensors of a {self.gguf_name} model of {self.config.n_layers} layers: {_some(missing)}")
        return dict(sorted({**tensors, **self.computed_tensors()}.items(), key=lambda item: _file_order(item[0])))

    def _stacked(self, tensors: dict[str, Rows]) -> dict[str, Rows]:
        """The checkpoint's tensors, each matrix of the experts in one."""
        return with_stacked_experts(tensors, self.sizes().get("experts", 0))

    def _parted(self, tensors: dict[str, Rows]) -> dict[str, Rows]:
        """The checkpoint's tensors, those that llama.cpp has in several parts split."""
        return tensors

    def _renamed(self, tensors: Mapping[str, Rows]) -> dict[str, tuple[str, Rows]]:
        """GGUF name -> name in the checkpoint, tensor."""
        names = gguf.get_tensor_name_map(self.model_arch, self.config.n_layers)
        found: dict[str, tuple[str, Rows]] = {}
        for stored_name, stored in tensors.items():
            known = next((stored_name.removesuffix(old) + new for old, new in self.renamed.items() if stored_name.endswith(old)), stored_name)
            name = names.get_name(known, try_suffixes=(".weight", ".bias", ".scale"))
            if name is None:
                raise UnsupportedError(f"the checkpoint has {stored_name}, which a {self.gguf_name} model of {self.config.n_layers} layers does not have")
            if name in found:
                raise DataError(f"tensors {found[name][0]} and {stored_name} are both {name}: the checkpoint holds one twice")
            found[name] = stored_name, stored
        return found

    def _reordered(self, name: str, rows: Rows) -> Rows:
        match = _LAYER_TENSOR.fullmatch(name)
        kind = match[2] if match else ""
        if self.rotary_pairs and kind in ("attn_q", "attn_k") and rows.shape[0] % self.config.d_head == 0:
            return RotaryPairs(rows, self.config.d_head)
        if self.norm_offset and name.endswith("norm.weight"):
            return Shifted(rows, self.norm_offset)
        if kind in self.transposed and len(rows.shape) == 2:
            return Transposed(rows)
        return rows

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that may be there."""
        sizes = self.sizes()
        shapes: dict[str, Shape] = {**self.outside_tensors(), "output": ("vocab", "model")}
        for index in range(self.config.n_layers):
            shapes |= {f"blk.{index}.{kind}": shape for kind, shape in self.layer_tensors(index).items()}
        biased = {name: shape for name, shape in shapes.items() if len(shape) <= 2 or _kind(name) in self.required_biases}
        biases = {f"{name}.bias": tuple(sizes[size] for size in shape[: max(1, len(shape) - 1)]) for name, shape in biased.items()}
        weights = {name + self.endings.get(_kind(name), ".weight"): tuple(sizes[size] for size in shape) for name, shape in shapes.items()}
        return biases | weights

    def _required(self, expected: Iterable[str]) -> list[str]:
        """Those of the expected tensors that must be there: all but the output matrix and most biases."""
        biases = tuple(f".{kind}.bias" for kind in {*(kind for kind, ending in self.endings.items() if ending == ".bias"), *self.required_biases})
        return [
            name for name in expected if name != "output.weight" and (not name.endswith(".bias") or name.endswith(biases)) and not self._may_lack(name)
        ]

    def _may_lack(self, name: str) -> bool:
        match = _LAYER_TENSOR.fullmatch(name)
        return match is not None and self.may_lack(int(match[1]), match[2])


def _kind(name: str) -> str:
    """``attn_q`` of ``blk.0.attn_q``."""
    return name.rpartition(".")[2]


def _require_output(found: Mapping[str, object]) -> None:
    if "output.weight" not in found:
        raise DataError("the checkpoint has no output matrix (lm_head.weight), but config.json says that embeddings are not tied")


def _check_shape(stored_name: str, name: str, shape: tuple[int, ...], expected: Mapping[str, tuple[int, ...]]) -> None:
    if name not in expected:
        raise UnsupportedError(f"the checkpoint has {stored_name} ({name}), which llama.cpp does not read for this architecture")
    if shape != expected[name]:
        raise DataError(f"tensor {stored_name} has shape {list(shape)}, config.json says {list(expected[name])}")


def _file_order(name: str) -> tuple[int, int]:
    """The input first, then layers, then the output: as a model is read."""
    if match := _LAYER_TENSOR.fullmatch(name):
        return 1, int(match[1])
    return (2 if name.startswith("output") else 0), 0


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
