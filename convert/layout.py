"""Checkpoints that hold the same model in different ways, brought to one: the text part alone, experts stacked, gate and up projections parted."""

from __future__ import annotations

import re

import numpy as np

from gearcpp.errors import DataError

from .checkpoint import Checkpoint, require_numeric
from .rows import Mapped, Reshaped, Rows, RowsOfEach, Stacked

# Multimodal models keep their text model under a prefix of its own.
_TEXT_PREFIXES = (("model.language_model.", "model."), ("language_model.", ""))
_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\..*)")


def text_part(checkpoint: Checkpoint, ignored: tuple[str, ...]) -> dict[str, Rows]:
    """The text model's tensors under their usual names, less those whose names end as `ignored` says.

    Raises:
        UnsupportedError: a tensor of a type that cannot be converted.
    """
    prefixes = [(old, new) for old, new in _TEXT_PREFIXES if any(name.startswith(old) for name in checkpoint)]
    chosen: dict[str, Rows] = {}
    for stored_name, stored in checkpoint.items():
        name = _text_name(stored_name, prefixes) if prefixes else stored_name
        if name is not None and not name.endswith(ignored):
            require_numeric(stored_name, stored)
            chosen[name] = stored
    return chosen


def _text_name(name: str, prefixes: list[tuple[str, str]]) -> str | None:
    """The name in a text model, None for another part's tensor."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name if name == "lm_head.weight" else None


def with_stacked_experts(tensors: dict[str, Rows], n_experts: int) -> dict[str, Rows]:
    """One tensor [experts, rows, columns] for each matrix of the experts, however the checkpoint has them.

    Raises:
        DataError: experts are missing, too many or of different shapes.
    """
    whole: dict[str, Rows] = {}
    experts: dict[str, dict[int, Rows]] = {}
    for name, rows in tensors.items():
        if match := _ONE_EXPERT.fullmatch(name):
            experts.setdefault(match[1] + match[3], {})[int(match[2])] = rows
        elif name.endswith("experts.gate_up_proj"):
            stem, half = name.removesuffix("gate_up_proj"), rows.shape[1] // 2
            whole[f"{stem}gate_proj.weight"] = RowsOfEach(rows, 0, half)
            whole[f"{stem}up_proj.weight"] = RowsOfEach(rows, half, 2 * half)
        elif name.endswith("experts.down_proj"):
            whole[f"{name}.weight"] = rows
        else:
            whole[name] = rows
    return whole | {name: _stack(name, by_index, n_experts) for name, by_index in experts.items()}


def _stack(name: str, by_index: dict[int, Rows], n_experts: int) -> Rows:
    indices = sorted(by_index)
    if indices != list(range(n_experts)):
        raise DataError(f"{name}: the checkpoint has the experts {indices}, config.json says that there are {n_experts}")
    if len({rows.shape for rows in by_index.values()}) > 1:
        raise DataError(f"{name}: the experts differ in shape")
    return Stacked([by_index[index] for index in indices])


def decay(rows: Rows) -> Rows:
    """What a state-space layer's state decays by, which checkpoints hold as the logarithm of its negative."""
    return Mapped(rows, lambda block: -np.exp(block.astype(np.float64)).astype(np.float32))  # the nearest float32 on every machine


def squeezed(rows: Rows) -> Rows:
    """A convolution's kernels [channels, 1, window] as llama.cpp has them: [channels, window]."""
    return Reshaped(rows, (rows.shape[0], rows.shape[-1])) if len(rows.shape) == 3 and rows.shape[1] == 1 else rows
