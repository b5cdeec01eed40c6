"""What a GGUF file says about its KV cache: `ModelInfo`, read from the metadata alone.

The native library must know every layer's KV heads and head sizes before llama.cpp makes the cache, whose tensors do not show them. Only the header is
read: no tensor, and of long arrays (a vocabulary) only the length.

Sources: the GGUF format (ggml/docs/gguf.md); which keys decide what is read off llama.cpp's llama-model.cpp, llama-hparams.cpp, llama-kv-cache*.cpp,
llama-memory-*.cpp and models/*.cpp, as llama-cpp-python 0.3.36 has them.

One file of more than 500 lines: a new architecture changes what is read, the rules, and what is told of it at once.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .errors import DataError, UnsupportedError

T = TypeVar("T")

# gguf_metadata_value_type -> struct format
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_LIST = 512  # llama.cpp's most layers; longer arrays are not per layer, and only their length is kept

# What no model has. llama.cpp makes memory and loops of these numbers, or aborts, before it compares them with the tensors that are there.
_SIZES = {  # key without the family: least and most
    "block_count": (1, _LONGEST_LIST),
    "embedding_length": (1, 2**20),
    "context_length": (1, 2**30),
    "feed_forward_length": (0, 2**24),
    "attention.head_count": (0, 2**16),
    "attention.head_count_kv": (0, 2**16),
    "attention.key_length": (0, 2**16),
    "attention.value_length": (0, 2**16),
    "attention.sliding_window": (0, 2**30),
    "rope.dimension_count": (0, 2**16),
    "expert_count": (0, 2**12),
    "expert_used_count": (0, 2**12),
    "vocab_size": (1, 2**27),
}
_REALS = {"attention.layer_norm_rms_epsilon": (0.0, 1.0), "attention.layer_norm_epsilon": (0.0, 1.0), "rope.freq_base": (0.0, 1e12)}
_ALWAYS_ROTATED = ("gemma", "llama", "mistral", "olmo", "phi", "qwen", "smollm")  # families by the beginning of their names
_MOST_TENSORS, _MOST_KEYS, _MOST_DIMS = 2**20, 2**20, 4

# Families that llama.cpp runs without a KV cache: nothing to compress, nothing to refuse.
_BERT = ("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert")
_DIFFUSION = ("dream", "llada", "llada-moe", "rnd1")
NO_CACHE = frozenset((*_BERT, *_DIFFUSION, "gemma-embedding", "wavtokenizer-dec"))
_RECURRENT = frozenset(("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"))
# Families whose attention does more with the cache than llama.cpp's flash attention.
_OTHER_ATTENTION = {
    "t5": "adds a position bias to the scores, which llama.cpp does without flash attention",
    "t5encoder": "adds a position bias to the scores, which llama.cpp does without flash attention",
    "grok": "runs without flash attention in llama.cpp",
    **dict.fromkeys(
        ("deepseek32", "deepseek4", "glm-dsa", "glm5-next", "hy_v4", "dots3note", "minimax-m3", "qwen4exp"),
        "chooses keys with an indexer that reads the cache directly",
    ),
}

# Families with sliding windows, where llama.cpp does not demand a list of them: every how many layers one has none, and whether it is the first of them
# (else the last). Families that are not here have windows where attention.sliding_window_pattern lists them.
_WINDOWS = {
    **dict.fromkeys(("gemma2", "gpt-oss"), (2, False)),
    **dict.fromkeys(("afmoe", "cohere2", "exaone-moe", "exaone4", "llama4", "mellum", "muse-glimmer", "olmo2"), (4, False)),
    **dict.fromkeys(("cohere2moe", "laguna", "smallthinker"), (4, True)),
    "gemma3n": (5, False),
    "gemma3": (6, False),
    "plamo3": (8, False),
    "lfm2": (0, False),  # all that have attention
}
_WINDOW_TOKENS = {"gemma2": 4096, "exaone4": 4096, "exaone-moe": 128}  # where the metadata do not say
_FIXED_WINDOW_TOKENS = {"llama4": 8192, "smallthinker": 4096}  # whatever the metadata say
_NO_WINDOWS = frozenset(("phi3", "lfm2moe"))  # llama.cpp takes no notice of the key
# Hybrids: attention in some layers, a recurrent state in the others, which are ...
_RECURRENT_WITHOUT_HEADS = frozenset(
    ("jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "kimi-linear", "kimi-k3", "bailingmoe3", "glm5-next")
)
_RECURRENT_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}  # all but each n-th
_RECURRENT_BESIDE_ATTENTION = frozenset(("falcon-h1",))  # all, beside their attention
_STATE_BYTES = 4  # f32


@dataclass(frozen=True)
class KVLayer:
    """One layer that may have a KV cache.

    Attributes:
        il: layer, as in llama.cpp's cache tensor ``cache_k_l<il>``.
        n_head_kv: KV heads.
        d_head_k, d_head_v: channels of a head. In latent attention (MLA) d_head_v is 0: V is the first channels of K, and has no cache of its own.
        certain: False where the metadata do not say whether llama.cpp makes a cache for it: layers of a hybrid that may be recurrent, and layers for
            multi-token prediction.
        window: tokens that a query sees, 0: all of them.
        cached: False where llama.cpp 0.3.36 makes no cache for it: a layer of a hybrid that is recurrent, and layers for multi-token prediction.
    """

    il: int
    n_head_kv: int
    d_head_k: int
    d_head_v: int
    certain: bool = True
    window: int = 0
    cached: bool = True

    @property
    def row_elements(self) -> int:
        """Numbers that a token takes."""
        return self.n_head_kv * (self.d_head_k + self.d_head_v)

    @property
    def v_in_k(self) -> bool:
        """Whether V has no cache of its own, but is the first channels of K's rows (MLA)."""
        return self.d_head_v == 0


