"""The journal of finished rounds: what a resume replays on top of a checkpoint.

One record per round holds the batch that the update learned from and the round's row of metrics. A record is
framed by its length and CRC-32, so that a torn tail is recognised and cut off. The journal is a folder of
segments, each named by the first round it may hold; a segment is deleted once every checkpoint that is kept is
newer. What the rounds mean, and when to sync, is the caller's.

    segment = magic, then frames of: length (u32), CRC-32 of the payload (u32), payload (MessagePack)
"""

import itertools
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgpack

from swarm.compact import pack_floats, pack_ids, unpack_floats, unpack_ids
from swarm.errors import CheckpointError
from swarm.types import TrainingBatch, TrainingGroup

__all__ = ["Journal", "JournalRecord"]

_MAGIC = b"SWJ1"
_FRAME = struct.Struct("<II")
_MAX_RECORD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class JournalRecord:
    """A finished round. `round_index` counts from 1. `rollouts` is what its rollouts have left unfinished."""

    round_index: int
    batch: TrainingBatch
    row: Mapping[str, Any]
    rollouts: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Located:
    """A record with the place where its frame ends."""

    record: JournalRecord
    segment: Path
    end: int


class Journal:
    """Appends records to the newest segment. One thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._last_round = 0
        self._good_end = 0

    @property
    def last_round(self) -> int:
        """The newest round that has been appended, or that `start_after` was given."""
        return self._last_round

    def read_after(self, round_index: int) -> list[JournalRecord]:
        """Return the records of the rounds `round_index + 1, …` up to the first that is missing or damaged."""
        following = {item.record.round_index: item.record for item in self._located()}
        records = []
        while (record := following.get(round_index + 1)) is not None:
            records.append(record)
            round_index += 1
        return records

    def rows(self) -> dict[int, Mapping[str, Any]]:
        """Return the rows of metrics of all rounds that can be read, also of those older than a checkpoint."""
        return {item.record.round_index: item.record.row for item in self._located()}

    def start_after(self, round_index: int) -> None:
        """Drop every record of a later round and every torn frame, and go on with the round after."""
        keep: dict[Path, int] = {segment: len(_MAGIC) for segment in self._segments()}
        for item in self._located():
            if item.record.round_index <= round_index:
                keep[item.segment] = max(keep[item.segment], item.end)
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        for segment, end in keep.items():
            if end == len(_MAGIC):
                segment.unlink()
            elif segment.stat().st_size > end:
                os.truncate(segment, end)
        self._last_round = round_index
        self.rotate()

    def rotate(self) -> None:
        """Begin a new segment with the next round."""
        self.close()
        path = self._folder / f"{self._last_round + 1:08d}.journal"
        with _clear_errors(path):
            self._file = path.open("wb", buffering=0)
            self._write_all(_MAGIC)
            self._good_end = len(_MAGIC)

    def append(self, record: JournalRecord) -> None:
        """Write the record of the next round. It survives the process; `sync` makes it survive the machine.

        Raises CheckpointError where it cannot be written; the journal then still ends with the round before.
        """
        if self._file is None or record.round_index != self._last_round + 1:
            raise ValueError(f"round {record.round_index} does not follow round {self._last_round} in the journal")
        payload = cast(bytes, msgpack.packb(_to_plain(record)))
        frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        with _clear_errors(self._folder):
            try:
                self._write_all(frame)
            except OSError:
                self._file.truncate(self._good_end)
                raise
        self._good_end += len(frame)
        self._last_round = record.round_index

    def sync(self) -> None:
        """Wait until everything appended is on the disk."""
        if self._file is not None:
            with _clear_errors(self._folder):
                os.fsync(self._file.fileno())

    def drop_through(self, round_index: int) -> None:
        """Delete the segments that hold no round after `round_index`."""
        segments = self._segments()
        for segment, following in itertools.pairwise(segments):
            if _first_round(following) <= round_index + 1:
                segment.unlink()

    def close(self) -> None:
        """Close the current segment."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_all(self, data: bytes) -> None:
        assert self._file is not None
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def _segments(self) -> list[Path]:
        return sorted(self._folder.glob("*.journal"))

    def _located(self) -> Iterator[_Located]:
        for segment in self._segments():
            data = segment.read_bytes()
            if data[: len(_MAGIC)] != _MAGIC:
                continue
            position = len(_MAGIC)
            while position + _FRAME.size <= len(data):
                length, checksum = _FRAME.unpack_from(data, position)
                position += _FRAME.size
                payload = data[position : position + length]
                if length > _MAX_RECORD_BYTES or len(payload) < length or zlib.crc32(payload) != checksum:
                    break
                position += length
                yield _Located(_from_plain(msgpack.unpackb(payload)), segment, position)


def _first_round(segment: Path) -> int:
    return int(segment.stem)


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a disk into one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; free space or mend the folder, then go on with --resume"
        ) from error


def _to_plain(record: JournalRecord) -> dict[str, Any]:
    groups = [
        {
            "prompt": pack_ids(group.prompt_ids),
            "completions": [pack_ids(ids) for ids in group.completion_ids],
            "advantages": pack_floats(group.advantages),
            "logprobs": [None if values is None else pack_floats(values) for values in group.behavior_logprobs],
            "masked": list(group.num_masked),
        }
        for group in record.batch.groups
    ]
    return {"round": record.round_index, "groups": groups, "row": dict(record.row), "rollouts": record.rollouts}


def _from_plain(plain: Mapping[str, Any]) -> JournalRecord:
    groups = tuple(
        TrainingGroup(
            prompt_ids=unpack_ids(group["prompt"]),
            completion_ids=tuple(unpack_ids(ids) for ids in group["completions"]),
            advantages=unpack_floats(group["advantages"]),
            behavior_logprobs=tuple(None if data is None else unpack_floats(data) for data in group["logprobs"]),
            num_masked=tuple(group.get("masked", ())),
        )
        for group in plain["groups"]
    )
    return JournalRecord(plain["round"], TrainingBatch(groups), plain["row"], plain.get("rollouts"))
