"""Token ids and log-probabilities as bytes, for MessagePack on the disk. Exact both ways."""

from collections.abc import Sequence

import numpy as np

__all__ = ["pack_floats", "pack_ids", "unpack_floats", "unpack_ids"]


def pack_floats(values: Sequence[float]) -> bytes:
    """Pack exactly: as float32 where that loses nothing, which is told apart by a leading byte."""
    exact = np.asarray(values, dtype="<f8")
    short = exact.astype("<f4")
    return b"f" + short.tobytes() if np.array_equal(short, exact, equal_nan=True) else b"d" + exact.tobytes()


def unpack_floats(data: bytes) -> tuple[float, ...]:
    """Return what `pack_floats` packed."""
    return tuple(np.frombuffer(data[1:], dtype="<f4" if data[:1] == b"f" else "<f8").astype("f8").tolist())


def pack_ids(ids: Sequence[int]) -> bytes:
    """Pack token ids, four bytes each."""
    return np.asarray(ids, dtype="<u4").tobytes()


def unpack_ids(data: bytes) -> tuple[int, ...]:
    """Return what `pack_ids` packed."""
    return tuple(np.frombuffer(data, dtype="<u4").tolist())
