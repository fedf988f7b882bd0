"""Whether a node is in its swarm or on its own, and the one line that says so at each change. Pure."""

from typing import Final

__all__ = ["Connection"]

_GRACE_S: Final = 5.0  # without any peer, before that is said


class Connection:
    """Told how many peers there are; returns a line where something has changed. Times are seconds, of any clock."""

    def __init__(self, num_given: int, num_remembered: int, now_s: float) -> None:
        """Begin alone, with so many addresses to try."""
        self._num_given, self._num_remembered = num_given, num_remembered
        self._alone_since_s: float | None = now_s
        self._is_said = num_given + num_remembered == 0  # who starts a swarm is alone and knows it
        self._has_been_in = False

    @property
    def is_alone(self) -> bool:
        """Whether there was no peer when that was last asked."""
        return self._alone_since_s is not None

    def update(self, num_peers: int, now_s: float, reason: str = "") -> str | None:
        """Return the line to say, if there is one. `reason`: what an address that was tried has come to."""
        if num_peers:
            was_alone, was_said = self._alone_since_s is not None, self._is_said
            self._alone_since_s, self._is_said = None, False
            if not was_alone or (self._has_been_in and not was_said):
                return None
            again = "back in" if self._has_been_in else "joined"
            self._has_been_in = True
            return f"{again} the swarm: {num_peers} {'peer' if num_peers == 1 else 'peers'}"
        if self._alone_since_s is None:
            self._alone_since_s = now_s
        if self._is_said or now_s - self._alone_since_s < _GRACE_S:
            return None
        self._is_said = True
        return f"{self._who()}{f' ({reason})' if reason else ''}: learning alone until one answers"

    def _who(self) -> str:
        if self._has_been_in:
            return "no peer is left"
        if self._num_given:
            return (
                f"none of the {self._num_given} peers given answers"
                if self._num_given > 1
                else ("the peer given does not answer")
            )
        return f"none of the {self._num_remembered} peers remembered answers"
