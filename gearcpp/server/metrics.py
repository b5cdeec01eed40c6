"""What Prometheus reads off the server: llama.cpp's figures of each model, and ours of its cache."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .model import Model
from .upstream import UpstreamError, ask

_PATIENCE = 5.0  # seconds that llama.cpp's server may take for its own, which it counts between two batches

# name, help, value of `Model.kv_stats`
_GAUGES = (
    ("gearcpp_kv_bytes", "Memory of the KV cache if the context of every slot were full.", lambda kv: kv["bytes"]),
    ("gearcpp_kv_bytes_used", "Of it, without tiles that hold nothing.", lambda kv: kv["bytes_used"]),
    ("gearcpp_kv_bytes_f16", "What a plain f16 cache would take.", lambda kv: kv["bytes_f16"]),
    ("gearcpp_kv_share_of_f16", "gearcpp_kv_bytes by gearcpp_kv_bytes_f16.", lambda kv: kv["bytes"] / max(kv["bytes_f16"], 1)),
    ("gearcpp_kv_packed_rows", "Rows read from packed tiles, summed over K and V of all layers.", lambda kv: kv["n_packed"]),
    ("gearcpp_kv_exact_rows", "Rows kept exactly, summed over K and V of all layers.", lambda kv: kv["n_exact"]),
    ("gearcpp_kv_score_error_nats", "What packing does to scores, root mean square, by the cache's own estimate.", lambda kv: kv["score_error"]),
    ("gearcpp_kv_value_error", "What packing does to values, as a share of their size, by the cache's own estimate.", lambda kv: kv["value_error"]),
    ("gearcpp_kv_sides_staying_exact", "K and V of layers whose new rows stay f16, because packing changes them too much.", lambda kv: kv["n_stay_exact"]),
)


class Metrics:
    """Everything that /metrics says.

    Args:
        models: by name.
        counts: requests answered, by path and status.
        n_requests: those in work or waiting, by model.
    """

    def __init__(self, models: Mapping[str, Model], counts: Counter[tuple[str, int]], n_requests: Counter[str]) -> None:
        self._models = models
        self._counts = counts
        self._n_requests = n_requests
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory, CPU seconds, open files of the gate
        self._registry.register(self)  # type: ignore[arg-type]  # a collector is whatever has collect()

    async def text(self) -> bytes:
        """Prometheus' text format."""
        own = await asyncio.to_thread(generate_latest, self._registry)
        others = await asyncio.gather(*map(_upstream, self._models.values()))
        lines: dict[str, None] = {}  # each help and type once
        for line in sorted((line for text in others for line in text), key=_metric_of):
            lines[line] = None
        return own + "".join(f"{line}\n" for line in lines).encode()

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        totals = {name: model.kv_stats()["total"] for name, model in self._models.items()}
        for metric, meaning, value in _GAUGES:
            family = GaugeMetricFamily(metric, meaning, labels=["model"])
            for name, total in totals.items():
                if (number := value(total)) is not None:
                    family.add_metric([name], number)
            yield family
        tiles = GaugeMetricFamily("gearcpp_kv_packed_tiles", "Packed tiles that hold something, summed over K and V of all layers.", labels=["model"])
        packed = CounterMetricFamily("gearcpp_kv_tiles_packed", "Tiles encoded since the cache was made.", labels=["model"])
        running = GaugeMetricFamily("gearcpp_requests_running", "Requests that a model works on.", labels=["model"])
        waiting = GaugeMetricFamily("gearcpp_requests_waiting", "Requests waiting for a slot.", labels=["model"])
        for name, model in self._models.items():
            running.add_metric([name], min(self._n_requests[name], model.settings.parallel))
            waiting.add_metric([name], max(self._n_requests[name] - model.settings.parallel, 0))
            tiles.add_metric([name], model.packed_tiles())
            packed.add_metric([name], totals[name]["n_pack"])
        requests = CounterMetricFamily("gearcpp_requests", "Requests answered.", labels=["path", "status"])
        for (path, status), n in dict(self._counts).items():
            requests.add_metric([path, str(status)], n)
        yield from (tiles, packed, running, waiting, requests)


def _metric_of(line: str) -> str:
    return re.sub(r"^# (HELP|TYPE) ", "", line).partition(" ")[0].partition("{")[0]


async def _upstream(model: Model) -> list[str]:
    """What llama.cpp's server says of itself, with the model's name as a label; nothing where it does not answer."""

    async def read() -> bytes:
        async with ask(model.socket, "GET", "/metrics") as answer:
            return await answer.read() if answer.status == 200 else b""

    try:
        text = (await asyncio.wait_for(read(), _PATIENCE)).decode()
    except (UpstreamError, asyncio.TimeoutError):
        return []
    name = model.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return [line if line.startswith("#") else re.sub(r"^([\w:]+)", lambda m: f'{m[1]}{{model="{name}"}}', line) for line in text.splitlines() if line]
