"""How a node of the transport `libp2p` stands in the network. Needs no libp2p to be read."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Libp2pSettings"]


@dataclass(frozen=True, slots=True)
class Libp2pSettings:
    """What a user sets, and which swarm is meant."""

    swarm_id: str = "main"  # names the topic of announcements, and whom the local network is searched for
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)  # port 0: any free one
    announce: tuple[str, ...] = ()  # what others are told instead of the addresses of this machine
    relay: bool = True  # whether others are relayed where this node can be reached
    auto_relay: bool = False  # whether to be reached through relays, unless others can connect to this node
    trusted_relays: tuple[str, ...] = ()  # multiaddresses, for auto_relay; empty: peers that this node has connected to
    auto_nat: bool = True  # whether peers are asked, and told, if they can be reached
    force_reachability: Literal["public", "private"] | None = None  # None: found out by auto_nat
    mdns: bool = True  # whether nodes of the local network find this one, and are found
    startup_timeout_s: float = 60.0  # a busy machine takes long to load the package
