"""The ports that a node takes, so that a restart can have the same."""

import asyncio
import ipaddress
import re
import socket

from protocol.transport.base import TransportError

__all__ = ["choose_ports"]

_LISTEN = re.compile(r"/ip(4|6)/([^/]+)/(tcp/(\d{1,5})|udp/(\d{1,5})/quic-v1)\Z")
_PORT_TIMEOUT_S = 3.0  # a node that was killed a moment ago may still be letting go of its ports


async def choose_ports(listen: tuple[str, ...]) -> tuple[str, ...]:
    """Return the addresses with every port 0 replaced by a free one, so that a restart can have the same.

    Raises TransportError where a port is taken: neither p2pd nor py-libp2p says so of one address in several.
    """
    if not listen:
        raise TransportError("no address to listen on: give --listen, e.g. /ip4/0.0.0.0/tcp/0")
    return tuple([await _choose_port(address) for address in listen])


async def _choose_port(address: str) -> str:
    match = _LISTEN.match(address)
    port = int(match[4] or match[5]) if match else 0
    try:
        ip = ipaddress.ip_address(match[2]) if match else None
    except ValueError:
        ip = None
    if match is None or ip is None or ip.version != int(match[1]) or port > 65_535:
        form = "/ip4/0.0.0.0/tcp/7000 or /ip4/0.0.0.0/udp/7000/quic-v1"
        raise TransportError(f"cannot listen on {address[:200]!r}: write it like {form}")
    is_tcp = match[4] is not None
    deadline_s = asyncio.get_running_loop().time() + _PORT_TIMEOUT_S
    while True:
        try:
            chosen = _try_port(str(ip), port, is_tcp)
            break
        except OSError as error:
            if asyncio.get_running_loop().time() > deadline_s:
                fix = "stop what uses the port, or choose another with --listen"
                raise TransportError(f"cannot listen on {address}: {error.strerror}; {fix}") from error
            await asyncio.sleep(0.1)
    return f"/ip{ip.version}/{ip}/" + (f"tcp/{chosen}" if is_tcp else f"udp/{chosen}/quic-v1")


def _try_port(ip: str, port: int, is_tcp: bool) -> int:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM) as probe:
        if is_tcp:  # connections that linger after their end do not take a port; who listens does
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((ip, port))
        if is_tcp:
            probe.listen(1)
        return int(probe.getsockname()[1])
