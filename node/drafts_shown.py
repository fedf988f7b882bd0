"""What is shown of speculative decoding: a round's line, and the mean of the last rounds for `swarm-node stats`."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["drafts", "drafts_of_rounds", "drafts_view"]


def drafts(row: Mapping[str, Any]) -> str:
    """Return how a round's drafts fared; nothing where nothing speculates."""
    if "draft_arms" not in row:
        return ""
    return "  drafts " + drafts_view(row)


def drafts_view(found: Mapping[str, Any]) -> str:
    """Return accepted length, acceptance by drafter, the arm of each bucket, the drafter's loss and what was saved."""
    parts = []
    if found["accepted_length"] is not None:
        parts.append(f"{found['accepted_length']:.2f} tokens a pass")
        parts.append(", ".join(f"{name} {share:.0%} kept" for name, share in found["draft_acceptance"].items()))
    arms = ", ".join(f"from {size}: {key}" for size, key in found["draft_arms"].items())
    parts.append(f"arms {arms}" if arms else "no arm yet")
    if found.get("drafter_loss") is not None:
        parts.append(f"drafter's loss {found['drafter_loss']:.3f}")
    if found["draft_saved_s"] is not None:
        parts.append(f"saved {found['draft_saved_s']:.3f} s")
    return "; ".join(parts)


def drafts_of_rounds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the same over several rounds, arms and loss as they are now; None where nothing speculated."""
    speculated = [row for row in rows if "draft_arms" in row]
    if not speculated:
        return None
    last = speculated[-1]
    names = sorted({name for row in speculated for name in row["num_drafted"]})
    drafted = {name: sum(row["num_drafted"].get(name, 0) for row in speculated) for name in names}
    kept = {name: sum(row["num_draft_kept"].get(name, 0) for row in speculated) for name in names}
    lengths = [row["accepted_length"] for row in speculated if row["accepted_length"] is not None]
    saved = [row["draft_saved_s"] for row in speculated if row["draft_saved_s"] is not None]
    return {
        "accepted_length": statistics.fmean(lengths) if lengths else None,
        "draft_acceptance": {name: kept[name] / drafted[name] for name in names if drafted[name]},
        "draft_arms": last["draft_arms"],
        "drafter_loss": last.get("drafter_loss"),
        "draft_saved_s": statistics.fmean(saved) if saved else None,
    }
