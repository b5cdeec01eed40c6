"""Methods by name, as codecs for one tile: what the runtime calls when a tile is packed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config import PRESETS, GearConfig, suggest
from ..errors import ConfigError
from .methods import cq as _cq
from .methods import decoquant as _decoquant
from .methods import gear as _gear
from .methods import gear_tile as _gear_tile
from .methods import kvquant as _kvquant
from .methods import quantizers as _quantizers
from .methods import rivals as _rivals
from .methods.rope import Rope
from .methods.tensors import Coded


@dataclass(frozen=True)
class TileInfo:
    """Which tile a method codes.

    Attributes:
        positions: [n], of its tokens. The runtime gives their cells, which are positions as long as a cache holds one sequence that was never shifted.
        rows: [n], indices of the tokens within the tile.
        layer, head: the layer's index in the model and the KV head's in the layer.
    """

    positions: Tensor
    rows: Tensor
    layer: int = 0
    head: int = 0


Code = Callable[[str, Tensor, TileInfo], Coded]
Key = TypeVar("Key")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Method:
    """A codec for one tile.

    Attributes:
        name: what to call it in tables; `method` finds it by this name.
        code: (side, x [n, d], info) -> (reconstruction, bytes).
        tile: tokens that it expects in a tile; None: any number.
    """

    name: str
    code: Code = field(repr=False)
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
        """Code the rows of one tile that were written, as if there were no others.

        Args:
            side: "k" or "v".
            x: [T, d], any float type.
            written: [T], true where the cell has a row; None: everywhere.
            positions: [T] of the tokens; None: 0, 1, 2, ...

        Returns:
            The reconstruction, float32 [T, d], zero where nothing was written, and the bytes that the method would store.
        """
        rows = torch.from_numpy(np.array(x, np.float32))
        if rows.ndim != 2:
            raise ConfigError(f"x must be [n_token, n_channel], not {list(rows.shape)}")
        n = rows.shape[0]
        mask = torch.ones(n, dtype=torch.bool) if written is None else torch.from_numpy(np.array(written) != 0)
        where = torch.arange(n) if positions is None else torch.from_numpy(np.array(positions, np.int64))
        if mask.shape != (n,) or where.shape != (n,):
            raise ConfigError(f"written and positions must be [{n}], not {list(mask.shape)} and {list(where.shape)}")
        restored = torch.zeros_like(rows)
        if not mask.any():
            return restored.numpy(), 0.0
        coded = self.code(side, rows[mask], TileInfo(where[mask], mask.nonzero().squeeze(1), layer, head))
        restored[mask] = coded.xhat
        return restored.numpy(), float(coded.n_bytes)


def _plain(name: str, code: Callable[[str, Tensor], Coded], tile: int | None = None) -> Method:
    return Method(name, lambda side, x, info: code(side, x), tile)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Constructors
# ---------------------------------------------------------------------------------------------------------------------------------------------


def per_token(bits: int, group: int = 64) -> Method:
    """Per-token group-wise quantization of K and V."""
    return _plain(f"per-token{bits}", lambda side, x: _quantizers.per_token(x, bits, group))


def kcvt(bits: int = 4) -> Method:
    """KCVT within one head and tile."""
    return _plain(f"kcvt{bits}", lambda side, x: _quantizers.kcvt(x, side, bits))


def kivi(bits: int = 2, group: int = 32) -> Method:
    """KIVI; g = 32 is its authors' setting, g = 64 the one of GEAR's comparison ("kivi2-g64")."""
    return _plain(f"kivi{bits}" + ("" if group == 32 else f"-g{group}"), lambda side, x: _quantizers.kivi(x, side, bits, group))


def gear_paper(bits: int = 4, *, rank: int = 4, sparsity: float = 0.02) -> Method:
    """GEAR v4 with the paper's settings: KCVT at 4 bits, KIVI with g = 64 below, s = 2 %, r = 4. sparsity=0 is GEAR-L."""
    name = f"gear-paper{bits}" if sparsity else f"gear-l-paper{bits}"
    return _plain(name, lambda side, x: _gear.gear(x, side, bits, rank=min(rank, *x.shape), sparsity=sparsity))


