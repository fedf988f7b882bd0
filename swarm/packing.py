"""Rows of tokens for the trainer: which completions go through the model together, and how they are laid out.

The completions of a group share their prompt, so a packed row holds each prompt once:

    [trunk_1, trunk_2, ...,  branch_1, branch_2, ...]

A *trunk* is the prompt of a group, or a prompt with its completion where the microbatch holds only one of
them. A *branch* is one completion of a larger group: its positions go on from its prompt's last one, and it
attends to that prompt and to itself only. The last token of a completion is predicted and predicts nothing,
so it does not go through the model. Linear layers see no padding.

`packed_attention` computes attention over such a row. Models that it cannot serve get the padded layout: one
row per completion, with the model's own mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.types import TrainingGroup

__all__ = [
    "CompletionRef",
    "PackedRow",
    "PaddedRows",
    "Part",
    "Span",
    "num_tokens_of",
    "pack",
    "pad",
    "split_into_microbatches",
]


_MAX_PROMPT_RATIO = 1.25  # longest to shortest prompt of a microbatch
_FREE_PADDING_TOKENS = 64  # prompts up to this length are cheap to pad


@dataclass(frozen=True, slots=True)
class CompletionRef:
    """A completion of a batch: group number, and number within the group."""

    group: int
    completion: int


@dataclass(frozen=True, slots=True)
class Part:
    """A group, or as many completions of one as fit a microbatch."""

    group: int
    completions: tuple[int, ...]

    @property
    def refs(self) -> list[CompletionRef]:
        """The completions, in order."""
        return [CompletionRef(self.group, completion) for completion in self.completions]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of equal-purpose tokens in a packed row, and how it is padded to a rectangle."""

    lengths: tuple[int, ...]  # per sequence
    max_length: int
    to_padded: Tensor | None  # [num_sequences * max_length]: token of the span; None: no padding is needed
    to_packed: Tensor | None  # [num_tokens]: place in the rectangle; None with `to_padded`

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One packed row, and what predicts what in it."""

    input_ids: Tensor  # [1, num_tokens]
    position_ids: Tensor  # [1, num_tokens]
    predictors: Tensor  # [num_targets]: row of the hidden states that predicts each completion token
    targets: Tensor  # [num_targets]: completion tokens, completion after completion
    refs: tuple[CompletionRef, ...]  # one per completion, in the order of the targets
    trunks: Span
    branches: Span
    parents: tuple[int, ...]  # trunk of each branch; branches of one trunk stand together
    branch_mask: Tensor | None  # [num_branches, 1, max_branch, max_trunk + max_branch], bool; None: no branches


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """One row per completion, right-padded, for models with their own mask."""

    input_ids: Tensor  # [num_completions, max_length]
    attention_mask: Tensor  # [num_completions, max_length]
    predictors: Tensor  # [num_targets]: row of the flattened hidden states
    targets: Tensor  # [num_targets]
    refs: tuple[CompletionRef, ...]


def split_into_microbatches(
    groups: Sequence[TrainingGroup], group_indices: Sequence[int], max_tokens: int, *, shares_prompts: bool
) -> list[list[Part]]:
    """Cut groups into microbatches of at most `max_tokens` tokens, as far as single completions allow.

    Whole groups stay together where they fit; a group that is larger than a microbatch is cut between
    completions, and each part brings the prompt again. Attention pads every prompt of a microbatch to its
    longest, so groups go in order of their prompts' lengths, and a much longer prompt begins a new one.
    """
    microbatches: list[list[Part]] = []
    room = 0
    shortest_prompt = 0  # of the microbatch that is being filled
    for index in sorted(group_indices, key=lambda index: len(groups[index].prompt_ids)):
        group = groups[index]
        num_prompt = len(group.prompt_ids)
        if num_prompt > max(_FREE_PADDING_TOKENS, _MAX_PROMPT_RATIO * shortest_prompt):
            room = 0
        lengths = [len(ids) for ids in group.completion_ids]
        total = _num_tokens(num_prompt, lengths, shares_prompts)
        if total <= max_tokens:
            if total > room:
                microbatches.append([])
                room, shortest_prompt = max_tokens, num_prompt
            microbatches[-1].append(Part(index, tuple(range(len(lengths)))))
            room -= total
            continue
        part: list[int] = []
        for completion, length in enumerate(lengths):
            if part and _num_tokens(num_prompt, [*(lengths[i] for i in part), length], shares_prompts) > max_tokens:
                microbatches.append([Part(index, tuple(part))])
                part = []
            part.append(completion)
        microbatches.append([Part(index, tuple(part))])
        room = max_tokens - _num_tokens(num_prompt, [lengths[i] for i in part], shares_prompts)
        shortest_prompt = num_prompt
    return microbatches


def num_tokens_of(groups: Sequence[TrainingGroup], parts: Sequence[Part], *, shares_prompts: bool) -> int:
    """Return the tokens of a microbatch."""
    total = 0
    for part in parts:
        group = groups[part.group]
        lengths = [len(group.completion_ids[completion]) for completion in part.completions]
        total += _num_tokens(len(group.prompt_ids), lengths, shares_prompts)
    return total


def _num_tokens(num_prompt: int, completion_lengths: Sequence[int], shares_prompts: bool) -> int:
    num_prompts = 1 if shares_prompts else len(completion_lengths)
    return num_prompt * num_prompts + sum(completion_lengths)


def pack(groups: Sequence[TrainingGroup], parts: Sequence[Part], device: torch.device) -> PackedRow:
    """Lay out a microbatch as one row in which completions share their prompt."""
    trunks: list[tuple[int, ...]] = []
    branches: list[tuple[int, ...]] = []
    parents: list[int] = []
    branch_positions: list[range] = []
    for part in parts:
        group = groups[part.group]
        chosen = [group.completion_ids[completion] for completion in part.completions]
        if len(chosen) == 1:
            trunks.append(group.prompt_ids + chosen[0][:-1])
            continue
        for ids in chosen:
            if len(ids) > 1:
                parents.append(len(trunks))
                branches.append(ids[:-1])
                branch_positions.append(range(len(group.prompt_ids), len(group.prompt_ids) + len(ids) - 1))
        trunks.append(group.prompt_ids)
    trunk_lengths = [len(ids) for ids in trunks]
    branch_lengths = [len(ids) for ids in branches]
    tokens = [token for ids in (*trunks, *branches) for token in ids]
    positions = [p for length in trunk_lengths for p in range(length)] + [p for r in branch_positions for p in r]
    predictors, targets, refs = _predictions(groups, parts, trunk_lengths)
    return PackedRow(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([positions], device=device),
        predictors=torch.tensor(predictors, device=device),
        targets=torch.tensor(targets, device=device),
        refs=tuple(refs),
        trunks=_span(trunk_lengths, device),
        branches=_span(branch_lengths, device),
        parents=tuple(parents),
        branch_mask=_branch_mask(
            [trunk_lengths[parent] for parent in parents], branch_lengths, max(trunk_lengths), device
        ),
    )


def _predictions(
    groups: Sequence[TrainingGroup], parts: Sequence[Part], trunk_lengths: Sequence[int]
) -> tuple[list[int], list[int], list[CompletionRef]]:
    """Return which hidden state predicts which completion token. A prompt's last one predicts all first tokens."""
    predictors: list[int] = []
    targets: list[int] = []
    refs: list[CompletionRef] = []
    trunk_start = 0
    branch_start = sum(trunk_lengths)
    for part, trunk_length in zip(parts, trunk_lengths, strict=True):
        group = groups[part.group]
        prompt_end = trunk_start + len(group.prompt_ids) - 1
        for completion in part.completions:
            ids = group.completion_ids[completion]
            targets.extend(ids)
            predictors.append(prompt_end)
            if len(part.completions) == 1:
                predictors.extend(range(prompt_end + 1, prompt_end + len(ids)))
            else:
                predictors.extend(range(branch_start, branch_start + len(ids) - 1))
                branch_start += len(ids) - 1
        refs.extend(part.refs)
        trunk_start += trunk_length
    return predictors, targets, refs


