"""Finds nodes of the same swarm on the local network, and lets them find this one: multicast DNS as libp2p does it.

A node is a service of the type `_p2p._udp.local.` whose TXT records are its multiaddresses (`dnsaddr=…/p2p/…`), as the
libp2p specification of mDNS discovery says, and one more, `swarm`, a digest of the swarm's id: nodes of other swarms
and other programs are passed over. Nothing that comes is believed: an address that is found is one to try.

py-libp2p's own discovery stops its loop while it registers, tells of 0.0.0.0 where a node listens on every interface,
and finds out this machine's address by a route to the internet, without which it says 127.0.0.1. This one runs on the
same package (`zeroconf`) in the node's own loop.
"""

import asyncio
import hashlib
import ipaddress
import random
import string
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from zeroconf import ServiceStateChange
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from protocol.transport.peer_id import peer_id_of

__all__ = ["LocalNetwork"]

SERVICE = "_p2p._udp.local."
NAME_CHARACTERS = 32  # drawn anew at each start, as the specification says
NO_PORT = 4001  # of the service record, which must have one and which nobody reads
MAX_FOUND = 256  # addresses that are remembered, so that each is told of once
MAX_LOOKING = 16  # services whose records are asked for at one time
MAX_ADDRESSES = 8  # of one node
MAX_TXT_BYTES = 255
ASK_TIMEOUT_S = 3.0


class LocalNetwork:
    """One node's part in the mDNS of its local network."""

    def __init__(self, own: str, swarm_id: str, tell: Callable[[str], None]) -> None:
        """`tell` is told once of every address of another node of the swarm."""
        self._own_end, self._tell = f"/p2p/{peer_id_of(own)}", tell
        self._swarm = hashlib.sha256(b"swarm-node/mdns" + swarm_id.encode()).hexdigest()[:32].encode()
        self._name = f"{''.join(random.choices(string.ascii_lowercase + string.digits, k=NAME_CHARACTERS))}.{SERVICE}"
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._looking: set[asyncio.Task[None]] = set()
        self._found: OrderedDict[str, None] = OrderedDict()
        self.problem: str | None = None  # why this machine has no mDNS

    @property
    def num_found(self) -> int:
        """How many addresses were found lately."""
        return len(self._found)

    async def start(self, addresses: tuple[str, ...]) -> None:
        """Tell the local network of these addresses, and look for others. Without multicast: `problem` says so."""
        try:
            self._zeroconf = zeroconf = AsyncZeroconf()
            # The name is drawn from 165 bits: nobody else has it, and asking who does would take half a second.
            await (await zeroconf.async_register_service(self._service(addresses), cooperating_responders=True))
            self._browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[self._changed])
        except OSError as error:
            self.problem = f"no mDNS on this machine: {error.strerror or error}"

    async def close(self) -> None:
        """Take the node off the local network."""
        for task in list(self._looking):
            task.cancel()
        if self._browser is not None:
            await self._browser.async_cancel()
        if self._zeroconf is not None:
            await self._zeroconf.async_unregister_all_services()
            await self._zeroconf.async_close()

    def _service(self, addresses: tuple[str, ...]) -> AsyncServiceInfo:
        properties: dict[bytes, bytes] = {b"swarm": self._swarm}
        for number, address in enumerate(addresses[:MAX_ADDRESSES], start=1):
            key, value = b"dnsaddr" if number == 1 else b"dnsaddr%d" % number, address.encode()
            if len(key) + 1 + len(value) <= MAX_TXT_BYTES and not address.startswith(("/ip4/127.", "/ip6/::1/")):
                properties[key] = value
        if len(properties) == 1 and addresses:  # a machine without a network has itself
            properties[b"dnsaddr"] = addresses[0].encode()
        hosts = list(dict.fromkeys(address.split("/")[2] for address in addresses))
        return AsyncServiceInfo(
            SERVICE,
            self._name,
            port=NO_PORT,
            properties=properties,
            server=f"{self._name.split('.', 1)[0]}.local.",
            parsed_addresses=[host for host in hosts if _is_ip(host)],  # what is asked for is not whole without one
        )

    def _changed(self, zeroconf: Any, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed or name == self._name or len(self._looking) >= MAX_LOOKING:
            return
        task = asyncio.get_running_loop().create_task(self._look(zeroconf, name))
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    async def _look(self, zeroconf: Any, name: str) -> None:
        """Ask for the records of a service, and tell of the addresses in them."""
        info = AsyncServiceInfo(SERVICE, name)
        await info.async_request(zeroconf, ASK_TIMEOUT_S * 1000)  # the TXT record may come and others not
        properties: dict[bytes, bytes | None] = info.properties
        if properties.get(b"swarm") != self._swarm:
            return
        texts = [value for key, value in properties.items() if key.startswith(b"dnsaddr") and value is not None]
        for text in texts[:MAX_ADDRESSES]:
            address = text.decode(errors="replace")
            if address in self._found or address.endswith(self._own_end):
                continue
            self._found[address] = None
            if len(self._found) > MAX_FOUND:
                self._found.popitem(last=False)
            self._tell(address)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:  # a name, that the user has announced
        return False
    return True
