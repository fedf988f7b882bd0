"""Whom a node talks to: addresses that name a peer, and the peers that were disconnected from here."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.errors import IdentityError
from protocol.transport.base import PeerUnreachable
from protocol.transport.peer_id import node_id_of_peer

__all__ = ["Gate"]


class Gate:
    """What `connect` and `disconnect` mean, whatever carries the bytes."""

    def __init__(self, own: str, pattern: "re.Pattern[str]", form: str) -> None:
        """`pattern` has a group called `peer` for the peer id; `form` says in words what an address looks like."""
        self._own, self._pattern, self._form = own, pattern, form
        self._refused: set[str] = set()

    def parse(self, address: str) -> "tuple[str, re.Match[str]]":
        """Return whom an address names, and the match. Raises ValueError for no address, or the node's own."""
        match = self._pattern.match(address)
        if match is None:
            raise self._no_address(address)
        try:
            peer = node_id_of_peer(match["peer"])
        except IdentityError:
            raise self._no_address(address) from None
        if peer == self._own:
            raise ValueError("this is the node's own address: name another node's")
        return peer, match

    def _no_address(self, address: str) -> ValueError:
        return ValueError(f"not an address of this transport: {address[:200]!r}; it {self._form}")

    def refuse(self, peer: str) -> None:
        """Keep a peer out until it is connected to again from here."""
        self._refused.add(peer)

    def refuses(self, peer: str) -> bool:
        """Whether a peer is kept out."""
        return peer in self._refused

    def check(self, peer: str) -> None:
        """Raise PeerUnreachable for a peer that is kept out."""
        if peer in self._refused:
            raise PeerUnreachable(f"{peer} was disconnected from here")

    @contextmanager
    def opened(self, peer: str) -> Iterator[None]:
        """Let a peer in, for good where what is done meanwhile succeeds."""
        was_refused = peer in self._refused
        self._refused.discard(peer)
        try:
            yield
        except BaseException:
            if was_refused:
                self._refused.add(peer)
            raise
