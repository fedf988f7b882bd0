"""What a group of others is worth to this node's policy, before it is drawn (`sapo.sampling = "value"`).

    weight = uniform_share + (1 - uniform_share) x difficulty x novelty x usefulness, each of them in [0, 1]

    difficulty   4 p (1 - p), p being the mean reward of the group: 1 where half of it is right. p is shrunk towards
                 this node's own recent mean reward on that task source, since another policy wrote the group
    novelty      1 / (1 + times that this question was trained on lately, whoever answered)
    usefulness   mean difficulty of what was drawn from that author before, as a share of the best author's

An author of whom nothing has been drawn counts as an average one. All memory is bounded, and begins anew with the
process. How groups are drawn by their weights, and how much one author may give, is `protocol.pool`'s.
"""

import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Final

from protocol.messages import TaskRef
from swarm.types import RolloutGroup

__all__ = ["LearningValue"]

_OWN_RATE_COUNTS: Final = 4.0  # as much as so many completions of the group
_RATE_STEP: Final = 1 / 32  # of the newest own group in the mean reward of its source
_USEFULNESS_STEP: Final = 1 / 16  # of the newest group in what is thought of its author
_MAX_QUESTIONS: Final = 4096  # trained on last
_MAX_AUTHORS: Final = 1024  # heard last


class LearningValue:
    """Observes what a node trains on; gives the weight by which a group of others is drawn."""

    def __init__(
        self, uniform_share: float, *, max_questions: int = _MAX_QUESTIONS, max_authors: int = _MAX_AUTHORS
    ) -> None:
        self._uniform_share, self._max_questions, self._max_authors = uniform_share, max_questions, max_authors
        self._own_rates: dict[tuple[str, str], float] = {}  # by task source
        self._questions: deque[TaskRef] = deque()
        self._num_asked = Counter[TaskRef]()
        self._usefulness: OrderedDict[str, float] = OrderedDict()  # by author, the one heard last at the end

    def observe_own(self, groups: Iterable[RolloutGroup]) -> None:
        """Take the scored own groups of a round."""
        for group in groups:
            self._note_question(group.task.ref)
            source, reward = (group.task.ref.source, group.task.ref.digest), statistics.fmean(group.rewards)
            rate = self._own_rates.get(source, reward)
            self._own_rates[source] = rate + _RATE_STEP * (reward - rate)

    def observe_drawn(self, author: str, question: TaskRef, rewards: Sequence[float]) -> None:
        """Take a group of others that was drawn, with its rewards by this node's verifier."""
        self._note_question(question)
        difficulty = self._difficulty(question, rewards)
        known = self._usefulness.pop(author, difficulty)
        self._usefulness[author] = known + _USEFULNESS_STEP * (difficulty - known)
        if len(self._usefulness) > self._max_authors:
            self._usefulness.popitem(last=False)

    def weight(self, author: str, question: TaskRef, rewards: Sequence[float]) -> float:
        """Return how likely a group is to be drawn, relative to others: at least `uniform_share`, at most 1."""
        novelty = 1 / (1 + self._num_asked[question])
        value = self._difficulty(question, rewards) * novelty * self._useful(author)
        return self._uniform_share + (1 - self._uniform_share) * value

    def _difficulty(self, question: TaskRef, rewards: Sequence[float]) -> float:
        own = self._own_rates.get((question.source, question.digest), 0.5)
        rate = (sum(rewards) + _OWN_RATE_COUNTS * own) / (len(rewards) + _OWN_RATE_COUNTS)
        return 4 * rate * (1 - rate)

    def _useful(self, author: str) -> float:
        best = max(self._usefulness.values(), default=0.0)
        if best == 0:
            return 1.0  # nobody has been heard, or nobody was of use
        known = self._usefulness.get(author)
        return (statistics.fmean(self._usefulness.values()) if known is None else known) / best

    def _note_question(self, question: TaskRef) -> None:
        self._questions.append(question)
        self._num_asked[question] += 1
        if len(self._questions) > self._max_questions:
            oldest = self._questions.popleft()
            self._num_asked[oldest] -= 1
            if not self._num_asked[oldest]:
                del self._num_asked[oldest]
