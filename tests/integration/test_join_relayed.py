"""Two nodes behind firewalls that let nobody in: neither can reach the other but through a bootstrap that relays.

Each is in a network namespace of its own, with an address that libp2p takes for a public one: of others it asks nobody
whether it can be reached, and announces no relay. Nothing leaves these namespaces.
"""

import time

import pytest
from _namespaces import NamespaceError, Namespaces
from _processes import LiveSwarm

PUBLIC = "11.77.0"
WITHIN_S = 420.0  # the firewall is found by AutoNAT, which takes its time; then a relay is, and then the other node


def is_relayed(node):
    """Whether it has an address at a relay."""
    return any("/p2p-circuit/" in address for address in node.swarm()["addresses"])


def has_learned_from_others(node):
    return any(row["num_external"] for row in node.rows())


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("relays", ["named", "found"])
@pytest.mark.parametrize("transport", ["hivemind", "libp2p"])
def test_two_nodes_that_nobody_can_connect_to_learn_from_each_other(tmp_path, transport, relays):
    try:
        network = Namespaces(3, PUBLIC)
    except NamespaceError as error:
        pytest.skip(f"no network namespaces here: {error}")
    with network, LiveSwarm(tmp_path) as swarm:

        def start(number, name, *arguments):
            listen = ("--listen", f"/ip4/{network.hosts[number]}/tcp/0", "--set", "network.nat_port_map=false")
            carrier = ("--transport", transport)
            return swarm.start(
                name, *arguments, *listen, *carrier, through=("ip", "netns", "exec", network.names[number])
            )

        boot = start(0, "boot", "bootstrap")
        relay = boot.swarm()["addresses"][0]
        settings = ["network.auto_relay=true", "rounds=1000000", "evaluation.num_items=0"]
        if relays == "named":
            settings.append(f'network.trusted_relays=["{relay}"]')
        sets = [word for setting in settings for word in ("--set", setting)]
        began_s, nodes = time.monotonic(), []
        for number, name in enumerate(("one", "two"), 1):
            network.shut_in(number)
            arguments = ("join", "--model", "tiny", "--peers", relay, "--seed", str(number), *sets)
            nodes.append(start(number, name, *arguments))
        for node in nodes:
            node.wait(lambda node=node: is_relayed(node), "a relay", WITHIN_S)
        relayed_s = time.monotonic() - began_s
        for node in nodes:
            node.wait(lambda node=node: has_learned_from_others(node), "groups of the other", WITHIN_S)
        print(
            f"\n{transport}, relays {relays}: addresses at the relay after {relayed_s:.0f} s, groups of the other "
            f"on both after {time.monotonic() - began_s:.0f} s"
        )
        assert [node.stop(within_s=120) for node in (*nodes, boot)] == [143] * 3
