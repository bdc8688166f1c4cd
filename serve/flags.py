"""Ray Serve's process-wide switches that RayTRT wants, each with its reason.

Serve reads them when its modules are imported, in every process of every node, so they belong into the environment of
`ray start` (or of `serve run`, which starts a local Ray), not into a runtime_env. `raytrt env` prints them.
"""

import os
from collections.abc import Mapping

SERVE_FLAGS: Mapping[str, str] = {
    # HAProxy instead of a Python proxy in front of the gateways: 20 instead of 180 us of CPU for a streamed chunk.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Calls from gateway to replica over gRPC instead of Ray's object store.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # User code and router on the replica's own event loop: no thread switch for each message.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # A prompt of a million tokens is 4 MiB, which is gRPC's default limit.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 * 2**20),
    # A dead proxy is replaced in 4 s instead of 25 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # After a change of its configuration, the old HAProxy process lives until its streams have ended.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    # A gateway that stops leaves HAProxy within a second; Serve's 30 s are for external load balancers.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # The access log is written in blocks, and to Serve's log files only.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}


def missing_flags(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the names of the switches that cost speed and are not set as we want them."""
    speed = list(SERVE_FLAGS)[:4]
    return [name for name in speed if environ.get(name) != SERVE_FLAGS[name]]
