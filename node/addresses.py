"""Addresses of nodes as people type and read them. Pure; opens nothing."""

from collections.abc import Sequence

from protocol.errors import IdentityError
from protocol.transport.peer_id import node_id_of_peer
from swarm.errors import UserError

__all__ = ["AddressError", "best_address", "checked_peers", "expand_listen"]

_EXAMPLE = "/ip4/192.0.2.1/tcp/7000/p2p/12D3KooW…"


class AddressError(UserError):
    """An address that no node can have."""


def checked_peers(texts: Sequence[str], option: str = "--peers") -> list[str]:
    """Return the addresses in `--peers` options, each of which may hold several. Raises AddressError.

    option: how what is wrong was given.
    """
    addresses = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    for address in addresses:
        _, found, peer = address.rpartition("/p2p/")
        try:
            node_id_of_peer(peer)
        except IdentityError:
            found = ""
        if not found or not address.startswith("/"):
            raise AddressError(
                f"{option} {address!r} is no address of a node: it looks like {_EXAMPLE}; a node prints its own when "
                "it starts, and `swarm-node stats` shows it"
            )
    return addresses


def expand_listen(texts: Sequence[str]) -> list[str]:
    """Return the addresses in `--listen` options; a port alone stands for TCP on every interface.

    Raises AddressError for what is neither; what else may be wrong with an address, the transport says.
    """
    found: list[str] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        if part.isdigit():
            found.append(f"/ip4/0.0.0.0/tcp/{part}")
        elif part.startswith("/"):
            found.append(part)
        else:
            raise AddressError(f"cannot listen on {part!r}: write it like /ip4/0.0.0.0/tcp/7000, or give a port alone")
    return found


def best_address(addresses: Sequence[str]) -> str:
    """Return the address that most others can use: one of another machine's network, and TCP."""
    return min(addresses, key=lambda address: ("/ip4/127." in address or "/ip6/::1" in address, "/tcp/" not in address))