def _span(lengths: Sequence[int], device: torch.device) -> Span:
    """Compute where the tokens of each sequence go in a rectangle; nothing where all lengths are equal."""
    max_length = max(lengths, default=0)
    if all(length == max_length for length in lengths):
        return Span(tuple(lengths), max_length, None, None)
    length = torch.tensor(lengths)
    filled = torch.arange(max_length) < length[:, None]  # [num_sequences, max_length]
    to_packed = filled.flatten().nonzero()[:, 0]
    to_padded = torch.zeros(filled.numel(), dtype=torch.int64)
    to_padded[to_packed] = torch.arange(to_packed.numel())
    return Span(tuple(lengths), max_length, to_padded.to(device), to_packed.to(device))


def _branch_mask(
    prompt_lengths: Sequence[int], branch_lengths: Sequence[int], max_trunk: int, device: torch.device
) -> Tensor | None:
    """Say which keys, [prompt | own tokens], a branch's queries see: the whole prompt, and their own past."""
    if not branch_lengths:
        return None
    max_branch = max(branch_lengths)
    prompt_length = torch.tensor(prompt_lengths)[:, None, None]
    sees_prompt = (torch.arange(max_trunk) < prompt_length).expand(-1, max_branch, -1)
    sees_own = torch.ones(max_branch, max_branch, dtype=torch.bool).tril().expand(len(branch_lengths), -1, -1)
    return torch.cat((sees_prompt, sees_own), dim=2)[:, None].to(device)


def pad(groups: Sequence[TrainingGroup], parts: Sequence[Part], device: torch.device) -> PaddedRows:
    """Lay out a microbatch as one right-padded row per completion."""
    refs = [ref for part in parts for ref in part.refs]
    rows = [groups[ref.group].prompt_ids + groups[ref.group].completion_ids[ref.completion][:-1] for ref in refs]
    max_length = max(len(row) for row in rows)
    predictors: list[int] = []
    targets: list[int] = []
    for number, (ref, row) in enumerate(zip(refs, rows, strict=True)):
        start = number * max_length
        predictors.extend(range(start + len(groups[ref.group].prompt_ids) - 1, start + len(row)))
        targets.extend(groups[ref.group].completion_ids[ref.completion])
    return PaddedRows(
        input_ids=torch.tensor([row + (0,) * (max_length - len(row)) for row in rows], device=device),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows], device=device),
        predictors=torch.tensor(predictors, device=device),
        targets=torch.tensor(targets, device=device),
        refs=tuple(refs),
    )