def gear_v1(bits: int = 4) -> Method:
    """GEAR v1 within one head and tile."""
    return _plain(f"gear-v1-{bits}", lambda side, x: _gear.gear_v1(x, bits))


def outlier_reduced(bits: int = 4) -> Method:
    """GEAR v1's outlier-reduced quantization alone."""
    return _plain(f"outlier{bits}", lambda side, x: _gear.outlier_reduced(x, bits))


def native(config: GearConfig | str = "gear") -> Method:
    """gearcpp's own codec in PyTorch: what the native library computes for this configuration."""
    if isinstance(config, str):
        if config not in PRESETS:
            raise ConfigError(f"unknown preset {config!r}{suggest(config, list(PRESETS))}; known: {', '.join(PRESETS)}")
        name, config = f"native-{config}", PRESETS[config]
    else:
        name = "native"
    settings = config

    def code(side: str, x: Tensor, info: TileInfo) -> Coded:
        tile = torch.zeros(settings.tile, x.shape[1])
        written = torch.zeros(settings.tile, dtype=torch.bool)
        tile[info.rows], written[info.rows] = x, True
        coded = _gear_tile.gear_tile(tile, side, settings, written)
        return Coded(coded.xhat[info.rows], coded.n_bytes)

    return Method(name, code, settings.tile)


def decoquant(bits: int = 4) -> Method:
    """DecoQuant on one head and tile (the published code takes all heads of a layer together)."""
    return _plain(f"decoquant{bits}", lambda side, x: _decoquant.decoquant(x, bits))


def llama_cpp(kind: str = "q4_0", rotate: bool = True) -> Method:
    """llama.cpp's own cache type, with its rotation."""
    return _plain(kind if rotate else f"{kind}-plain", lambda side, x: _rivals.llama_cpp(x, side, kind, rotate))


def turboquant(bits: int = 3, uniform_values: bool = False) -> Method:
    """TurboQuant: Lloyd-Max for K and V as in the llama.cpp forks, or with uniform per-token values as in vLLM."""

    def code(side: str, x: Tensor) -> Coded:
        if uniform_values and side == "v":
            return _quantizers.per_token(x, bits, None)
        return _rivals.turboquant(x, bits)

    return _plain(f"turbo-vllm{bits}" if uniform_values else f"turbo{bits}", code)


def kvarn(bits_k: int = 4, bits_v: int = 2) -> Method:
    """KVarN; the published tile has 128 tokens."""
    return _plain(f"kvarn{bits_k}{bits_v}", lambda side, x: _rivals.kvarn(x, side, bits_k if side == "k" else bits_v), tile=128)


