"""Makes a node a member of a swarm: its identity, its transport, its exchange, and the line by which others join.

What a member does is `protocol.member`'s, what a round does with it `node.swarm_exchange`'s.
"""

import json
import random
import re
import shlex
from typing import TYPE_CHECKING

from node.addresses import best_address
from node.config import NetworkConfig, RunConfig
from node.display import Display
from node.membership import about_trainer, member_settings
from node.run_folder import RunFolder, write_atomically
from protocol.about import NodeAbout
from protocol.admission import Rescore
from protocol.clock import system_clock
from protocol.identity import Identity
from protocol.member import Member
from protocol.shards import record_validator
from protocol.transport.base import Transport, TransportError
from protocol.transport.hivemind import HivemindTransport
from protocol.transport.hivemind_settings import HivemindSettings
from protocol.transport.libp2p import Libp2pSettings, Libp2pTransport
from protocol.transport.ports import choose_ports

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.exchange import Exchange
    from node.parts import Parts
    from node.rescoring import Rescorer

__all__ = ["join_line", "make_member", "make_swarm_exchange", "make_transport", "started"]

# QUIC where it is asked for: p2pd takes it wherever both ends have it, at twice the CPU a byte, and it gains only where
# routers must be pierced.
_LISTEN = ("/ip4/0.0.0.0/tcp/0",)
_PORT = re.compile(r"(tcp|udp)/\d+(?:/quic-v1)?")


def join_line(member: Member) -> str:
    """Return the command by which others join through this node."""
    parts = ["swarm-node", "join", "--peers", best_address(member.addresses)]
    if member.config.swarm_id != "main":
        parts += ["--swarm-id", member.config.swarm_id]
    transport = member.local.transport.name
    return shlex.join(parts if transport == "hivemind" else [*parts, "--transport", transport])


def make_swarm_exchange(config: RunConfig, folder: RunFolder, display: Display) -> "Exchange":
    """Make the exchange of a node that is in a swarm."""
    from node.rescoring import build_rescorer
    from node.swarm_exchange import SwarmExchange

    def build(parts: "Parts") -> "Rescorer":
        return build_rescorer(config, parts.policy)

    async def make(rescore: Rescore, about: "Callable[[], NodeAbout]") -> Member:
        return await make_member(config, folder, rescore, about)

    return SwarmExchange(
        make,
        build,
        config.sapo,
        about_trainer(config),
        note=display.note,
        on_started=lambda member: started(member, folder, display.note),
    )


async def make_member(
    config: RunConfig, folder: RunFolder, rescore: Rescore | None, about: "Callable[[], NodeAbout]"
) -> Member:
    """Make the node's member, with the identity and the memory of its run folder."""
    identity = Identity.load_or_create(folder.identity)
    listen = config.network.listen or await last_listen(folder)
    return Member(
        identity,
        make_transport(config, identity, listen),
        member_settings(config),
        rescore=rescore,
        about=about,
        state_path=folder.swarm,
        clock=system_clock,
        rng=random.Random(),  # which peers are chosen is no part of what the seed fixes
    )


async def last_listen(folder: RunFolder) -> tuple[str, ...]:
    """Return the ports that the node had before, so that its address stays what it was, as far as they are free."""
    try:
        addresses = json.loads(folder.listen.read_text())
        return await choose_ports(tuple(addresses))
    except (FileNotFoundError, json.JSONDecodeError, TypeError, TransportError):
        return ()  # chosen anew: a memory that is gone, or of ports that others have now


def make_transport(config: RunConfig, identity: Identity, listen: tuple[str, ...] = ()) -> Transport:
    """Make the transport that the settings name. `listen` goes before the settings."""
    network, validator = config.network, record_validator(config.swarm.swarm_id)
    listen = listen or network.listen or _LISTEN
    if network.transport == "libp2p":
        return Libp2pTransport(identity, validator, _libp2p_settings(config, listen))
    return HivemindTransport(identity, validator, _hivemind_settings(network, listen))


def _libp2p_settings(config: RunConfig, listen: tuple[str, ...]) -> Libp2pSettings:
    network = config.network
    return Libp2pSettings(
        swarm_id=config.swarm.swarm_id,
        listen=listen,
        announce=network.announce,
        relay=network.relay,
        auto_relay=network.auto_relay,
        trusted_relays=network.trusted_relays,
        auto_nat=network.auto_nat,
        force_reachability=None if network.reachability == "auto" else network.reachability,
        mdns=network.mdns,
    )


def _hivemind_settings(network: NetworkConfig, listen: tuple[str, ...]) -> HivemindSettings:
    return HivemindSettings(
        listen=listen,
        announce=network.announce,
        relay=network.relay,
        auto_relay=network.auto_relay,
        trusted_relays=network.trusted_relays,
        nat_port_map=network.nat_port_map,
        auto_nat=network.auto_nat,
        force_reachability=None if network.reachability == "auto" else network.reachability,
    )


def started(member: Member, folder: RunFolder, note: "Callable[[str], None]") -> None:
    """Say how others join, and remember the ports."""
    note(f"node {member.node_id} in swarm {member.config.swarm_id!r}; others join it with")
    note(f"  {join_line(member)}")
    ports = {match[1]: match[0] for address in member.addresses if (match := _PORT.search(address))}
    write_atomically(folder.listen, json.dumps([f"/ip4/0.0.0.0/{ports[kind]}" for kind in sorted(ports)]))
