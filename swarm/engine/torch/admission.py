"""Which waiting requests take the free slots, and what is prefilled for them."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.engine.torch.slots import Running, Slots

__all__ = ["Admitted", "admit"]

_PREFILL_TOKENS = 8192  # tokens of one prefill pass; bounds its memory


@dataclass(frozen=True, slots=True)
class Admitted:
    """Requests that have just taken slots, by what is to be prefilled for them."""

    sequences: Sequence[tuple[int, ...]]
    num_drawn: Sequence[int]  # last states of each sequence that are drawn from
    groups: Sequence[Sequence[Running]]  # who needs each

    @property
    def first_slots(self) -> list[int]:
        """The slots that are filled; others of a group get copies."""
        return [group[0].slot for group in self.groups]

    @property
    def num_tokens(self) -> int:
        """Tokens to prefill."""
        return sum(map(len, self.sequences))


def admit(waiting: deque[Running], slots: Slots, *, version: int, max_rows: int) -> Admitted:
    """Move requests from the queue, which has some, into free slots, of which there are some.

    version: of the policy that writes them. max_rows: states that one prefill may be asked for; one request always
    fits.
    """
    admitted: dict[tuple[tuple[int, ...], int], list[Running]] = {}  # a sequence, and how much of it is a draft
    num_tokens = num_rows = 0
    while waiting and slots.num_free:
        running = waiting[0]
        sequence = running.sequence()
        key = sequence, len(running.request.draft)
        if key not in admitted:
            num_tokens += len(sequence)
            num_rows += key[1] + 1
            if admitted and (num_tokens > _PREFILL_TOKENS or num_rows > max_rows):
                break
        waiting.popleft()
        slots.add(running, cached=len(sequence), version=version)
        admitted.setdefault(key, []).append(running)
    return Admitted([one for one, _ in admitted], [num + 1 for _, num in admitted], [*admitted.values()])
