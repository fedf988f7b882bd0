"""The arms of an experiment: what each of them learns from, and which other settings it has."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from node.layers import ConfigError, read_assignments

__all__ = ["Arm", "parse_arms"]

_ARM = re.compile(r"(?:(?P<name>[A-Za-z][\w.-]*)=)?(?P<local>\d+)/(?P<external>\d+)\Z")
_HOW = "write I/J, as in 4/4, or NAME=I/J+KEY=VALUE, as in slow=4/4+trainer.learning_rate=1e-4"


@dataclass(frozen=True, slots=True)
class Arm:
    """I own groups and J groups of others in a round, and settings that the other arms need not have."""

    name: str
    num_local: int
    num_external: int
    assignments: Mapping[str, object]  # by the dotted name of the setting, as they were written

    @property
    def settings(self) -> dict[str, object]:
        """All that the arm sets. Where nobody takes anything, nobody gives anything: those nodes are silos."""
        given: dict[str, object] = {"sapo.num_local": self.num_local, "sapo.num_external": self.num_external}
        if self.num_external == 0:
            given["sapo.publish"] = "none"
        return given | dict(self.assignments)

    @property
    def slug(self) -> str:
        """The name as a part of a file's name."""
        return re.sub(r"[^\w.=-]+", "-", self.name)


def parse_arms(texts: Iterable[str]) -> tuple[Arm, ...]:
    """Read `8/0`, `4/4` or `name=4/4+key=value+key=value`. Raises ConfigError for what is none, or named twice."""
    arms = tuple(_parse(part.strip()) for text in texts for part in text.split(",") if part.strip())
    if not arms:
        raise ConfigError(f"there is no arm to run: {_HOW}")
    slugs = [arm.slug for arm in arms]
    for arm in arms:
        if slugs.count(arm.slug) > 1:
            raise ConfigError(f"two arms are called {arm.name}: give one another name, as in other={arm.name}")
    return arms


def _parse(text: str) -> Arm:
    head, *rest = text.split("+")
    match = _ARM.match(head)
    if match is None:
        raise ConfigError(f"{text!r} is not an arm: {_HOW}")
    num_local, num_external = int(match["local"]), int(match["external"])
    if num_local == 0:
        raise ConfigError(f"arm {text!r} asks no question of its own: I is at least 1")
    assignments = read_assignments(rest).values
    shape = {"sapo.num_local", "sapo.num_external"}.intersection(assignments)
    if shape:
        raise ConfigError(f"arm {text!r} sets {min(shape)} twice: leave it to I/J")
    return Arm(match["name"] or text, num_local, num_external, assignments)
