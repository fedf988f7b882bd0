"""Drafts from what siblings wrote: an index per prompt over its group, earlier rollouts, and the sequence itself.

Beside it an index over the completions of all prompts says how answers of a kind go. Needs no training. A draft is
continued token by token with what followed the longest known context most often, as long as the chance that all of it
is right, from the acceptance observed for matches of that kind, is worth a place; a budget goes to the most likely
tokens of all sequences. Memory is bounded by a number of tokens.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any

from swarm.drafting.base import Drafter, SequenceState, extend_hashes, within_budget
from swarm.drafting.contexts import NUM_CLASSES, ContextTable, draft
from swarm.drafting.worth import UNKNOWN, Worth

__all__ = ["SuffixDrafter"]

_CATCH_UP_TOKENS = 64  # of each running sequence, and of what else is known of its prompt, that one call indexes
_PRIOR_KEPT, _PRIOR_TRIED = 3.0, 4.0
_MEMORY_TOKENS = 256.0  # observations of a class after which they count half


class _Prompt:
    """The index of one prompt."""

    def __init__(self) -> None:
        self.table = ContextTable()
        self.texts: deque[array[int]] = deque()  # whole completions that are in the table
        self.waiting: deque[tuple[array[int], int]] = deque()  # others, and how many of their tokens are in it
        self.indexed: dict[int, int] = {}  # request id of a running sequence -> its tokens that are in the table
        self.has_prompt = False
        self.num_tokens = 0  # held, in the table and waiting

    def newer_half(self) -> "_Prompt":
        """Return an empty index with the newer half of the texts, which wait to be indexed again."""
        texts = [*self.texts, *(text for text, _ in self.waiting)]
        newer = _Prompt()
        newer.waiting.extend((text, 0) for text in texts[(len(texts) + 1) // 2 :])
        newer.num_tokens = sum(len(text) for text, _ in newer.waiting)
        return newer

    def index_waiting(self, prompt_ids: tuple[int, ...], common: "_Common") -> None:
        """Index a part of what waits, here and in what is common."""
        if not self.waiting:
            return
        text, num_indexed = self.waiting.popleft()
        tokens, hashes = [*prompt_ids, *text], [0]
        extend_hashes(hashes, tokens)
        start = len(prompt_ids) + num_indexed
        stop = min(len(tokens), start + _CATCH_UP_TOKENS)
        self.table.insert(tokens, hashes, start, stop)
        common.insert(tokens, hashes, start, stop)
        if stop == len(tokens):
            self.texts.append(text)
        else:
            self.waiting.appendleft((text, stop - len(prompt_ids)))


class _Common:
    """What the completions of all prompts have in common: those indexed last, a bounded number of tokens."""

    def __init__(self, max_tokens: int) -> None:
        self.tables = [ContextTable()]  # the newest first; a second one is of what came before it
        self._max_tokens = max_tokens // 2  # of one table
        self._num_tokens = 0  # in the newest

    def insert(self, tokens: Sequence[int], hashes: Sequence[int], start: int, stop: int) -> None:
        """See ContextTable."""
        self.tables[0].insert(tokens, hashes, start, stop)
        self._num_tokens += stop - start
        if self._num_tokens > self._max_tokens:
            self.tables = [ContextTable(), self.tables[0]]
            self._num_tokens = 0


class SuffixDrafter(Drafter):
    """Continues sequences as their siblings, earlier rollouts and they themselves went on before."""

    name = "suffix"

    def __init__(self, *, max_tokens: int = 1 << 17) -> None:
        """max_tokens: that the index of prompts holds, and at most as many the common one."""
        self._max_tokens = max_tokens
        self._common = _Common(max_tokens)
        self._prompts: OrderedDict[tuple[int, ...], _Prompt] = OrderedDict()  # least recently used first
        self._num_tokens = 0
        self._kept = [_PRIOR_KEPT] * NUM_CLASSES
        self._tried = [_PRIOR_TRIED] * NUM_CLASSES
        self._rates = [_PRIOR_KEPT / _PRIOR_TRIED] * NUM_CLASSES
        self._classes: dict[int, list[int]] = {}  # request id -> classes of its last draft's tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that the index of prompts holds."""
        return self._num_tokens

    def propose(
        self, states: Sequence[SequenceState], depth: int, budget: int, worth: Worth = UNKNOWN
    ) -> list[list[int]]:
        """See Drafter."""
        self._catch_up(states)
        drafts, chances = [], []
        for state in states:
            tokens, chance, classes = draft(
                (self._prompt(state.prompt_ids).table,), self._common.tables, state.prefix_hashes(), self._rates,
                min(depth, state.room, budget), worth.least_chance,
            )  # fmt: skip
            drafts.append(tokens)
            chances.append(chance)
            self._classes[state.request_id] = classes
        return within_budget(drafts, chances, budget)

    def _catch_up(self, states: Sequence[SequenceState]) -> None:
        """Index what has come: a part of it where it is much, so that no step waits long."""
        for state in states:
            prompt, num_prompt = self._prompt(state.prompt_ids), len(state.prompt_ids)
            if not prompt.has_prompt:
                prompt.has_prompt = True
                prompt.table.insert(state.tokens, state.prefix_hashes(), 0, num_prompt)
                self._grow(prompt, num_prompt)
            start = prompt.indexed.get(state.request_id, num_prompt)
            stop = min(len(state.tokens), start + _CATCH_UP_TOKENS)
            prompt.table.insert(state.tokens, state.prefix_hashes(), start, stop)
            self._common.insert(state.tokens, state.prefix_hashes(), start, stop)
            prompt.indexed[state.request_id] = stop
            self._grow(prompt, stop - start)
        for prompt_ids in {state.prompt_ids: None for state in states}:
            self._prompt(prompt_ids).index_waiting(prompt_ids, self._common)
        self._trim()

    def verified(self, state: SequenceState, draft: Sequence[int], num_kept: int) -> None:
        """Count, by class, the tokens that were right, and the first that was not."""
        classes = self._classes.get(state.request_id, [])
        for index in range(min(num_kept + 1, len(draft), len(classes))):
            kind = classes[index]
            if self._tried[kind] >= _MEMORY_TOKENS:
                self._kept[kind], self._tried[kind] = self._kept[kind] / 2, self._tried[kind] / 2
            self._tried[kind] += 1
            self._kept[kind] += index < num_kept
            self._rates[kind] = self._kept[kind] / self._tried[kind]

    def observe(self, state: SequenceState) -> None:
        """Keep what a sequence wrote; what is not indexed yet will be when its prompt is next asked for."""
        self._classes.pop(state.request_id, None)
        prompt = self._prompt(state.prompt_ids)
        num_indexed = prompt.indexed.pop(state.request_id, len(state.prompt_ids)) - len(state.prompt_ids)
        if not state.num_written:
            return
        text = array("q", state.tokens[len(state.prompt_ids) :])
        if num_indexed == len(text):
            prompt.texts.append(text)
        else:
            prompt.waiting.append((text, num_indexed))
            self._grow(prompt, len(text) - num_indexed)
        self._trim()

    def learn(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """See Drafter. Indexed when the prompt is next asked for."""
        if token_ids:
            prompt = self._prompt(tuple(prompt_ids))
            prompt.waiting.append((array("q", token_ids), 0))
            self._grow(prompt, len(token_ids))
            self._trim()

    def policy_changed(self, version: int, weights: Mapping[str, Any] | None = None) -> None:
        """Trust the observed acceptance half as much. Texts stay: most of what they say still holds."""
        for kind in range(NUM_CLASSES):
            self._kept[kind] = (self._kept[kind] + _PRIOR_KEPT) / 2
            self._tried[kind] = (self._tried[kind] + _PRIOR_TRIED) / 2
            self._rates[kind] = self._kept[kind] / self._tried[kind]

    def _prompt(self, prompt_ids: tuple[int, ...]) -> _Prompt:
        """Return the index of a prompt, as the most recently used one."""
        prompt = self._prompts.get(prompt_ids)
        if prompt is None:
            prompt = self._prompts[prompt_ids] = _Prompt()
        else:
            self._prompts.move_to_end(prompt_ids)
        return prompt

    def _grow(self, prompt: _Prompt, num_tokens: int) -> None:
        prompt.num_tokens += num_tokens
        self._num_tokens += num_tokens

    def _trim(self) -> None:
        """Forget the prompts that were not used for longest; of the last one, the older half of its texts."""
        while self._num_tokens > self._max_tokens and len(self._prompts) > 1:
            self._num_tokens -= self._prompts.popitem(last=False)[1].num_tokens
        if self._num_tokens > self._max_tokens:
            [(prompt_ids, prompt)] = self._prompts.items()
            newer = self._prompts[prompt_ids] = prompt.newer_half()
            self._num_tokens = newer.num_tokens
