"""Where this machine can be dialled."""

import ipaddress
import socket
from collections.abc import Iterable

import psutil

__all__ = ["dialable"]


def dialable(listen: Iterable[str]) -> list[str]:
    """Return listening multiaddresses, with the addresses that this machine has in the place of 0.0.0.0 and ::."""
    found = []
    for address in listen:
        _, family, host, rest = address.split("/", 3)
        hosts = _own_hosts(family) if ipaddress.ip_address(host).is_unspecified else [host]
        found += [f"/{family}/{one}/{rest}" for one in hosts]
    return found


def _own_hosts(family: str) -> list[str]:
    """Return this machine's addresses, those of other networks before its own loopback."""
    kind = socket.AF_INET6 if family == "ip6" else socket.AF_INET
    found = []
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family == kind and "%" not in one.address:
                host = ipaddress.ip_address(one.address)
                if not host.is_link_local:
                    found.append((host.is_loopback, one.address))
    return [address for _, address in sorted(found)]
