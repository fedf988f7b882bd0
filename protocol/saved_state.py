"""What a member remembers over restarts: one file, replaced as a whole.

It holds peers, opinions, the sequence number, what must not be used twice, and the unused groups. Losing it costs time
and no correctness, but for one thing: a node that forgets its sequence number and whose clock was set back would
sign two batches under one number; hence a file that cannot be read is an error that a person mends.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol.codec import decode, encode
from protocol.errors import CodecError, ProtocolError
from protocol.limits import MAX_FILE_RECORD_BYTES

__all__ = ["SavedStateError", "read_state", "write_state"]

_FORMAT = 1


class SavedStateError(ProtocolError):
    """The file cannot be read or written. The message is one line and names the fix."""


def read_state(path: Path, swarm_id: str) -> Mapping[str, Any] | None:
    """Return what `write_state` wrote for this swarm; None where there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SavedStateError(f"cannot read {path}: {error.strerror}; check its owner and mode") from error
    try:
        state = decode(data, max_bytes=MAX_FILE_RECORD_BYTES)
    except CodecError as error:
        raise SavedStateError(f"{path} is damaged ({error}): move it away to begin without it") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise SavedStateError(f"{path} was written by another version: move it away to begin without it")
    if state["swarm_id"] != swarm_id:
        raise SavedStateError(
            f"{path} is of swarm {state['swarm_id']!r}, not {swarm_id!r}: move it away, or set --swarm-id"
        )
    return state


def write_state(path: Path, swarm_id: str, state: Mapping[str, Any]) -> None:
    """Replace the file, so that no crash leaves half of it."""
    data = encode({"format": _FORMAT, "swarm_id": swarm_id, **state}, max_bytes=MAX_FILE_RECORD_BYTES)
    beside = path.with_name(f".{path.name}.partial")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise SavedStateError(f"cannot write {path}: {error.strerror}; free space or mend the folder") from error
