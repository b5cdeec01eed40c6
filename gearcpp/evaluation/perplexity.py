"""Perplexity and KL divergence of several KV caches against f16, on a text of any length (`gearcpp perplexity`).

The text is tokenized once and cut into chunks of n_ctx tokens that do not overlap; the first token of a chunk gives way to BOS where the model wants
one. Scored are the predictions from the second half of a chunk, positions n_ctx/2 to n_ctx - 2, as in llama.cpp's tools/perplexity: only there does a
query read mostly packed tiles.

f16 and the caches held against it advance in lock step, ubatch by ubatch, so that only one ubatch of logits of each is alive. llama.cpp's own cache types
share the f16 model, each through a context of its own. A GEAR cache belongs to a model's device and needs a load of its own; by default two models are
resident, so f16 reads the text once more for every GEAR type after the first. Every cache runs with flash attention, f16 too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..cache.allocation import Allocation
from ..cache.kv_type import KVType, normalize_kv_type, split_kv_types
from ..cache.stats import ERRORS, gear_layers, llama_layers, summarize
from ..errors import ConfigError, DataError, GearError, UnsupportedError
from ..model_info import read_model_info
from ..runtime.context import Batch, Context, Model
from ..runtime.low_level import context_params, model_params
from ..runtime.threads import usable_cpus
from .fidelity import F32, I32, Summary, Tally, compare

if TYPE_CHECKING:
    from ..reference import Recorder

F16 = normalize_kv_type("f16")
ENOUGH_TOKENS = 20_000  # scored tokens from which the standard errors of the rarer figures mean something


@dataclass(frozen=True)
class Settings:
    """How a text is read.

    Attributes:
        n_ctx: tokens of a chunk.
        n_ubatch: tokens read at once, whose logits are all that memory holds of each cache. GEAR keeps them exact meanwhile: at most a tile.
        n_chunks: chunks to read; None: the whole text.
        n_threads: None: all that the process may use.
        seed: of GEAR's power iteration; None: the preset's.
        n_models: most models in memory at once, f16's among them. GEAR types beyond that cost another reading of the text by f16.
        like_llama: refuse what llama-perplexity refuses, and leave out the row of f16 against itself.
        floor: measure f16 against itself, too.
        swa_full: sliding windows have as many cells as the context.
    """

    n_ctx: int = 4096
    n_ubatch: int = 128
    n_chunks: int | None = None
    n_threads: int | None = None
    seed: int | None = None
    n_models: int = 2
    like_llama: bool = False
    floor: bool = True
    swa_full: bool = False

    @property
    def scored(self) -> range:
        """Positions of a chunk whose prediction is scored."""
        return range(self.n_ctx // 2, self.n_ctx - 1)

    def check(self) -> None:
        """Raise ConfigError when a chunk of this kind cannot be read."""
        if self.n_ctx < 16:
            raise ConfigError(f"a context of {self.n_ctx} tokens leaves nothing to score: use -c 16 or more, 4096 for figures that mean something")
        if not 1 <= self.n_ubatch <= self.n_ctx:
            raise ConfigError(f"n_ubatch must be from 1 to n_ctx ({self.n_ctx}), not {self.n_ubatch}")
        if self.n_chunks is not None and self.n_chunks < 1:
            raise ConfigError(f"n_chunks must be 1 or more, not {self.n_chunks}")
        if self.n_models < 2:
            raise ConfigError(f"n_models must be 2 or more (f16's and another one), not {self.n_models}")


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The caches
# ---------------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheSpec:
    """One row of the table.

    Attributes:
        label: its name there.
        kv_type: the cache.
        n_ubatch: another ubatch size than the settings' (f16 against itself).
    """

    label: str
    kv_type: KVType
    n_ubatch: int | None = None


REFERENCE = CacheSpec("f16", F16)


def parse_cache(text: str, seed: int | None = None, recorder: Any = None) -> CacheSpec:
    """Understand one name of ``--kv``.

    Args:
        text: any name of `normalize_kv_type`, such as ``gear3``, ``q8_0/q4_0``, ``sim:kivi2`` or ``q4_0+tail128``.
        seed: of GEAR's power iteration; None: the preset's.
        recorder: for methods that are calibrated, as in `normalize_kv_type`.

    Raises:
        ConfigError: the name is unknown.
        UnsupportedError: a reference method was asked for, and PyTorch is not installed.
    """
    kv_type = normalize_kv_type(text, recorder=recorder)
    if kv_type.gear and seed is not None:
        kv_type = replace(kv_type, gear=kv_type.gear.replace(seed=seed))
    return CacheSpec(text.strip(), kv_type)


def parse_caches(text: str, settings: Settings, recorder: Any = None) -> list[CacheSpec]:
    """The caches of a comma-separated list, without f16, which is always measured; in front f16 against itself at another ubatch size, the floor.

    Args:
        recorder: for methods that are calibrated, as in `normalize_kv_type`; if it is a function, it is called after all other names were understood.

    Raises:
        ConfigError: a name is unknown or given twice, or a tile is shorter than the ubatch.
    """
    labels = split_kv_types(text)
    parsed = {label: parse_cache(label, settings.seed, recorder) for label in sorted(labels, key=_is_calibrated)}
    specs = [parsed[label] for label in labels]
    if not specs:
        raise ConfigError("no cache type to measure: give some, such as --kv f16,q8_0,gear4")
    for spec in specs:
        if specs.count(spec) > 1:
            raise ConfigError(f"{spec.label} is listed twice")
        if spec.kv_type.gear and spec.kv_type.gear.tile < settings.n_ubatch:
            raise ConfigError(
                f"{spec.label}: an ubatch of {settings.n_ubatch} tokens, all exact while it is computed, is longer than a tile of "
                f"{spec.kv_type.gear.tile}: use -ub {spec.kv_type.gear.tile} or less"
            )
    others = [spec for spec in specs if spec.kv_type != F16]
    if settings.like_llama or not settings.floor or settings.n_ubatch < 4 or not others:
        return others
    # Half of it would often give the same bits, as the kernels cut both into the same blocks.
    n_ubatch = settings.n_ubatch // 2 - 1
    return [CacheSpec(f"f16, -ub {n_ubatch}", F16, n_ubatch=n_ubatch), *others]


def _is_calibrated(label: str) -> bool:
    if not label.lower().startswith("sim:"):
        return False
    from ..reference import needs_calibration

    return needs_calibration(label[len("sim:") :].partition("+")[0])


def plan_passes(specs: Sequence[CacheSpec], n_models: int = 2) -> list[list[CacheSpec]]:
    """Which caches run together with f16: all of llama.cpp's own and as many GEAR types as models may be loaded beside f16's, then the next GEAR types."""
    own = [spec for spec in specs if not spec.kv_type.gear]
    gear = [spec for spec in specs if spec.kv_type.gear]
    n = n_models - 1
    return [own + gear[:n], *(gear[i : i + n] for i in range(n, len(gear), n))]


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The text
# ---------------------------------------------------------------------------------------------------------------------------------------------


def split_chunks(tokens: I32, settings: Settings, bos: int | None) -> I32:
    """Cut tokens into chunks.

    Args:
        tokens: the whole text [n], as tokenized with special tokens added.
        bos: the first token of every chunk; None: the text keeps it.

    Returns:
        i32 [n_chunk, n_ctx]; what is left over at the end is not used.

    Raises:
        DataError: there is not one chunk (two, where llama-perplexity is to be equalled).
    """
    n_ctx, least = settings.n_ctx, 2 if settings.like_llama else 1
    n_chunk = len(tokens) // n_ctx
    if n_chunk < least:
        raise DataError(
            f"the text has {len(tokens)} tokens, too few for {'two chunks' if least == 2 else 'a chunk'} of {n_ctx}: give a longer text or a smaller -c"
        )
    n_chunk = min(n_chunk, settings.n_chunks or n_chunk)
    chunks = tokens[: n_chunk * n_ctx].reshape(n_chunk, n_ctx).copy()
    if bos is not None:
        chunks[:, 0] = bos
    return chunks


# ---------------------------------------------------------------------------------------------------------------------------------------------
# llama.cpp
# ---------------------------------------------------------------------------------------------------------------------------------------------


class _Context(Context):
    """A context that is fed one sequence batch by batch and gives logits only where they are scored."""

    def __init__(self, model: Model, spec: CacheSpec, settings: Settings) -> None:
        self.spec, self.n_ctx = spec, settings.n_ctx
        n_threads = settings.n_threads or usable_cpus()
        params = context_params(
            spec.kv_type,
            n_ctx=settings.n_ctx,
            n_batch=settings.n_ubatch,
            n_ubatch=spec.n_ubatch or settings.n_ubatch,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            swa_full=settings.swa_full,
            op_offload=False,
            no_perf=True,
        )
        super().__init__(model, params, spec.label)
        self._allocation = Allocation(settings.n_ctx, params.n_ubatch, swa_full=settings.swa_full)
        self._batch = Batch(settings.n_ubatch)

    def score(self, tokens: I32, first: int, scored: npt.NDArray[np.int64]) -> F32:
        """Continue the sequence.

        Args:
            tokens: [n].
            first: position of the first of them.
            scored: positions among them whose logits are wanted.

        Returns:
            Logits [n scored, n_vocab], valid until the next call.
        """
        self._batch.clear()
        self._batch.add(0, first, tokens, logits=scored - first)
        self.decode(self._batch)
        logits = self.logits(len(scored))
        if np.isnan(logits).any():
            raise GearError(f"{self.spec.label}: the model's logits are not numbers at positions from {first} on; is the model file whole?")
        return logits

    def cache_stats(self, n_written: int) -> dict[str, Any]:
        """What the cache holds, as `Llama.kv_stats` has it."""
        device, kv_type = self.model.device, self.spec.kv_type
        info, allocation = self.model.info, self._allocation
        if not device:
            return summarize(kv_type, llama_layers(kv_type, info, allocation, n_written), 0, info, allocation)
        layers = gear_layers(device.stats(), kv_type, info, allocation, codec=device.codec, operation=device.other_use)
        return summarize(kv_type, layers, device.scratch_bytes(), info, allocation)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The measurement
# ---------------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One cache's line of the table.

    Attributes:
        label: its name.
        bits_per_element: stored bits for each number of K and V, everything in a packed tile or block counted; exact rows come on top.
        packed_share: of the keys and values that a scored query sees, the share that it reads packed; None for f16.
        n_tail, n_sink: rows that stay exact; None for llama.cpp's own types.
        summary: the figures.
        layers: what packing did to K and V of each layer by the cache's own estimate, from `Llama.kv_stats`: il, side, error, score_error, worst_head,
            worst_error, stays_exact. Of the last chunk.
        score_error: that of all K, root mean square in nats; None: nothing is known.
    """

    label: str
    bits_per_element: float
    packed_share: float | None
    n_tail: int | None
    n_sink: int | None
    summary: Summary
    layers: tuple[dict[str, Any], ...] = ()
    score_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, the summary's among them."""
        return {
            "kv": self.label,
            "bits_per_element": self.bits_per_element,
            "packed_share": self.packed_share,
            "n_tail": self.n_tail,
            "n_sink": self.n_sink,
            "score_error": self.score_error,
            **self.summary.to_dict(),
        }