@dataclass(frozen=True)
class LongArray:
    """A metadata array of which only the length was read."""

    length: int


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as a GGUF file lists it.

    Attributes:
        name: its name.
        type: number of its type in ggml.h.
        shape: sizes, rows first, as numpy has them.
    """

    name: str
    type: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What the metadata of a GGUF model say.

    Attributes:
        path: the file; of a split model the first one.
        files: all files of the model.
        arch: llama.cpp's name of the architecture.
        metadata: every key; long arrays as `LongArray`.
        n_layer, n_embd, n_ctx_train, n_vocab: sizes; n_vocab 0 when the file has no vocabulary.
        n_head: query heads of the first layer that has any.
        layers: layers that may have a KV cache, empty for families that have none.
        recurrent: layers with a recurrent state.
        state_bytes: what that takes for each sequence, in all of them together.
        shared: layers that read the cache of an earlier layer, and which.
    """

    path: Path
    files: tuple[Path, ...]
    arch: str
    metadata: Mapping[str, Any]
    n_layer: int
    n_embd: int
    n_ctx_train: int
    n_vocab: int
    n_head: int
    layers: tuple[KVLayer, ...]
    recurrent: tuple[int, ...] = ()
    state_bytes: int = 0
    shared: Mapping[int, int] = field(default_factory=dict)

    @property
    def cached_layers(self) -> tuple[KVLayer, ...]:
        """The layers that llama.cpp makes a cache for."""
        return tuple(layer for layer in self.layers if layer.cached)

    @property
    def is_latent(self) -> bool:
        """Whether it uses multi-head latent attention (MLA): the cache holds one vector a token, which is K and, in its first channels, V."""
        return any(layer.d_head_v == 0 for layer in self.layers)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template."""
        return "tokenizer.chat_template" in self.metadata

    @property
    def rope_freq_base(self) -> float:
        """The base of RoPE that the model was trained with."""
        return float(self.metadata.get(f"{self.arch}.rope.freq_base", 10000.0))  # llama.cpp's default, too

    def check_gear(self) -> None:
        """Raise UnsupportedError when a GEAR cache cannot serve this family, naming it and what to do."""
        if self.arch in _RECURRENT:
            raise UnsupportedError(f"{self.path.name}: {self.arch} models are recurrent and have no KV cache to compress; use kv_type='f16'")
        if self.arch in _OTHER_ATTENTION:
            raise UnsupportedError(f"{self.path.name}: {self.arch} {_OTHER_ATTENTION[self.arch]}; use kv_type='f16'")

    def kv_elements(self, n_ctx: int) -> int:
        """Numbers in K and V of a full-size cache for ``n_ctx`` tokens."""
        return sum(n_ctx * layer.row_elements for layer in self.cached_layers)


def read_model_info(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> ModelInfo:
    """Read a model's metadata.

    Args:
        path: a GGUF file, or the first one of a split model.
        overrides: metadata to take instead of the file's (``kv_overrides`` of llama-cpp-python).

    Raises:
        DataError: the file is missing, unreadable, not GGUF, truncated, or lacks what every model has.
    """
    file = Path(path)
    metadata = {**_read_metadata(file), **(overrides or {})}
    files = _split_files(file, metadata)
    return _Reader(file, metadata).info(files)


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], tuple[TensorHeader, ...]]:
    """Metadata and list of tensors of any GGUF file, a model or not. Lists of texts are there where they are short; longer ones are a `LongArray`.

    Raises:
        DataError: the file is missing, unreadable, not GGUF, or damaged in its header.
    """
    return _opened(Path(path), lambda header: (header.metadata(with_texts=True), header.tensors()))


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The GGUF header
# ---------------------------------------------------------------------------------------------------------------------------------------------


class _Header:
    """Reads values one after the other from a GGUF file; struct.error and ValueError mean that it ended or is damaged."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.data, self.at = data, 4
        if data[:4] != b"GGUF":
            raise DataError(f"{file} is not a GGUF model (it does not start with 'GGUF')")
        version = self.scalar("I")
        if version not in (2, 3):
            raise DataError(f"{file} has GGUF version {version}; versions 2 and 3 (little-endian) can be read. Convert the model again")
        self.n_tensors, self.n_keys = self.scalar("Q"), self.scalar("Q")
        if self.n_tensors > _MOST_TENSORS or self.n_keys > _MOST_KEYS:
            raise ValueError(f"its header speaks of {self.n_tensors} tensors and {self.n_keys} keys")

    def metadata(self, *, with_texts: bool = False) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(self.n_keys):
            key = self.string()
            metadata[key] = self.value(with_texts)
        return metadata

    def tensors(self) -> tuple[TensorHeader, ...]:
        """What follows the metadata."""
        return tuple(self.tensor() for _ in range(self.n_tensors))

    def tensor(self) -> TensorHeader:
        name, n_dims = self.string(), self.scalar("I")
        if n_dims > _MOST_DIMS:
            raise ValueError(f"its tensor {name!r} has {n_dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(n_dims))
        kind, _ = self.scalar("I"), self.scalar("Q")
        if math.prod(shape) >= 2**63:
            raise ValueError(f"its tensor {name!r} has sizes {list(shape)}")
        return TensorHeader(name, kind, shape[::-1])

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def skip(self, n_bytes: int) -> int:
        start, self.at = self.at, self.at + n_bytes
        if self.at > len(self.data):
            raise ValueError("it ends inside a value")
        return start

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.skip(length)
        return self.data[start : self.at].decode("utf-8", "replace")

    def value(self, with_texts: bool) -> Any:
        kind = self.scalar("I")
        if kind == _ARRAY:
            return self.array(with_texts)
        return self.string() if kind == _STRING else self.scalar(self.scalar_format(kind))

    def array(self, with_texts: bool) -> Any:
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind == _STRING and with_texts and length <= _LONGEST_LIST:
            return [self.string() for _ in range(length)]
        if kind == _STRING:
            for _ in range(length):
                self.skip(self.scalar("Q"))
            return LongArray(length)
        form = self.scalar_format(kind)
        start = self.skip(length * struct.calcsize("<" + form))
        return list(struct.unpack_from(f"<{length}{form}", self.data, start)) if length <= _LONGEST_LIST else LongArray(length)

    def scalar_format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"it has a metadata value of unknown type {kind}")
        return _SCALARS[kind]


