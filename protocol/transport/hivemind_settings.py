"""How a node stands in the network. Needs no hivemind to be read."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["HivemindSettings"]


@dataclass(frozen=True, slots=True)
class HivemindSettings:
    """Passed through to p2pd."""

    # Port 0: any free one. QUIC (/udp/0/quic-v1) is not listened on by default: p2pd takes it wherever both ends have
    # it, and it costs twice the CPU a byte. It gains where both ends are behind routers that must be pierced.
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce: tuple[str, ...] = ()  # what others are told instead of what p2pd sees: behind a forwarded port
    relay: bool = True  # whether streams go through relays, and others are relayed where this node can be reached
    auto_relay: bool = False  # whether to become reachable through a relay where no peer can connect from outside
    trusted_relays: tuple[str, ...] = ()  # multiaddresses, for auto_relay; empty: any, three minutes after the start
    nat_port_map: bool = True  # whether the router is asked to forward the ports (UPnP, NAT-PMP)
    auto_nat: bool = True  # whether peers are asked, and told, if they can be reached; and relayed ones pierce routers
    force_reachability: Literal["public", "private"] | None = None  # None: found out by auto_nat
    startup_timeout_s: float = 60.0  # a busy machine takes long; what p2pd has to complain of comes at once