@dataclass
class _Line:
    """What is known of one cache so far."""

    spec: CacheSpec
    bits_per_element: float = math.nan
    tally: Tally = field(default_factory=Tally)
    packed_shares: list[float] = field(default_factory=list)  # of each scored query
    stats: dict[str, Any] = field(default_factory=dict)  # as `Llama.kv_stats`, the last

    def row(self) -> Row:
        gear = self.spec.kv_type.gear
        share = float(np.mean(self.packed_shares)) if self.packed_shares else None
        n_tail, n_sink = (gear.n_tail, gear.n_sink) if gear else (None, None)
        layers = tuple({name: layer[name] for name in ("il", "side", *ERRORS, "stays_exact")} for layer in self.stats.get("layers", ()))
        score_error = self.stats["total"]["score_error"] if self.stats else None
        return Row(self.spec.label, self.bits_per_element, share, n_tail, n_sink, self.tally.summary(), layers, score_error)


@dataclass(frozen=True)
class Step:
    """How far a measurement is.

    Attributes:
        n_done, n_total: tokens that f16 has read, and will read, over all passes.
        labels: the caches that run now.
    """

    n_done: int
    n_total: int
    labels: tuple[str, ...]


class Measurement:
    """Several caches of one model held against f16 over one text.

    Args:
        model: GGUF file.
        text: UTF-8 (see `read_text`).
        kv: cache types, comma-separated (see `parse_cache`); f16 is measured always.
        settings: how the text is read.
        calibration: UTF-8 text file for the methods that are calibrated (``sim:kvquant3``, ``sim:cq-4c8b``), read here with the model (see
            `gearcpp.reference.record`); None: there are none.

    Attributes:
        notes: what a reader of the figures should know.

    Raises:
        ConfigError: settings or a cache type make no sense.
        DataError: the model or the text cannot be read, or the text is too short.
        UnsupportedError: the model has no KV cache, or methods are to be calibrated and its RoPE cannot be undone.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        text: bytes,
        kv: str,
        settings: Settings | None = None,
        calibration: str | os.PathLike[str] | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.settings.check()
        self._recorder: Recorder | None = None
        self._specs = parse_caches(kv, self.settings, None if calibration is None else lambda: self._record(model, calibration))
        if calibration is not None and not self._recorder:
            raise ConfigError("a text to calibrate on is given, but no cache type wants one: name sim:kvquant3 or sim:cq-4c8b, or leave --calibrate out")
        self._passes = plan_passes(self._specs, self.settings.n_models)
        self._lines = {spec: _Line(spec) for spec in [REFERENCE, *self._specs]}
        self.info = read_model_info(model)
        if not self.info.layers:
            raise UnsupportedError(f"{self.info.path.name}: {self.info.arch} models have no KV cache to measure")
        self.chunks = self._read(text)
        self.notes = self._make_notes()

    @property
    def n_scored(self) -> int:
        """Tokens that will be scored."""
        return len(self.chunks) * len(self.settings.scored)

    def rows(self) -> list[Row]:
        """The table as it stands: f16 first, caches not yet measured left out."""
        return [line.row() for line in self._lines.values() if line.tally.n_tokens]

    @property
    def is_complete(self) -> bool:
        """Whether every cache has read the whole text."""
        return all(line.tally.n_tokens == self.n_scored for line in self._lines.values())

    def run(self) -> Generator[Step, None, None]:
        """Measure, one ubatch after the other. Stop iterating to stop the measurement; `rows` then has what there is.

        Raises:
            ConfigError: not one of the keys that a scored position sees was packed.
            GearError: of the kind that made a cache fail.
        """
        n_total = len(self._passes) * self.chunks.size
        # A GEAR cache is on the CPU, so what it is held against has to be computed there as well.
        n_gpu_layers = 0 if any(spec.kv_type.gear for spec in self._specs) else -1
        with closing(Model(self.info, model_params(self.info.path, F16, n_gpu_layers=n_gpu_layers)[0])) as f16:
            for i, specs in enumerate(self._passes):
                labels = ("f16", *(spec.label for spec in specs))
                yield Step(i * self.chunks.size, n_total, labels)
                for n_read in self._run_pass(f16, specs, is_first=i == 0):
                    yield Step(i * self.chunks.size + n_read, n_total, labels)

    def _run_pass(self, f16: Model, specs: Sequence[CacheSpec], is_first: bool) -> Iterator[int]:
        """Read the text once with f16 and some caches; yields the tokens read so far."""
        settings = self.settings
        # f16 reads the text in every pass and is counted in the first one only.
        lines = [self._lines[REFERENCE] if is_first else _Line(REFERENCE), *(self._lines[spec] for spec in specs)]
        with ExitStack() as opened:
            contexts = [opened.enter_context(closing(_Context(f16, REFERENCE, settings)))]
            for spec in specs:
                model = self._load(spec, opened) if spec.kv_type.gear else f16
                contexts.append(opened.enter_context(closing(_Context(model, spec, settings))))
            for i, chunk in enumerate(self.chunks):
                for context in contexts:
                    context.clear()
                for first in range(0, settings.n_ctx, settings.n_ubatch):
                    self._score(contexts, lines, chunk, first)
                    yield i * settings.n_ctx + min(first + settings.n_ubatch, settings.n_ctx)
                for line in lines:
                    self._check_packed(line)

    def _load(self, spec: CacheSpec, opened: ExitStack) -> Model:
        """The model on a GEAR device of its own, both closed with the stack."""
        params, device = model_params(self.info.path, spec.kv_type, n_ubatch=self.settings.n_ubatch)
        assert device
        opened.enter_context(closing(device))
        return opened.enter_context(closing(Model(self.info, params, device)))

    def _score(self, contexts: Sequence[_Context], lines: Sequence[_Line], chunk: I32, first: int) -> None:
        """Let every cache read an ubatch and hold its predictions against f16's."""
        tokens = chunk[first : first + self.settings.n_ubatch]
        end = first + len(tokens)
        scored = self.settings.scored
        positions = np.arange(max(first, scored.start), max(scored.start, min(end, scored.stop)))
        logits = [context.score(tokens, first, positions) for context in contexts]
        if not len(positions):
            return
        tallies = [line.tally for line in lines]
        compare(logits[0], logits[1:], chunk[positions + 1], tallies[0], tallies[1:])
        for context, line in zip(contexts, lines, strict=True):
            stats = line.stats = context.cache_stats(end)
            line.bits_per_element = stats["total"].get("codec_bits_per_element", stats["total"]["bits_per_element"])
            line.packed_shares += packed_shares(line.spec.kv_type, stats, n_later=end - 1 - positions)

    def _check_packed(self, line: _Line) -> None:
        gear = line.spec.kv_type.gear
        if gear and not any(line.packed_shares):
            least = 2 * (gear.n_tail + gear.n_sink + gear.tile + self.settings.n_ubatch)
            raise ConfigError(
                f"{line.spec.label}: in chunks of {self.settings.n_ctx} tokens nothing that a scored position sees is ever packed, so this run would say "
                f"nothing about the codec: use -c {max(4096, 1 << (least - 1).bit_length())} or a shorter exact tail"
            )

    def _read(self, text: bytes) -> I32:
        with closing(Model(self.info, model_params(self.info.path, F16, vocab_only=True)[0])) as vocabulary:
            if self.settings.like_llama and llama_cpp.llama_vocab_get_add_eos(vocabulary.vocab):
                raise ConfigError("llama-perplexity refuses models that end a text with EOS, as this one does: leave --like-llama-perplexity out")
            return split_chunks(vocabulary.tokenize(text), self.settings, vocabulary.bos())

    def _record(self, model: str | os.PathLike[str], text: str | os.PathLike[str]) -> Recorder:
        from .calibration import record

        if not self._recorder:
            self._recorder = record(model, text, n_threads=self.settings.n_threads)
        return self._recorder

    def _make_notes(self) -> list[str]:
        notes = [f"calibrated on {self._recorder.source}"] if self._recorder else []
        if self.info.n_ctx_train and self.settings.n_ctx > self.info.n_ctx_train:
            notes.append(f"chunks of {self.settings.n_ctx} tokens are longer than the {self.info.n_ctx_train} that the model was trained on")
        if self.n_scored < ENOUGH_TOKENS:
            notes.append(f"{self.n_scored} tokens are scored; figures to be quoted want {ENOUGH_TOKENS} or more")
        return notes


def packed_shares(kv_type: KVType, stats: Mapping[str, Any], n_later: npt.NDArray[np.int64]) -> list[float]:
    """The share of the keys and values that each scored query of an ubatch read packed.

    Args:
        stats: of the cache after the ubatch, as `Llama.kv_stats`. What is packed then was written before the ubatch, so each of its queries saw all of it.
        n_later: rows written after each query's own [n], which it does not see.
    """
    if kv_type.gear is None:
        return [] if kv_type == F16 else [1.0] * len(n_later)
    n_visible = stats["total"]["n_written"] - len(stats["layers"]) * n_later
    return list(stats["total"]["n_packed"] / n_visible)
