"""Which versions of the protocol understand one another, and what to tell a node that they do not.

A version is (major, minor). Nodes of one major version interoperate: a newer minor version may put more fields at
the end of any top-level record, and an older reader passes over them. Another major version is refused, in words
that say who should upgrade. Every record of every version begins with its major and minor number.
"""

from protocol.messages import PROTOCOL_VERSION
from protocol.refusals import Reason, Refusal

__all__ = ["check_version", "peek_version", "upgrade_advice"]


def check_version(theirs: tuple[int, int], ours: tuple[int, int] = PROTOCOL_VERSION) -> None:
    """Raise Refusal(OTHER_MAJOR) where a record or a peer of version `theirs` cannot be understood."""
    if theirs[0] != ours[0]:
        raise Refusal(Reason.OTHER_MAJOR, upgrade_advice(theirs, ours))


def upgrade_advice(theirs: tuple[int, int], ours: tuple[int, int] = PROTOCOL_VERSION) -> str:
    """Say who should upgrade, in words that are right on either side: the peer is told the same."""
    older, newer = sorted((theirs, ours))
    return f"protocols {_text(older)} and {_text(newer)} do not mix: upgrade the node that speaks {_text(older)}"


def peek_version(data: bytes) -> tuple[int, int] | None:
    """Return the version that a record's first bytes name, or None where they name none.

    It reads those bytes alone, so that a record of another major version is known for one, whatever follows.
    """
    if data[:1] and 0x92 <= data[0] <= 0x9F:
        if len(data) > 2 and data[1] < 0x80 and data[2] < 0x80:  # so is nearly every record's
            return data[1], data[2]
        position = 1
    elif data[:1] == b"\xdc":
        position = 3
    else:
        return None
    numbers = []
    for _ in range(2):
        tag = data[position : position + 1]
        length = {b"\xcc": 1, b"\xcd": 2}.get(tag, 0)
        number = int.from_bytes(data[position + 1 : position + 1 + length], "big") if length else int.from_bytes(tag)
        if not tag or (not length and number > 0x7F) or position + 1 + length > len(data):
            return None
        numbers.append(number)
        position += 1 + length
    return numbers[0], numbers[1]


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
