"""Typed records that nodes exchange. Pure data: encoding is `codec`'s, signing is `signing`'s."""

from dataclasses import dataclass

__all__ = ["TaskRef"]


@dataclass(frozen=True, slots=True, order=True)
class TaskRef:
    """A task by reference: enough to regenerate its question and its verifier anywhere, and nothing more.

    A reference carries no question, no answer and no reward, so that nobody needs to trust who sent it.
    """

    source: str  # name of the task source, e.g. "reasoning_gym/products"; at most 128 bytes of UTF-8
    digest: str  # 32 hex digits: what defines the source (config and generator version, or file content)
    seed: int  # unsigned 64-bit: the stream of items within the source
    index: int  # unsigned 64-bit: the item within the stream
