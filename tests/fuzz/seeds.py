"""Seeds for fuzz_native: inputs that are right, for it to change.

python tests/fuzz/seeds.py FOLDER
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from models import write_model

from gearcpp import GearConfig, Llama, native

SESSION, STORE, TILE, SETTING = range(4)

# As make_cache in fuzz_native.cpp.
CONFIG = GearConfig().replace(tile=64, n_tail=8, n_sink=2)
CONFIGS = [
    CONFIG.replace(rank_k=0),
    CONFIG.replace(rank_k=0, sparsity=0.05, center_v=False),
    CONFIG.replace(rank_k=0, bits_k=16),
    CONFIG.replace(rank_k=2),
]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    n = 0

    def put(kind: int, second: int, data: bytes) -> None:
        nonlocal n
        (folder / f"seed-{n:03}").write_bytes(bytes([kind, second]) + data)
        n += 1

    random = np.random.default_rng(1)
    for i, config in enumerate(CONFIGS):
        for n_row in (0, 20, 150, 200):
            with native.Cache(config, n_head_kv=2, d_head_k=32, n_cell=200, n_stream=2, n_ubatch=16) as cache:
                for side in ("k", "v"):
                    for first in range(0, n_row, 10):
                        cache.write(side, np.arange(first, first + 10), random.standard_normal((10, 64)))
                    put(STORE, i + (16 if side == "v" else 0), cache.save(side))
    with tempfile.TemporaryDirectory() as work:
        model = write_model(Path(work) / "model.gguf")
        for kv in ("f16", GearConfig(tile=64, n_tail=32)):
            llm = Llama(str(model), kv_type=kv, n_ctx=1024, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False)
            llm.eval([1, *range(3, 40)])
            llm.save_session(f"{work}/session")
            put(SESSION, 0, Path(f"{work}/session").read_bytes())
            llm.close()
    for first in range(40):
        put(TILE, 0, random.integers(0, 256, 8 + first, np.uint8).tobytes())
    for text in (
        "bits_k=3,bits_v=3,group_k=64",
        "n_tail=256,sparsity=0.05,clip_k=0.9,center_v=0",
        "seed=7,rank_k=2,factor_bits=4,rounds=2",
        "tile=128,n_sink=4",
    ):
        put(SETTING, 0, text.encode())
    print(f"{n} seeds in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
