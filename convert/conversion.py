"""From a model folder of transformers to one GGUF file."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType

from gearcpp.errors import ConfigError, DataError, GearError

from .architecture import Architecture
from .architectures import architecture_for
from .checkpoint import Checkpoint, read_checkpoint
from .config import read_json
from .container import OutputTensor, Progress, replacing, write_gguf
from .hub import model_folder
from .metadata import Metadata
from .quantization import check_type, quantize_model
from .recovery import Recovery, recover_error
from .rows import Encoded, Rows
from .tokenizer_files import read_vocabulary
from .upstream import check_checkout, run_converter
from .verification import Finite, check_file, check_finite, check_tokens
from .vocabulary import Vocabulary

OUTTYPES: Mapping[str, tuple[Type, FileType]] = {
    "f32": (Type.F32, FileType.ALL_F32),
    "f16": (Type.F16, FileType.MOSTLY_F16),
    "bf16": (Type.BF16, FileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, FileType.MOSTLY_Q8_0),
}
# llama.cpp computes with these in float32, whatever the rest of the model has.
_ALWAYS_F32 = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "position_embd.weight",
    "shortconv.conv.weight",
    "ssm_conv1d.weight",
)


@dataclass(frozen=True)
class Conversion:
    """What was written, or with ``dry_run`` would be.

    Attributes:
        path: the GGUF file.
        architecture: llama.cpp's name of the architecture.
        outtype: type of the matrices, ``auto`` resolved, or of the quantization.
        n_parameters: numbers in all tensors.
        tensors: name -> type and shape (rows first, as transformers has it); before quantization.
        n_bytes: size of the file; with ``dry_run`` of the tensors before quantization.
        metadata: GGUF's keys and values.
        notices: where llama.cpp computes or splits text otherwise than transformers.
        recovery: the adapter, if ``recover_rank`` was given.
    """

    path: Path
    architecture: str
    outtype: str
    n_parameters: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(repr=False)
    n_bytes: int
    metadata: Metadata = field(repr=False)
    notices: tuple[str, ...] = ()
    recovery: Recovery | None = None


def convert_model(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    outtype: str = "auto",
    quantize: str | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    recover_rank: int | None = None,
    recover_rounds: int = 1,
    pre: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    upstream: str | os.PathLike[str] | None = None,
    upstream_python: bool = False,
    progress: Progress | None = None,
    report: Callable[[str], None] | None = None,
) -> Conversion:
    """Convert a model of transformers to GGUF, in the memory of a block of rows.

    Args:
        source: a folder with config.json, safetensors (or PyTorch pickles, with torch installed) and a tokenizer; or a repository ``user/name`` of the
            Hugging Face hub, which is downloaded into its cache.
        output: the file to write; it appears when it is complete.
        outtype: type of the matrices: ``f32``, ``f16``, ``bf16``, ``q8_0``, or ``auto``, which is bf16 for a bf16 checkpoint and f16 for others.
            Vectors, norms and routers are f32, as llama.cpp wants them.
        quantize: a type of llama.cpp such as ``"Q4_K_M"``: the file is converted first and then quantized by llama.cpp.
        imatrix: importance matrix of llama-imatrix, for `quantize` and `recover_rank`.
        recover_rank: with `quantize`: also write ``<output>-lora.gguf``, a LoRA adapter that holds a low-rank approximation of the quantization error.
        recover_rounds: how often that adapter and the quantization are found in turn.
        pre: llama.cpp's name of a pre-tokenizer, where the tokenizer's rules are not recognised.
        verify: refuse NaN and infinity, read the file back and compare it, and compare llama.cpp's tokens with the tokenizer's.
        dry_run: do everything but write.
        upstream: a checkout of llama.cpp (or its unpacked sources), whose own converter is run in place of ours, in an environment that is made for it in
            the cache folder. That converter runs the Python code of a model folder that has some.
        upstream_python: run it by the current Python instead, which must have what the converter needs.
        progress: called with a tensor's name and the number of bytes just written.
        report: called with a line about each later step.

    Raises:
        ConfigError: an unknown outtype or quantization, or options that do not go together.
        UnsupportedError: an architecture, tokenizer or kind of weights that cannot be converted, named in the message with what can.
        DataError: something is missing, damaged or contradictory, or the output cannot be written. No half-written file is left.
    """
    _check_options(outtype, quantize, imatrix, recover_rank)
    _check_upstream(upstream, upstream_python, pre, dry_run)
    folder, path = model_folder(os.fspath(source)), Path(output)
    if upstream is not None:
        return _by_upstream(
            folder,
            path,
            lambda file: run_converter(Path(upstream), folder, file, outtype, current_python=upstream_python, report=report or _silent),
            lambda file: _quantize(file, path, quantize, imatrix, recover_rank, recover_rounds, report or _silent) if quantize else None,
            quantize,
            verify,
        )
    conversion, tensors = _plan(folder, path, outtype, pre)
    if dry_run:
        return conversion
    if verify:
        tensors = [tensor if isinstance(tensor.rows, Encoded) else replace(tensor, rows=Finite(tensor.name, tensor.rows)) for tensor in tensors]
    with replacing(path) as temporary:
        write_gguf(temporary, conversion.architecture, conversion.metadata, tensors, progress)
        notices = conversion.notices
        if verify:
            check_file(temporary, tensors)
            notices += tuple(check_tokens(temporary, folder))
        recovery = _quantize(temporary, path, quantize, imatrix, recover_rank, recover_rounds, report or _silent) if quantize else None
        n_bytes = temporary.stat().st_size
    return replace(conversion, outtype=quantize or conversion.outtype, n_bytes=n_bytes, notices=notices, recovery=recovery)


def _check_options(outtype: str, quantize: str | None, imatrix: object, recover_rank: int | None) -> None:
    if outtype != "auto" and outtype not in OUTTYPES:
        raise ConfigError(f"unknown outtype {outtype!r}: choose one of auto, {', '.join(OUTTYPES)}; other types come with quantize")
    if quantize:
        check_type(quantize)
    if quantize and outtype == "q8_0":
        raise ConfigError("quantize starts from f32, f16 or bf16, not from outtype q8_0")
    for name, value in (("imatrix", imatrix), ("recover_rank", recover_rank)):
        if value is not None and not quantize:
            raise ConfigError(f"{name} goes with quantize")
    if recover_rank is not None and recover_rank < 1:
        raise ConfigError(f"recover_rank must be at least 1, not {recover_rank}")


def _check_upstream(upstream: str | os.PathLike[str] | None, upstream_python: bool, pre: str | None, dry_run: bool) -> None:
    if upstream is None:
        if upstream_python:
            raise ConfigError("upstream_python goes with upstream")
        return
    for name, given in (("pre", pre is not None), ("dry_run", dry_run)):
        if given:
            raise ConfigError(f"{name} is for gearcpp's own converter, it does not go with upstream")
    check_checkout(Path(upstream), upstream_python)


def _by_upstream(
    folder: Path, path: Path, convert: Callable[[Path], None], quantized: Callable[[Path], Recovery | None], quantize: str | None, verify: bool
) -> Conversion:
    """llama.cpp's own converter, and after it the same steps as after ours."""
    with replacing(path) as temporary:
        with tempfile.TemporaryDirectory(prefix=".gearcpp-", dir=path.parent) as scratch:
            made = Path(scratch) / "converted.gguf"
            convert(made)
            conversion = _read_back(made, path)
            notices: tuple[str, ...] = ()
            if verify:
                check_finite(made)
                notices = tuple(check_tokens(made, folder))
            made.replace(temporary)
        recovery = quantized(temporary)
        n_bytes = temporary.stat().st_size
    return replace(conversion, outtype=quantize or conversion.outtype, n_bytes=n_bytes, notices=notices, recovery=recovery)