def exllamav3(bits: int = 4) -> Method:
    """exllamav3's quantized cache."""
    return _plain(f"exllama{bits}", lambda side, x: _rivals.exllamav3(x, bits))


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Methods that are calibrated first
# ---------------------------------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Recorder:
    """A codec that changes nothing and remembers every tile: run a calibration text with it, then give it to `kvquant` or `cq`.

    `gearcpp.reference.record` does so on a model.

    Attributes:
        rope: how the model turned its keys; they are remembered as they were before. None: they are remembered as they are.
        rows_per_tile: how many rows of a tile are remembered at most, drawn at random; None: all.
        source: what was read, in words.
    """

    rope: Rope | None = None
    rows_per_tile: int | None = None
    source: str = ""
    name: str = "recorder"
    tile: int | None = None
    _tiles: dict[tuple[str, int, int], list[Tensor]] = field(default_factory=dict, repr=False)
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1), repr=False)

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
        """Remember the rows written; the arguments are those of a `Method`."""

        def code(side: str, rows: Tensor, info: TileInfo) -> Coded:
            chosen = torch.randperm(len(rows), generator=self._generator)[: self.rows_per_tile].sort().values
            kept = rows[chosen]
            if self.rope and side == "k":
                kept = self.rope.undo(kept, info.positions[chosen])
            self._tiles.setdefault((side, layer, head), []).append(kept)
            return Coded(rows, 2 * rows.numel())

        return Method(self.name, code)(side, x, written, positions, layer=layer, head=head)

    def layers(self) -> list[int]:
        """The layers that were seen."""
        return sorted({layer for _, layer, _ in self._tiles})

    @property
    def n_token(self) -> int:
        """Tokens remembered of each head, of the one with the fewest."""
        return min((sum(len(rows) for rows in tiles) for tiles in self._tiles.values()), default=0)

    def rows(self, side: str, layer: int) -> Tensor:
        """Everything seen of one side of a layer, [n_head, n, d]; heads are cut to the shortest of them."""
        heads = [torch.cat(tiles) for (s, at, _), tiles in sorted(self._tiles.items()) if (s, at) == (side, layer)]
        if not heads:
            raise ConfigError(f"the recorder saw no {side.upper()} tile of layer {layer}: run a calibration text that fills tiles first")
        n = min(len(rows) for rows in heads)
        return torch.stack([rows[:n] for rows in heads])


def kvquant(recorder: Recorder, bits: int = 3, sparsity: float = 0.01) -> Method:
    """KVQuant calibrated on what a recorder saw, all entries weighted alike (the paper weights by gradients, which a cache codec does not see)."""
    tables = {
        layer: _kvquant.calibrate(recorder.rows("k", layer), recorder.rows("v", layer), bits, sparsity=sparsity, q_norm=bits == 2)
        for layer in recorder.layers()
    }
    rope = recorder.rope

    def code(side: str, x: Tensor, info: TileInfo) -> Coded:
        table = _of_layer(tables, info.layer).head(info.head)
        if side == "v":
            return _kvquant.kvquant_values(x, table)
        return _before_rope(rope, x, info, lambda rows: _kvquant.kvquant_keys(rows, table))

    return Method(f"kvquant{bits}", code)


def cq(recorder: Recorder, channels: int = 4, bits: int = 8) -> Method:
    """CQ-<c>c<b>b calibrated on what a recorder saw, all entries weighted alike (the paper weights by gradients)."""
    codebooks = {
        (layer, side, head): _cq.learn_codebooks(rows, channels, bits)
        for layer in recorder.layers()
        for side in ("k", "v")
        for head, rows in enumerate(recorder.rows(side, layer))
    }
    rope = recorder.rope

    def code(side: str, x: Tensor, info: TileInfo) -> Coded:
        codebook = _of_layer(codebooks, (info.layer, side, info.head))
        if side == "v":
            return _cq.cq(x, codebook)
        return _before_rope(rope, x, info, lambda rows: _cq.cq(rows, codebook))

    return Method(f"cq-{channels}c{bits}b", code)


def _of_layer(tables: Mapping[Key, Found], key: Key) -> Found:
    if key not in tables:
        raise ConfigError(f"nothing was calibrated for {key}: the recorder did not see it")
    return tables[key]


def _before_rope(rope: Rope | None, x: Tensor, info: TileInfo, code: Callable[[Tensor], Coded]) -> Coded:
    if rope is None:
        return code(x)
    coded = code(rope.undo(x, info.positions))
    return Coded(rope.apply(coded.xhat, info.positions), coded.n_bytes)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------------------------------

