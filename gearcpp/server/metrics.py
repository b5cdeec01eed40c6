"""What Prometheus reads off the server. Nothing here waits for a model: schedulers keep their counters up to date themselves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gearcpp.cache.kv_type import KVType

if TYPE_CHECKING:
    from .llama import ServedLlama

# name, help, value of a scheduler's counters and its model's cache
_GAUGES = (
    ("gearcpp_requests_running", "Sequences being decoded.", lambda c, kv: c.running),
    ("gearcpp_requests_waiting", "Sequences waiting for a slot or for cells.", lambda c, kv: c.waiting),
    ("gearcpp_tokens_per_second", "Tokens generated a second, all sequences together; 0 when nothing runs.", lambda c, kv: c.tokens_per_second),
    ("gearcpp_kv_cells", "Cells of the KV cache (tokens of the context).", lambda c, kv: c.cells),
    ("gearcpp_kv_cells_running", "Cells held by sequences being decoded.", lambda c, kv: c.cells_running),
    ("gearcpp_kv_cells_kept", "Cells held only by finished sequences; they are given up when they are needed.", lambda c, kv: c.cells_kept),
    ("gearcpp_kv_bytes", "Memory of the KV cache, reserved for the full context.", lambda c, kv: c.kv["total"]["bytes"]),
    ("gearcpp_kv_bytes_used", "Of it, without tiles that hold nothing.", lambda c, kv: c.kv["total"]["bytes_used"]),
    ("gearcpp_kv_bytes_f16", "What a plain f16 cache would take.", lambda c, kv: c.kv["total"]["bytes_f16"]),
    ("gearcpp_kv_packed_tiles", "Packed tiles that hold something, summed over K and V of all layers.", lambda c, kv: packed_tiles(c.kv["layers"], kv)),
    ("gearcpp_kv_packed_rows", "Rows read from packed tiles, summed over K and V of all layers.", lambda c, kv: c.kv["total"]["n_packed"]),
    ("gearcpp_kv_exact_rows", "Rows kept exactly, summed over K and V of all layers.", lambda c, kv: c.kv["total"]["n_exact"]),
)
_COUNTERS = (
    ("gearcpp_prompt_tokens", "Prompt tokens evaluated.", lambda c, kv: c.prompt_tokens),
    ("gearcpp_shared_tokens", "Prompt tokens taken over from another sequence's cells.", lambda c, kv: c.shared_tokens),
    ("gearcpp_generated_tokens", "Tokens generated.", lambda c, kv: c.generated_tokens),
    ("gearcpp_steps", "Batches decoded.", lambda c, kv: c.steps),
    ("gearcpp_step_seconds", "Seconds spent on them.", lambda c, kv: c.step_seconds),
    ("gearcpp_preemptions", "Sequences that lost their cells to older ones and were evaluated again.", lambda c, kv: c.preemptions),
    ("gearcpp_kv_tiles_packed", "Tiles encoded since the cache was made.", lambda c, kv: c.kv["total"]["n_pack"]),
)


def packed_tiles(layers: Iterable[Mapping[str, Any]], kv_type: KVType) -> int:
    """Tiles that hold something, in the layers of `Llama.kv_stats`."""
    if not kv_type.gear:
        return 0
    tiles = ((layer, layer["n_stream"] * math.ceil(layer["n_cell"] / kv_type.gear.tile)) for layer in layers if layer["bytes_tiles"])
    return sum(round(layer["bytes_tiles_used"] / layer["bytes_tiles"] * n_tiles) for layer, n_tiles in tiles)


class Metrics:
    """Everything that /metrics says.

    Args:
        models: by name.
        counts: requests answered, by path and status.
    """

    def __init__(self, models: Mapping[str, ServedLlama], counts: Counter[tuple[str, int]]) -> None:
        self._models = models
        self._counts = counts
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory, CPU seconds, open files
        self._registry.register(self)  # type: ignore[arg-type]  # a collector is whatever has collect()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        served = [(name, model.scheduler.counters, model.kv_type) for name, model in self._models.items() if model.scheduler]
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for metric, meaning, value in table:
                family = kind(metric, meaning, labels=["model"])
                for name, counters, kv_type in served:
                    family.add_metric([name], value(counters, kv_type))
                yield family
        requests = CounterMetricFamily("gearcpp_requests", "Requests answered.", labels=["path", "status"])
        for (path, status), n in dict(self._counts).items():
            requests.add_metric([path, str(status)], n)
        yield requests
