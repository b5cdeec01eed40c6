"""The lines that chat and generate print about a model and an answer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gearcpp.cache.stats import worst
from gearcpp.cli._console import mib

if TYPE_CHECKING:
    from gearcpp import Llama
    from gearcpp.cli._conversation import Conversation


def cache_line(llm: Llama) -> str:
    """Memory of the KV cache for its whole context, and what f16 would take."""
    total = llm.kv_stats()["total"]
    return f"KV {mib(total['bytes'])} (f16: {mib(total['bytes_f16'])})"


def model_line(llm: Llama) -> str:
    """What was loaded, and what its layers are."""
    return f"{Path(llm.model_path).name} | {llm.kv_type.name} | context {llm.n_ctx()} | {cache_line(llm)} | {layers_line(llm)}"


def layers_line(llm: Llama) -> str:
    """How many layers are GEAR, and why the others are not."""
    return f"layers: {llm.kv_stats()['summary']}"


def answer_line(conversation: Conversation) -> str:
    """What the last answer took."""
    timing = conversation.timing
    return f"prompt {timing.prompt_rate:.0f} t/s | generation {timing.generation_rate:.1f} t/s | {cache_line(conversation.llm)}"


def answer_record(conversation: Conversation) -> dict[str, Any]:
    """The same for programs."""
    llm = conversation.llm
    total = llm.kv_stats()["total"]
    return {
        "model": llm.model_path,
        "kv_type": llm.kv_type.name,
        "n_ctx": llm.n_ctx(),
        "seed": conversation.seed,
        **asdict(conversation.timing),
        "kv_bytes": total["bytes"],
        "kv_bytes_f16": total["bytes_f16"],
    }


def stats_lines(conversation: Conversation) -> list[str]:
    """What the KV cache holds, for /stats."""
    llm = conversation.llm
    stats = llm.kv_stats()
    total = stats["total"]
    return [
        f"context: {len(conversation.dialogue.tokens)} of {llm.n_ctx()} tokens",
        f"memory: {mib(total['bytes'])} for the whole context, {mib(total['bytes_used'])} in use; f16 would take {mib(total['bytes_f16'])}",
        layers_line(llm),
        f"packed: {total['packed_share']:.0%} of the rows, {total['bits_per_element']:.2f} bits per element; the others are exact (f16)",
        f"all counted, exact rows and bookkeeping too: {total['bits_per_element_all']:.2f} bits per element of the whole context",
        *error_lines(stats),
    ]


def error_lines(stats: dict[str, Any]) -> list[str]:
    """What packing did to the rows, by the cache's own estimate (`Llama.kv_stats`); nothing where nothing is known."""
    total, layers = stats["total"], stats["layers"]
    parts = []
    if (k := worst(layers, "k")) and total["score_error"] is not None:
        parts.append(f"scores {total['score_error']:.2f} nats (worst: layer {k['il']} head {k['worst_head']}, {k['worst_error']:.2f})")
    if (v := worst(layers, "v")) and total["value_error"] is not None:
        parts.append(f"values {total['value_error']:.1%} (worst: layer {v['il']} head {v['worst_head']}, {v['worst_error']:.1%})")
    if total["n_stay_exact"]:
        parts.append(f"{total['n_stay_exact']} of {len(layers)} tensors stay f16 from here on, because packing changes them too much")
    return [f"error by its own estimate: {'; '.join(parts)}"] if parts else []