# Pattern of a name, its constructor from the pattern's numbers, and the names to list.
_FAMILIES: list[tuple[str, Callable[..., Method], list[str]]] = [
    (r"per-token([2-8])", per_token, ["per-token4", "per-token2"]),
    (r"kcvt([2-8])", kcvt, ["kcvt4"]),
    (r"kivi([2-8])(?:-g(32|64|128))?", lambda bits, group=32: kivi(bits, group), ["kivi4", "kivi2", "kivi2-g64"]),
    (r"gear-paper([2-8])", gear_paper, ["gear-paper4", "gear-paper2"]),
    (r"gear-l-paper([2-8])", lambda bits: gear_paper(bits, sparsity=0.0), ["gear-l-paper4", "gear-l-paper2"]),
    (r"gear-v1-([2-8])", gear_v1, ["gear-v1-4"]),
    (r"outlier([2-8])", outlier_reduced, ["outlier4"]),
    (r"decoquant([2-8])", decoquant, ["decoquant4", "decoquant3"]),
    (r"turbo([2-4])", turboquant, ["turbo4", "turbo3", "turbo2"]),
    (r"turbo-vllm([34])", lambda bits: turboquant(bits, uniform_values=True), ["turbo-vllm4", "turbo-vllm3"]),
    (r"kvarn([2-8])([2-8])", kvarn, ["kvarn42", "kvarn44"]),
    (r"exllama([2-8])", exllamav3, ["exllama4", "exllama3"]),
]

# The same for those that take a recorder first.
_CALIBRATED: list[tuple[str, Callable[..., Method], list[str]]] = [
    (r"kvquant([2-5])", kvquant, ["kvquant4", "kvquant3", "kvquant2"]),
    (r"cq-(1|2|4|8)c(8|9|10|11|12|[1-7])b", cq, ["cq-2c8b", "cq-4c8b", "cq-8c8b"]),
]


def needs_calibration(name: str) -> bool:
    """Whether `method` takes a recorder for this name."""
    return any(re.fullmatch(pattern, name.strip().lower()) for pattern, _, _ in _CALIBRATED)


def names() -> list[str]:
    """Names that `method` knows without a recorder; the bits in most of them may be others too ("kivi3", "kvarn53")."""
    listed = [name for _, _, examples in _FAMILIES for name in examples]
    return [*listed, *_rivals.GGML_TYPES, *(f"{kind}-plain" for kind in _rivals.GGML_TYPES), *(f"native-{preset}" for preset in PRESETS)]


def method(name: str, recorder: Recorder | Callable[[], Recorder] | None = None) -> Method:
    """The method of this name, such as "kivi2", "gear-paper4", "decoquant4", "turbo3", "kvarn42", "q4_0" or "native-gear".

    Args:
        name: as in `names`, or with a recorder one of those that are calibrated, such as "kvquant3" or "cq-4c8b".
        recorder: what `kvquant` and `cq` are calibrated on, or a function that gives it.

    Raises:
        ConfigError: no method has this name (the nearest ones are suggested), or it has to be calibrated first.
    """
    wanted = name.strip().lower()
    for pattern, construct, _ in _FAMILIES:
        if found := re.fullmatch(pattern, wanted):
            return replace(construct(*(int(number) for number in found.groups() if number is not None)), name=wanted)
    kind, _, suffix = wanted.partition("-")
    if kind in _rivals.GGML_TYPES and suffix in ("", "plain"):
        return llama_cpp(kind, rotate=not suffix)
    if wanted.startswith("native-") and wanted.removeprefix("native-") in PRESETS:
        return native(wanted.removeprefix("native-"))
    for pattern, construct, _ in _CALIBRATED:
        if found := re.fullmatch(pattern, wanted):
            if recorder is None:
                raise ConfigError(
                    f"{name!r} has to be calibrated on a text of its own: gearcpp perplexity --calibrate TEXT_FILE, or in Python "
                    f"reference.method({wanted!r}, reference.record(MODEL, TEXT_FILE))"
                )
            seen = recorder if isinstance(recorder, Recorder) else recorder()
            return construct(seen, *(int(number) for number in found.groups()))
    known = [*names(), *(name for _, _, examples in _CALIBRATED for name in examples)]
    raise ConfigError(f"unknown method {name!r}{suggest(wanted, known)}; known: {', '.join(known)}")
