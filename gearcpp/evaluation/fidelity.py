"""How far next-token distributions are from f16's: the arithmetic of `gearcpp perplexity`, in plain numpy.

Logits come as f32 and are reduced in float64: at the scale of a good cache (a mean KL divergence of 1e-6 to 1e-3 nat) coarser arithmetic would show
itself rather than the cache. Formulas and standard errors are those of llama.cpp's tools/perplexity, whose stored logits (16 bits over a window of 16 nat)
are too coarse for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]

BLOCK_ELEMENTS = 1 << 21  # logits reduced at once: 16 MiB a float64 array, whatever the vocabulary


def log_softmax(logits: npt.ArrayLike) -> F64:
    """Log-probabilities of each row: f64 [n, n_vocab] from logits of any float type."""
    x = np.array(logits, np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def kl_divergence(log_p: F64, log_q: F64) -> F64:
    """KL(p || q) of each row in nat: f64 [n] from log-probabilities [n, n_vocab]. Tokens that p excludes (-inf) add nothing."""
    p = np.exp(log_p)
    difference = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=p > 0)
    return np.einsum("nv,nv->n", p, difference)


@dataclass(frozen=True)
class Summary:
    """What the scored tokens of one cache say. ``_se`` is the standard error over tokens; nan where there are too few of them.

    Attributes:
        n_tokens: scored tokens.
        ppl: exp of the mean negative log-likelihood.
        ln_ppl_ratio: ln(PPL / PPL of f16), whose standard error is far smaller than the two perplexities' own because both read the same tokens.
        kld_mean, kld_median, kld_99, kld_999, kld_max: KL(f16 || this cache) in nat.
        delta_p_rms: root of the mean square of the change of the correct token's probability.
        same_top: share of tokens for which the likeliest token is f16's.
    """

    n_tokens: int
    ppl: float
    ppl_se: float
    ln_ppl_ratio: float
    ln_ppl_ratio_se: float
    kld_mean: float
    kld_se: float
    kld_median: float
    kld_99: float
    kld_999: float
    kld_max: float
    delta_p_rms: float
    delta_p_rms_se: float
    same_top: float
    same_top_se: float

    def to_dict(self) -> dict[str, float | None]:
        """All fields by name, None for nan, as JSON can hold them."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


class Tally:
    """What is kept of each scored token of one cache: four numbers, never its logits."""

    def __init__(self) -> None:
        self._columns: dict[str, list[npt.NDArray[np.generic]]] = {name: [] for name in ("nll", "nll_f16", "kld", "delta_p", "same_top")}
        self.n_tokens = 0

    def add(self, log_p: F64, log_q: F64, targets: I32) -> None:
        """Take up scored tokens.

        Args:
            log_p: f16's log-probabilities [n, n_vocab].
            log_q: this cache's; the same array for f16 itself.
            targets: the tokens that came [n].
        """
        rows = np.arange(len(targets))
        nll_f16, nll = -log_p[rows, targets], -log_q[rows, targets]
        self._columns["nll"].append(nll)
        self._columns["nll_f16"].append(nll_f16)
        self._columns["kld"].append(kl_divergence(log_p, log_q))
        self._columns["delta_p"].append(np.exp(-nll) - np.exp(-nll_f16))
        self._columns["same_top"].append(log_p.argmax(axis=1) == log_q.argmax(axis=1))
        self.n_tokens += len(targets)

    def column(self, name: str) -> F64:
        """One number of every scored token, f64 [n_tokens]: "nll", "nll_f16", "kld", "delta_p" or "same_top"."""
        return np.concatenate([np.empty(0), *self._columns[name]])

    def summary(self) -> Summary:
        """The figures so far."""
        nll, kld, same_top = self.column("nll"), self.column("kld"), self.column("same_top")
        ppl = float(np.exp(_mean(nll)))
        ratio = nll - self.column("nll_f16")
        square = self.column("delta_p") ** 2
        rms = float(np.sqrt(_mean(square)))
        quantiles = np.quantile(kld, [0.5, 0.99, 0.999, 1.0]) if len(kld) else np.full(4, np.nan)
        return Summary(
            n_tokens=self.n_tokens,
            ppl=ppl,
            ppl_se=ppl * _standard_error(nll),
            ln_ppl_ratio=_mean(ratio),
            ln_ppl_ratio_se=_standard_error(ratio),
            kld_mean=_mean(kld),
            kld_se=_standard_error(kld),
            kld_median=float(quantiles[0]),
            kld_99=float(quantiles[1]),
            kld_999=float(quantiles[2]),
            kld_max=float(quantiles[3]),
            delta_p_rms=rms,
            delta_p_rms_se=0.5 / rms * _standard_error(square) if rms > 0 else 0.0,
            same_top=_mean(same_top),
            same_top_se=_standard_error(same_top),
        )


def compare(logits: F32, others: Sequence[F32], targets: I32, tally: Tally, tallies: Sequence[Tally]) -> None:
    """Add one batch to the tallies, in blocks of rows so that memory does not grow with the vocabulary.

    Args:
        logits: f16's [n, n_vocab].
        others: of the caches held against it, each [n, n_vocab].
        targets: the tokens that came [n].
        tally: of f16 itself.
        tallies: one for each of ``others``.
    """
    n_rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for first in range(0, len(targets), n_rows):
        block = slice(first, first + n_rows)
        log_p = log_softmax(logits[block])
        tally.add(log_p, log_p, targets[block])
        for other, its_tally in zip(others, tallies, strict=True):
            its_tally.add(log_p, log_softmax(other[block]), targets[block])


def _mean(x: F64) -> float:
    return float(x.mean()) if len(x) else float("nan")


def _standard_error(x: F64) -> float:
    """Of the mean of independent samples."""
    return float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")