def _read_back(file: Path, path: Path) -> Conversion:
    """What another converter wrote."""
    try:
        reader = gguf.GGUFReader(file)
        metadata = {key: entry.contents() for key, entry in reader.fields.items() if not key.startswith("GGUF.")}
        architecture = str(metadata["general.architecture"])
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(f"what llama.cpp's converter wrote cannot be read as a GGUF file: {error}") from error
    tensors = {tensor.name: (tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))) for tensor in reader.tensors}
    names = {int(file_type): name for name, (_, file_type) in OUTTYPES.items()}
    return Conversion(
        path=path,
        architecture=architecture,
        outtype=names.get(int(metadata.get("general.file_type", -1)), "mixed"),
        n_parameters=sum(math.prod(shape) for _, shape in tensors.values()),
        tensors=tensors,
        n_bytes=0,
        metadata=metadata,
    )


def _plan(folder: Path, path: Path, outtype: str, pre: str | None) -> tuple[Conversion, list[OutputTensor]]:
    """Everything but the weights themselves."""
    try:
        return _plan_from(_read_config(folder), folder, path, outtype, pre)
    except GearError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / 'config.json'} or a file beside it has a value of the wrong kind: {type(error).__name__}: {error}") from error


def _plan_from(config_json: dict[str, Any], folder: Path, path: Path, outtype: str, pre: str | None) -> tuple[Conversion, list[OutputTensor]]:
    architecture = architecture_for(config_json)
    checkpoint = read_checkpoint(folder)
    vocabulary = read_vocabulary(folder, config_json, pre, architecture.pieces)
    architecture.amend_vocabulary(vocabulary)
    vocabulary.pad(architecture.sizes()["vocab"])
    chosen = _chosen_outtype(outtype, checkpoint)
    tensors = [OutputTensor(name, rows, _tensor_type(name, rows, OUTTYPES[chosen][0])) for name, rows in architecture.tensors(checkpoint).items()]
    conversion = Conversion(
        path=path,
        architecture=architecture.gguf_name,
        outtype=chosen,
        n_parameters=sum(math.prod(tensor.rows.shape) for tensor in tensors),
        tensors={tensor.name: (tensor.type.name, tensor.rows.shape) for tensor in tensors},
        n_bytes=sum(tensor.n_bytes for tensor in tensors),
        metadata=_metadata(folder, architecture, vocabulary, tensors, chosen),
        notices=(*architecture.notices(), *vocabulary.notices),
    )
    return conversion, tensors


