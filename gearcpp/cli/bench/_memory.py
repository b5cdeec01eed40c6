"""Peak memory of one cache type: a process of its own that loads the model, fills the context and says how much it ever had.

Run as ``python -m gearcpp.cli.bench._memory`` by `peak_rss`; types that share a process could not be told apart.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

from gearcpp.cache.kv_type import KVType, normalize_kv_type
from gearcpp.cli.bench._steps import Plan, Runner
from gearcpp.errors import GearError


def peak_rss(path: Path, kv: KVType, plan: Plan) -> int:
    """Bytes of the peak resident set with the context filled; weights that llama.cpp maps are in it.

    Raises:
        GearError: the process failed.
    """
    request = json.dumps({"path": str(path), "kv": kv.gear.to_dict() if kv.gear else [kv.type_k, kv.type_v], "plan": vars(plan)})
    child = subprocess.run([sys.executable, "-m", __spec__.name, request], capture_output=True, text=True, check=False)
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise GearError(f"measuring the memory of {kv.name} failed: {reason}; --no-rss leaves it out")
    return int(child.stdout)


def _own_peak() -> int:
    """Bytes. From /proc where there is one: Linux lets ru_maxrss pass from the process that started this one."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _main() -> None:
    request = json.loads(sys.argv[1])
    kv = request["kv"]
    runner = Runner(Path(request["path"]), normalize_kv_type(kv if isinstance(kv, dict) else tuple(kv)), plan := Plan(**request["plan"]))
    runner.fill(plan.n_ctx)
    print(_own_peak())


if __name__ == "__main__":
    _main()