def _read_metadata(file: Path) -> dict[str, Any]:
    return _opened(file, lambda header: header.metadata())


def _opened(file: Path, read: Callable[[_Header], T]) -> T:
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty; get it again")
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read(_Header(file, data))
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"there is no file {file}; check the path of the model") from None
    except IsADirectoryError:
        raise DataError(f"{file} is a folder, not a GGUF file; a Hugging Face model folder is turned into one by `gearcpp convert {file}`") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, OverflowError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it ends inside its header"
        raise DataError(f"{file} is damaged or was not downloaded completely: {reason}; get it again") from error


def _split_files(file: Path, metadata: Mapping[str, Any]) -> tuple[Path, ...]:
    count = metadata.get("split.count", 1)
    if count <= 1:
        return (file,)
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", file.name)
    if not match or int(match[3]) != count:
        raise DataError(
            f"{file} is part of a model split into {count} files; llama.cpp finds the others only under the name NAME-00001-of-{count:05}.gguf"
        )
    files = tuple(file.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count))
    if metadata.get("split.no", 0) != 0:
        raise DataError(f"{file} is part {metadata['split.no'] + 1} of {count}; load the first one, {files[0].name}")
    absent = [part.name for part in files if not part.exists()]
    if absent:
        raise DataError(f"{file} is split into {count} files, of which {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing beside it")
    return files


