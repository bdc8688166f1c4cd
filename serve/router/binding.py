"""Binding of ZMQ sockets to a free port of this node."""

import zmq

from serve.errors import ConfigError


def bind(socket: "zmq.Socket[bytes]", host: str) -> str:
    """Bind to a free port and return the endpoint, as other nodes connect to it.

    Args:
        socket: Not bound yet.
        host: An IPv4 or IPv6 address of this node.

    Raises:
        ConfigError: No interface of this node has the address.
    """
    address = f"[{host}]" if ":" in host else host
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
    try:
        socket.bind(f"tcp://{address}:*")
    except zmq.ZMQError as exc:
        raise ConfigError(
            f"the event plane cannot listen on this node's address {host} ({exc}): Ray knows the node by an address "
            "that none of its network interfaces has; start Ray with --node-ip-address set to one that it has"
        ) from exc
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return f"tcp://{address}:{endpoint.rpartition(':')[2]}"
