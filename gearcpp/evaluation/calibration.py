"""Reading a calibration text with a real model: what KVQuant and CQ learn from, keys as they were before RoPE."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache.kv_type import KVType
from ..config import GearConfig
from ..errors import ConfigError, DataError, UnsupportedError
from ..reference.methods.rope import Rope
from ..reference.registry import Recorder

if TYPE_CHECKING:
    from ..model_info import ModelInfo
    from ..runtime.llama import Llama

N_CTX = 2048  # tokens of a chunk, as in both papers
N_UBATCH = 128
# Mean squared difference between keys that should be equal, over their mean square. f16 gives 4e-8 (books-6m), a wrong angle nearly 1.
_NEARLY_EQUAL = 1e-3


def record(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    n_token: int = 4096,
    n_chunk: int = 16,
    n_threads: int | None = None,
) -> Recorder:
    """Read a text with a model whose cache stays f16, and remember a sample of its keys before RoPE and of its values.

    The papers of KVQuant and CQ read 16 chunks of 2048 tokens of WikiText-2; so does this, but k-means on all of them would take long, so a random sample
    of the rows of every tile is kept. Rows that are still exact at the end of a chunk are not seen, nor are the first four (attention sinks).

    How the model turns its keys is taken from its metadata and from llama.cpp, and tried first: a chunk of one token again and again has the same keys at
    all positions in every layer once RoPE is undone. A model where it has not is refused.

    Args:
        model: GGUF file.
        text: UTF-8 text; not the one that is measured later.
        n_token: tokens to remember of each head, about.
        n_chunk: chunks of 2048 tokens to read at most.
        n_threads: None: llama-cpp-python's choice.

    Raises:
        ConfigError: a number is out of range.
        DataError: the model or the text cannot be read, or the text has less than one chunk.
        UnsupportedError: its RoPE cannot be undone; the message says why.
    """
    import llama_cpp

    from ..runtime.llama import Llama
    from .text import read_text

    if n_token < 1 or n_chunk < 1:
        raise ConfigError(f"n_token and n_chunk must be 1 or more, not {n_token} and {n_chunk}")
    data = read_text(text)
    tap = _Tap()
    llm = Llama(
        str(model),
        kv_type=KVType("recorder", GearConfig(n_tail=0), method=tap),
        n_ctx=N_CTX,
        n_batch=N_UBATCH,
        n_ubatch=N_UBATCH,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        swa_full=True,  # windows are packed, too, and have something to show
        verbose=False,
    )
    try:
        tokens = llm.tokenize(data)
        n_chunk = min(n_chunk, len(tokens) // N_CTX)
        if n_chunk == 0:
            raise DataError(f"{text} has {len(tokens)} tokens, too few to calibrate on: give a text of {N_CTX} or more")
        rope = rope_of(llm.info, llama_cpp.llama_model_rope_type(llm.model))
        if rope:
            _check_rope(llm, rope, tokens[len(tokens) // 2], tap)
        rows_per_tile = math.ceil(n_token * GearConfig.tile / (n_chunk * N_CTX))
        recorder = Recorder(rope, rows_per_tile)
        tap.recorder = recorder
        for i in range(n_chunk):
            _read(llm, tokens[i * N_CTX : (i + 1) * N_CTX])
    finally:
        llm.close()
    if not recorder.n_token:
        raise UnsupportedError(f"{llm.info.path.name}: no cache of this model is packed within {N_CTX} tokens, so there is nothing to calibrate on")
    recorder.source = f"{recorder.n_token} tokens of each head, out of {n_chunk} chunks of {N_CTX} of {Path(text).name}"
    return recorder


@dataclass(eq=False)
class _Tap:
    """The method that the model is loaded with: it hands tiles on to a recorder that is made later, when the model is there to be asked about its RoPE."""

    recorder: Recorder = field(default_factory=Recorder)
    name: str = "recorder"
    tile: int | None = None

    def __call__(
        self,
        side: str,
        x: npt.ArrayLike,
        written: npt.ArrayLike | None = None,
        positions: npt.ArrayLike | None = None,
        *,
        layer: int = 0,
        head: int = 0,
    ) -> tuple[npt.NDArray[np.float32], float]:
        return self.recorder(side, x, written, positions, layer=layer, head=head)


def _read(llm: Llama, tokens: list[int]) -> None:
    """Read a chunk into an empty cache."""
    llm.reset()
    llm._ctx.kv_cache_clear()
    llm.eval(tokens)


def _check_rope(llm: Llama, rope: Rope, token: int, tap: _Tap) -> None:
    """Raise UnsupportedError unless a token that is read again and again has equal keys in every layer once RoPE is undone.

    All positions then see nothing but equal tokens, so attention gives the same at each of them, and only RoPE tells their keys apart.
    """
    tap.recorder = Recorder(rope, rows_per_tile=16)
    _read(llm, [token] * N_CTX)
    for layer in tap.recorder.layers():
        keys = tap.recorder.rows("k", layer)  # [n_head, n, d]
        if (spread := _spread(keys)) > _NEARLY_EQUAL:
            raise UnsupportedError(
                f"{llm.info.path.name}: methods that code keys before RoPE cannot be tried on this {llm.info.arch} model: the keys of layer {layer} are "
                f"not turned in the way that its metadata say ({rope}); with that undone, equal tokens still differ by {spread:.1%} of their energy"
            )


def _spread(keys: Tensor) -> float:
    return float((keys - keys.mean(-2, keepdim=True)).square().sum() / keys.square().sum().clamp_min(1e-30))


def rope_of(info: ModelInfo, kind: int) -> Rope | None:
    """How a model turns its keys.

    Args:
        info: its metadata.
        kind: what ``llama_model_rope_type`` says: the order of the pairs.

    Returns:
        None for a model without RoPE.

    Raises:
        UnsupportedError: YaRN, LongRoPE and others whose angles or sizes depend on the context, and orders that are neither of the two.
    """
    import llama_cpp

    if kind == llama_cpp.LLAMA_ROPE_TYPE_NONE:
        return None

    def refuse(reason: str) -> UnsupportedError:
        return UnsupportedError(f"{info.path.name}: methods that code keys before RoPE cannot be tried on this {info.arch} model: {reason}")

    if kind not in (llama_cpp.LLAMA_ROPE_TYPE_NORM, llama_cpp.LLAMA_ROPE_TYPE_NEOX):
        raise refuse(f"its RoPE turns channels in an order of its own (llama.cpp's type {kind})")

    def get(key: str, default: Any = None) -> Any:
        return info.metadata.get(f"{info.arch}.rope.{key}", default)

    scaling = get("scaling.type", "linear")
    if scaling not in ("none", "linear"):
        raise refuse(f"its RoPE is scaled by {scaling}, whose angles depend on more than the position")
    if get("scaling.attn_factor", 1.0) not in (0.0, 1.0) or get("scaling.alpha", 0.0) not in (0.0, 1.0):
        raise refuse("its RoPE also scales the keys")
    widths = {layer.d_head_k for layer in info.layers}
    if len(widths) > 1:
        raise refuse("its heads have several sizes")
    n_rotated = int(get("dimension_count", max(widths, default=0)))
    factors = _factors(info)
    factor = float(get("scaling.factor", get("scale_linear", 0.0)) or 1.0) if scaling == "linear" else 1.0
    if any(name != "rope_freqs.weight" for name in factors):
        raise refuse("its RoPE has factors for short and long contexts")
    divisors = factors.get("rope_freqs.weight", [1.0] * (n_rotated // 2))
    if factor != 1.0:
        divisors = [factor * divisor for divisor in divisors]
    return Rope(
        theta=float(get("freq_base", 10000.0)),
        pairs="adjacent" if kind == llama_cpp.LLAMA_ROPE_TYPE_NORM else "split",
        n_rotated=n_rotated,
        divisors=tuple(divisors) if factor != 1.0 or factors else None,
    )


def _factors(info: ModelInfo) -> Mapping[str, list[float]]:
    """The tensors of RoPE's factors that a model file has, by name."""
    from gguf import GGUFReader

    try:
        tensors = [tensor for file in info.files for tensor in GGUFReader(file).tensors]
    except (OSError, ValueError) as error:
        raise DataError(f"{info.path} cannot be read: {error}") from error
    return {tensor.name: torch.from_numpy(np.array(tensor.data)).double().tolist() for tensor in tensors if tensor.name.startswith("rope_")}