# ---------------------------------------------------------------------------------------------------------------------------------------------
# What the keys mean
# ---------------------------------------------------------------------------------------------------------------------------------------------


class _Reader:
    """Looks up a model's keys and makes the per-layer head table of them."""

    def __init__(self, file: Path, metadata: Mapping[str, Any]) -> None:
        self.file, self.metadata = file, metadata
        self.arch = str(self.required("general.architecture"))

    def required(self, key: str) -> Any:
        if key not in self.metadata:
            raise DataError(f"{self.file} has no {key}: it is not a language model that llama.cpp could load (a LoRA adapter or projector, perhaps?)")
        return self.metadata[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: int = 0) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or not 0 <= value < 2**31:
            raise DataError(f"{self.file} is damaged: {self.arch}.{key} is {value!r}, which is not a size")
        return value

    def per_layer(self, key: str, n_layer: int, default: list[int]) -> list[int]:
        """A key that may be one number for all layers or one for each."""
        if not isinstance(self.get(key), list):
            return default if self.get(key) is None else [self.number(key)] * n_layer
        values: list[int] = self.get(key)
        if len(values) != n_layer or not all(isinstance(value, int) and 0 <= value < 2**16 for value in values):
            raise DataError(f"{self.file} is damaged: {self.arch}.{key} should hold one number for each of the {n_layer} layers")
        return values

    def info(self, files: tuple[Path, ...]) -> ModelInfo:
        for key in ("block_count", "embedding_length"):
            self.required(f"{self.arch}.{key}")
        self.check_sizes()
        n_layer, n_embd = self.number("block_count"), self.number("embedding_length")
        n_head = self.per_layer("attention.head_count", n_layer, [0] * n_layer)
        return ModelInfo(
            path=self.file,
            files=files,
            arch=self.arch,
            metadata=self.metadata,
            n_layer=n_layer,
            n_embd=n_embd,
            n_ctx_train=self.number("context_length"),
            n_vocab=_length(self.metadata.get("tokenizer.ggml.tokens")),
            n_head=next((n for n in n_head if n), 0),
            layers=self.layers(n_layer, n_embd, n_head),
            recurrent=(recurrent := self.recurrent(n_layer, n_head)),
            state_bytes=_STATE_BYTES * len(recurrent) * self.state_elements(n_embd, next(iter(n_head), 0)),
            shared=self.shared(n_layer),
        )

    def check_sizes(self) -> None:
        """Raise DataError for a number that no model has."""
        for key, (low, high) in _SIZES.items():
            given = self.get(key)
            for value in given if isinstance(given, list) else [] if given is None or isinstance(given, LongArray) else [given]:
                if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                    raise DataError(f"{self.file} is damaged: {self.arch}.{key} is {value!r}; models have {low} to {high}")

        for key, (least, most) in _REALS.items():
            value = self.get(key, least)
            if not isinstance(value, (int, float)) or not least <= value <= most:
                raise DataError(f"{self.file} is damaged: {self.arch}.{key} is {value!r}; models have {least:g} to {most:g}")

    def layers(self, n_layer: int, n_embd: int, n_head: list[int]) -> tuple[KVLayer, ...]:
        if self.arch in NO_CACHE or self.arch in _RECURRENT:
            return ()
        n_head_kv = self.per_layer("attention.head_count_kv", n_layer, n_head)
        # llama.cpp's default for a head's size looks at the first layer's heads.
        default = n_embd // n_head[0] if n_head and n_head[0] else 0
        d_head = [self.number(f"attention.{name}_length", default) for name in ("key", "value")]
        d_head_swa = [self.number(f"attention.{name}_length_swa", d) for name, d in zip(("key", "value"), d_head, strict=True)]
        self.check_rotated(max(d_head[0], d_head_swa[0]))
        if self.number("attention.key_length_mla"):
            d_head[1] = d_head_swa[1] = 0
        windows = self.windows(n_layer, must_list=d_head_swa != d_head)
        n_own = self.n_layers_with_own_cache(n_layer)
        n_main = n_layer - self.number("nextn_predict_layers")
        may_be_recurrent = self.arch in _RECURRENT_INTERVAL or self.number("full_attention_interval") > 0
        recurrent = set() if self.arch in _RECURRENT_BESIDE_ATTENTION else set(self.recurrent(n_layer, n_head))
        return tuple(
            KVLayer(
                il,
                n_head_kv[il],
                d_head_k,
                d_head_v,
                certain=il < n_main and not may_be_recurrent,
                window=windows[il],
                cached=il < n_main and il not in recurrent,
            )
            for il in range(n_own)
            for d_head_k, d_head_v in [d_head_swa if windows[il] else d_head]
            if n_head_kv[il] > 0
        )

    def recurrent(self, n_layer: int, n_head: list[int]) -> tuple[int, ...]:
        """Layers with a recurrent state."""
        n_main = n_layer - self.number("nextn_predict_layers")
        main = range(max(n_main, 0))
        if self.arch in _RECURRENT or self.arch in _RECURRENT_BESIDE_ATTENTION:
            return tuple(range(n_layer))
        if self.arch in _RECURRENT_WITHOUT_HEADS:
            n_head_kv = self.per_layer("attention.head_count_kv", n_layer, n_head)
            n_ff = self.per_layer("feed_forward_length", n_layer, [0] * n_layer) if self.arch.startswith("nemotron_h") else [0] * n_layer
            return tuple(il for il in main if n_head_kv[il] == 0 and n_ff[il] == 0)
        if self.arch in _RECURRENT_INTERVAL:
            listed = self.get("attention.recurrent_layers")
            if isinstance(listed, list):
                return tuple(il for il in main if il < len(listed) and listed[il])
            interval = self.number("full_attention_interval", _RECURRENT_INTERVAL[self.arch])
            return tuple(il for il in main if interval and (il + 1) % interval)
        return ()

    def state_elements(self, n_embd: int, n_head: int) -> int:
        """Numbers that a recurrent layer keeps for a sequence (llama_hparams::n_embd_r and n_embd_s)."""
        if wkv := self.number("wkv.head_size"):
            return n_embd * (self.number("token_shift_count", 2) + wkv)
        d_conv = self.number("ssm.conv_kernel")
        d_inner, d_state, n_group = (self.number(f"ssm.{name}") for name in ("inner_size", "state_size", "group_count"))
        if n_conv := self.number("shortconv.l_cache"):
            return n_embd * (n_conv - 1) + d_state * d_inner
        if d_kda := self.number("kda.head_dim"):
            return 3 * (d_conv - 1 if d_conv else 3) * n_head * d_kda + d_kda * d_kda * n_head
        convolved = max(d_conv - 1, 0) * (d_inner + 2 * n_group * d_state)
        if self.arch == "minimax-01":
            return convolved + self.number("attention.key_length", n_embd // max(n_head, 1)) ** 2 * n_head
        return convolved + d_state * d_inner

    def shared(self, n_layer: int) -> dict[int, int]:
        """Layers without a cache of their own, and the layer whose cache they read: the last one of their kind that has one."""
        n_own = self.n_layers_with_own_cache(n_layer)
        if n_own < 2 or n_own == n_layer:
            return {}
        windows = self.windows(n_layer)
        return {il: n_own - (2 if windows[il] else 1) for il in range(n_own, n_layer)}

    def check_rotated(self, d_head: int) -> None:
        """Raise DataError when the channels that RoPE turns are not pairs within a head: llama.cpp aborts, or goes round for ever."""
        n_rot = self.get("rope.dimension_count")
        if n_rot is not None and d_head and (n_rot % 2 or n_rot > d_head or (n_rot == 0 and self.arch.startswith(_ALWAYS_ROTATED))):
            raise DataError(f"{self.file} is damaged: {self.arch}.rope.dimension_count is {n_rot}; heads of {d_head} turn an even number up to that")

    def windows(self, n_layer: int, *, must_list: bool = False) -> list[int]:
        """For each layer how many tokens its sliding window has, 0: none.

        Args:
            must_list: the family gives layers with a window another head size, so that it has to be known which they are.
        """
        n_window = _FIXED_WINDOW_TOKENS.get(self.arch, self.number("attention.sliding_window", _WINDOW_TOKENS.get(self.arch, 0)))
        if self.arch in _NO_WINDOWS or (self.arch in _FIXED_WINDOW_TOKENS and self.get("attention.sliding_window") == 0):
            n_window = 0
        if self.arch == "smallthinker" and not self.get("attention.sliding_window"):
            n_window = 0
        if self.arch == "exaone4" and n_layer != 64:  # only the model of 32B has them
            n_window = 0
        if not n_window and not must_list:
            return [0] * n_layer
        n_window = n_window or 2**30
        n_main = n_layer - self.number("nextn_predict_layers")
        pattern = self.get("attention.sliding_window_pattern")
        if isinstance(pattern, list) and len(pattern) >= n_layer:
            return [n_window if p else 0 for p in pattern[:n_layer]]
        if (isinstance(pattern, bool) or not isinstance(pattern, int)) and self.arch in _WINDOWS:
            pattern = _WINDOWS[self.arch][0]
        elif self.arch not in _WINDOWS and not must_list:
            return [0] * n_layer  # llama.cpp does not look at the window of this family
        if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 0:
            without = 0 if _WINDOWS.get(self.arch, (0, False))[1] else pattern - 1
            return [n_window if il < n_main and (pattern == 0 or il % pattern != without) else 0 for il in range(n_layer)]
        raise DataError(f"{self.file} gives sliding-window layers another head size, but {self.arch}.attention.sliding_window_pattern does not say which")

    def n_layers_with_own_cache(self, n_layer: int) -> int:
        """Layers from the start that keep a cache of their own; the later ones read an earlier layer's."""
        if self.arch == "gemma3n":
            return min(20, n_layer)
        return max(n_layer - self.number("attention.shared_kv_layers"), 0)


def _length(array: Any) -> int:
    return array.length if isinstance(array, LongArray) else len(array or ())


def file_fingerprint(path: Path) -> str:
    """SHA-256 over a file's size, its first MiB (metadata) and 64 samples of 64 KiB spread over it: fast for models of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        n_bytes = file.seek(0, os.SEEK_END)
        digest.update(struct.pack("<Q", n_bytes))
        for offset, length in [(0, 2**20), *((i * n_bytes // 64, 2**16) for i in range(64))]:
            file.seek(offset)
            digest.update(file.read(length))
    return digest.hexdigest()