def _read_config(folder: Path) -> dict[str, Any]:
    if config_json := read_json(folder / "config.json"):
        return config_json
    raise DataError(f"{folder} has no config.json: it is no model folder of transformers")


def _chosen_outtype(outtype: str, checkpoint: Checkpoint) -> str:
    """``auto`` goes by the first matrix of the checkpoint; config.json's dtype is not always true."""
    if outtype != "auto":
        return outtype
    first = next((tensor.dtype for tensor in checkpoint.values() if len(tensor.shape) > 1), "F16")
    return "bf16" if first == "BF16" else "f16"


def _tensor_type(name: str, rows: Rows, wanted: Type) -> Type:
    if isinstance(rows, Encoded):
        return rows.type
    if len(rows.shape) == 1 or name.endswith(_ALWAYS_F32) or not name.endswith(".weight"):
        return Type.F32
    if rows.n_columns % gguf.GGML_QUANT_SIZES[wanted][0]:
        return Type.F16  # a row must be whole blocks
    return wanted


def _metadata(folder: Path, architecture: Architecture, vocabulary: Vocabulary, tensors: list[OutputTensor], outtype: str) -> Metadata:
    values = _general_metadata(folder, tensors)
    values |= {f"{architecture.gguf_name}.{key}": value for key, value in architecture.metadata().items()}
    values["general.file_type"] = int(OUTTYPES[outtype][1])
    values["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    return values | vocabulary.metadata()


def _general_metadata(folder: Path, tensors: list[OutputTensor]) -> Metadata:
    """Name, size, licence, authors ... from the model card and the folder's name, by gguf's own rules."""
    for name in ("gguf", "gguf.gguf_writer", "metadata"):
        logging.getLogger(name).setLevel(logging.ERROR)
    collected = gguf.GGUFWriter(None, "")
    for tensor in tensors:
        collected.add_tensor_info(tensor.name, tensor.rows.shape, np.dtype(np.float32), tensor.n_bytes)
    counts = collected.get_total_parameter_count()
    found = gguf.Metadata.load(None, folder, None, counts[0])
    found.size_label = found.size_label or gguf.size_label(*counts)
    found.set_gguf_meta_model(collected)
    values: Metadata = {key: entry.value for key, entry in collected.kv_data[0].items() if key != "general.architecture"}
    return {**values, "general.type": "model"}


def _quantize(
    converted: Path, path: Path, quantize: str, imatrix: Any, recover_rank: int | None, recover_rounds: int, report: Callable[[str], None]
) -> Recovery | None:
    """Replace the converted file by its quantization."""
    with tempfile.TemporaryDirectory(prefix=".gearcpp-", dir=path.parent) as scratch:
        quantized = Path(scratch) / "quantized.gguf"
        if recover_rank is None:
            report(f"quantizing to {quantize}")
            quantize_model(converted, quantized, quantize, imatrix=imatrix)
            recovery = None
        else:
            adapter = path.with_name(f"{path.stem}-lora.gguf")
            recovery = recover_error(converted, quantized, adapter, quantize, recover_rank, rounds=recover_rounds, imatrix=imatrix, progress=report)
            recovery = replace(recovery, model=path)
        quantized.replace(converted)
    return recovery


def _silent(line: str) -> None: ...
