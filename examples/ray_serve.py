"""Replicas of the server on Ray Serve: one model and one KV cache in each, on one machine or on a cluster.

    pip install "gearcpp[server]" "ray[serve]"
    python examples/ray_serve.py -m /path/to/model.gguf --replicas 2 --threads 8 -c 32768 --parallel 4

Every replica is a whole `gearcpp serve` application (`gearcpp.server.app.create_app`) in a process of its own; Ray starts the processes, restarts them if
they die, and spreads requests over them, streams included. On a cluster (`ray start --head`, `ray start --address=...`, then this script on one of its
machines) the model's path must exist on every machine. Clients use http://HOST:PORT/v1 as ever.

What replicas do not share: a conversation's next turn finds its prefix only in the replica that had the last one, and /metrics answers for whichever
replica the request reaches.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from ray import serve
from starlette.applications import Starlette


def deployment(model: dict[str, Any], server: dict[str, Any], *, replicas: int, cpus: float) -> Any:
    """A Ray Serve application.

    Args:
        model: settings of the model, as in `gearcpp.server.settings.ModelSettings`.
        server: settings of each replica's server (`ServerSettings`); where it listens is Ray's matter.
        replicas: processes.
        cpus: processors that Ray reserves for each; the model's n_threads should be the same.
    """

    def build() -> Starlette:
        """Called in each replica: models are loaded there, nothing of them is sent over the network."""
        from gearcpp.server.app import create_app
        from gearcpp.server.settings import ModelSettings, ServerSettings

        return create_app(ServerSettings(**server), [ModelSettings(**model)])

    most = model.get("parallel", 4) + server.get("max_queue", 64)  # a full queue is the replica's to refuse, with 429; Ray's own limit stays above
    options = {"num_replicas": replicas, "max_ongoing_requests": most + 16, "ray_actor_options": {"num_cpus": cpus}}
    return serve.deployment(serve.ingress(build)(), name="gearcpp", **options).bind()  # type: ignore[call-overload]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="GGUF file, at the same path on every machine")
    parser.add_argument("--kv", default="gear")
    parser.add_argument("-c", "--ctx-size", type=int, default=8192)
    parser.add_argument("--parallel", type=int, default=4, help="requests decoded together in each replica")
    parser.add_argument("--threads", type=int, default=2, help="of each replica")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--host", default="127.0.0.1", help="where Ray's proxy listens; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key")
    args = parser.parse_args()

    model = {"model": args.model, "kv_type": args.kv, "n_ctx": args.ctx_size, "parallel": args.parallel, "n_threads": args.threads}
    app = deployment({**model, "n_threads_batch": args.threads}, {"api_key": args.api_key, "host": args.host}, replicas=args.replicas, cpus=args.threads)
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(app, route_prefix="/")
    print(f"{args.replicas} replicas behind http://{args.host}:{args.port}/v1", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
