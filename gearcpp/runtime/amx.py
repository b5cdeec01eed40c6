"""llama.cpp's AMX kernels, where they crash.

Builds of llama.cpp for processors with AMX can die of the first product with quantized weights. GCC 12 leaves out most of the tile configuration,
since its own header says that ldtilecfg reads 8 bytes; and threads other than the first may lack Linux's permission for tile data
(ggml-org/llama.cpp#26954). No error comes out of that, only a signal. So where llama.cpp was built with AMX a process of its own tries it once. Where
that one dies, weights are not put into buffers for AMX. llama.cpp's other repacked formats go with them, for one parameter is for both.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings

import llama_cpp

from ..errors import DataError
from ..model_files import bundled_model

_TIMEOUT = 60  # seconds
_PROBE = """
import sys
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=2, n_threads_batch=2, verbose=False)
llm.eval(list(range(4, 36)))
llm.eval([4])
"""


@functools.cache
def works() -> bool:
    """Whether llama.cpp can multiply with quantized weights as it would by default. Takes a second where it has AMX, and no time elsewhere."""
    if b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info() or not sys.executable:
        return True
    try:
        command = [sys.executable, "-c", _PROBE, str(bundled_model())]
        return subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False).returncode >= 0
    except (DataError, OSError, subprocess.TimeoutExpired):
        return True  # nothing was seen to fail


def avoid_if_broken(params: llama_cpp.llama_model_params) -> None:
    """Keep weights out of AMX's buffers where those kernels crash, with one warning."""
    if works() or not params.use_extra_bufts:
        return
    warnings.warn(
        "this build of llama.cpp crashes in its AMX kernels (ggml-org/llama.cpp#26954): they are left out, which makes prompts slower. To mend it, build "
        "llama-cpp-python again with CFLAGS=CXXFLAGS='-mno-amx-int8 -mno-amx-tile' set, or with a newer compiler",
        stacklevel=2,
    )
    params.use_extra_bufts = False
