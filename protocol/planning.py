"""Which frames to pull next: drawn uniformly among those heard of last, under the same caps as sampling.

Pure. Among the newest frames that nobody has pulled yet (a window of a few times the reserve, so that a small swarm
is gathered whole, and a large one is followed at its head), those that a neighbour holds come first: a stranger
costs a connection. An author whose tasks are unknown here comes last. No author, and not all newcomers together, may
fill more of the reserve than they may give to a batch.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from protocol.announcements import Announcements, LiveBatch
from protocol.pool import MIN_AUTHORS_FOR_CAPS, author_cap

__all__ = ["WINDOW_FACTOR", "num_known_frames", "plan_pulls"]

WINDOW_FACTOR = 4  # frames that are drawn from, for every group of the reserve
MIN_WINDOW_FRAMES = 32
_MIN_FRAMES_PER_AUTHOR = 4


def plan_pulls(
    announcements: Announcements,
    *,
    num_frames: int,
    reserve: int,
    kept: Mapping[str, int],
    neighbours: Collection[str],
    is_newcomer: Callable[[str], bool] | None,
    is_deferred: Callable[[str], bool],
    max_author_share: float,
    max_newcomer_share: float,
    rng: random.Random,
) -> list[tuple[LiveBatch, list[int]]]:
    """Choose at most `num_frames` frames, by batch.

    `kept` counts, by author, what fills the reserve already: unused groups and frames under way. `is_newcomer`
    is None while the cap on newcomers is not in force.
    """
    window = _window(
        announcements,
        max(MIN_WINDOW_FRAMES, WINDOW_FACTOR * reserve),
        max_author_share,
        max_newcomer_share if is_newcomer is not None else 1.0,
        is_newcomer or (lambda author: False),
        rng,
    )
    rng.shuffle(window)
    window.sort(key=lambda item: _tier(item[0], item[1], neighbours, is_deferred))
    authors = {batch.author for batch, _ in window} | set(kept)
    per_author = author_cap(max(reserve, num_frames), len(authors), max_author_share)
    counts = Counter(kept)
    newcomers_left = num_frames
    if is_newcomer is not None:
        num_newcomers = sum(num for author, num in kept.items() if is_newcomer(author))
        newcomers_left = math.ceil(reserve * max_newcomer_share) - num_newcomers
    chosen: dict[bytes, tuple[LiveBatch, list[int]]] = {}
    num_chosen = 0
    for batch, number in window:
        if num_chosen == num_frames:
            break
        if counts[batch.author] >= per_author:
            continue
        if is_newcomer is not None and is_newcomer(batch.author):
            if newcomers_left <= 0:
                continue
            newcomers_left -= 1
        counts[batch.author] += 1
        num_chosen += 1
        chosen.setdefault(batch.root, (batch, []))[1].append(number)
    return list(chosen.values())


def num_known_frames(announcements: Announcements, at_most: int) -> int:
    """Count the frames worth pulling, no further than `at_most`."""
    found = 0
    for batch in announcements.newest_open():
        found += batch.open.bit_count()
        if found >= at_most:
            return at_most
    return found


def _window(
    announcements: Announcements,
    num_frames: int,
    max_author_share: float,
    max_newcomer_share: float,
    is_newcomer: Callable[[str], bool],
    rng: random.Random,
) -> list[tuple[LiveBatch, int]]:
    """Return the newest open frames, first no more of one author than its share, then whatever fills the window.

    Newcomers stand in it for no more than their part, so that a flood of them does not push others out.
    """
    window: list[tuple[LiveBatch, int]] = []
    over: list[tuple[LiveBatch, int]] = []
    by_author = Counter[str]()
    per_author = max(_MIN_FRAMES_PER_AUTHOR, int(num_frames * max_author_share))
    newcomers_left = int(num_frames * max_newcomer_share)
    for batch in announcements.newest_open():
        numbers = _bits(batch.open)
        rng.shuffle(numbers)
        if is_newcomer(batch.author):
            numbers = numbers[:newcomers_left]
            newcomers_left -= len(numbers)
        room = per_author - by_author[batch.author]
        by_author[batch.author] += len(numbers)
        window += [(batch, number) for number in numbers[: max(0, room)]]
        if len(over) < num_frames:
            over += [(batch, number) for number in numbers[max(0, room) :]]
        if len(window) >= num_frames:
            break
    if len(window) < num_frames and (len(by_author) < MIN_AUTHORS_FOR_CAPS or not window):
        window += over[: num_frames - len(window)]
    return window


def _tier(batch: LiveBatch, number: int, neighbours: Collection[str], is_deferred: Callable[[str], bool]) -> int:
    if is_deferred(batch.author):
        return 2
    held = batch.author in neighbours or any(
        mask >> number & 1 and holder in neighbours for holder, mask in batch.holders.items()
    )
    return 0 if held else 1


def _bits(mask: int) -> list[int]:
    return [number for number in range(mask.bit_length()) if mask >> number & 1]
