"""Run a small local Ray cluster that serves deploy/ray/serve.yaml until standard input is closed.

Run it as `python run_ray.py FOLDER` in .venv-ray; FOLDER is for Ray's files. It prints "ready" when all replicas are
ready. Ray listens on every interface, so run it with network_namespace.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client  # the only API that deploys a file and waits for it
from ray.serve.schema import ServeDeploySchema

CONFIG = Path(__file__).parents[1] / "deploy/ray/serve.yaml"

config = yaml.safe_load(CONFIG.read_text())

ray.init(
    num_cpus=2,
    include_dashboard=False,
    log_to_driver=False,
    object_store_memory=256 * 2**20,
    _node_ip_address="127.0.0.1",
    _temp_dir=sys.argv[1],
)
try:
    serve.start(config["proxy_location"], http_options=config["http_options"], grpc_options=config["grpc_options"])
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)
    print("ready", flush=True)
    sys.stdin.read()
finally:
    serve.shutdown()
    ray.shutdown()
