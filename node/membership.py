"""What a node is in its swarm, whatever carries the bytes: what it says of itself, and how much it keeps ready."""

from importlib.metadata import version

from node.config import RunConfig
from node.summary import model_label, tasks_label
from protocol.about import NodeAbout
from protocol.config import SwarmConfig

__all__ = ["about_trainer", "member_settings", "software"]


def software() -> str:
    """What this program calls itself to others."""
    return f"swarm-node/{version('swarm-node')}"


def about_trainer(config: RunConfig) -> NodeAbout:
    """Return what a node that learns says of itself."""
    tasks = tuple(source.strip() for source in tasks_label(config).split(","))
    return NodeAbout("trainer", software(), model_label(config), tasks)


def member_settings(config: RunConfig) -> SwarmConfig:
    """Return the settings of the node's member, with a reserve of two rounds of groups, or more if that is set.

    So what the next round needs is there when this one has taken its groups.
    """
    sapo = config.sapo
    num_wanted = sapo.num_external + (sapo.num_local if sapo.fill and sapo.num_external else 0)
    reserve_groups = max(config.swarm.reserve_groups, 2 * num_wanted)
    return config.swarm.model_copy(update={"reserve_groups": reserve_groups})
