"""Positional records: reading the fields of one, in order, each with its type and limit.

A record is a canonical MessagePack array that begins with the major and minor version it is written in. One of
this minor version has exactly the fields that are known here, and one of an older minor version those of that
version; one of a newer minor version may have more at its end, which are passed over. Whatever else is found raises a
Refusal, before memory is taken in proportion to what the bytes merely declare.
"""

from typing import Any

from protocol import codec
from protocol.errors import CodecError
from protocol.limits import MAX_UINT64
from protocol.messages import PROTOCOL_VERSION
from protocol.refusals import Reason, Refusal
from protocol.versions import check_version, peek_version

__all__ = ["Fields", "is_label", "open_record", "write_record"]

_NUM_SPARE_VALUES = 256  # scalars and containers that fields of newer minor versions may add
_CONTROL_CHARACTERS = frozenset(map(chr, (*range(0x20), *range(0x7F, 0xA0))))


def is_label(text: str) -> bool:
    """Whether text may be shown on a terminal: there is some, and no control character in it."""
    return bool(text) and (text.isprintable() or _CONTROL_CHARACTERS.isdisjoint(text))


class Fields:
    """The fields of one array, read once each from the first to the last."""

    def __init__(self, what: str, values: list[Any], version: tuple[int, int]) -> None:
        self.what, self.version = what, version  # what: the record's name, for messages
        self._values = iter(values)

    def has_since(self, minor: int) -> bool:
        """Whether the record has the fields that this minor version added."""
        return self.version[1] >= minor

    @property
    def newer(self) -> bool:
        """Whether the record was written by a newer minor version."""
        return self.version > PROTOCOL_VERSION

    def integer(self, name: str, maximum: int = MAX_UINT64) -> int:
        """Return an integer from 0 to `maximum`."""
        value = next(self._values)
        if type(value) is not int or not 0 <= value <= maximum:
            raise self.bad(name, f"is no integer from 0 to {maximum}")
        return value

    def positive(self, name: str, maximum: int) -> int:
        """Return an integer from 1 to `maximum`."""
        value = self.integer(name, maximum)
        if value == 0:
            raise self.bad(name, "is 0")
        return value

    def boolean(self, name: str) -> bool:
        """Return a truth value."""
        value = next(self._values)
        if type(value) is not bool:
            raise self.bad(name, "is neither true nor false")
        return value

    def text(self, name: str, max_bytes: int) -> str:
        """Return any text, of at most `max_bytes` bytes of UTF-8."""
        value = next(self._values)
        if not isinstance(value, str):
            raise self.bad(name, "is no string")
        if len(value.encode()) > max_bytes:
            raise Refusal(Reason.OVERSIZE, f"{self.what}: {name} has more than {max_bytes} bytes")
        return value

    def label(self, name: str, max_bytes: int) -> str:
        """Return text that may be shown on a terminal: 1 to `max_bytes` bytes of UTF-8, no control characters."""
        value = self.text(name, max_bytes)
        if not is_label(value):
            raise self.bad(name, "is empty or has control characters")
        return value

    def binary(self, name: str, num_bytes: int) -> bytes:
        """Return exactly `num_bytes` bytes."""
        value = next(self._values)
        if not isinstance(value, bytes) or len(value) != num_bytes:
            raise self.bad(name, f"is not {num_bytes} bytes")
        return value

    def blob(self, name: str, max_bytes: int) -> bytes:
        """Return at most `max_bytes` bytes."""
        value = next(self._values)
        if not isinstance(value, bytes):
            raise self.bad(name, "is not bytes")
        if len(value) > max_bytes:
            raise Refusal(Reason.OVERSIZE, f"{self.what}: {name} has more than {max_bytes} bytes")
        return value

    def array(self, name: str, max_items: int) -> list[Any]:
        """Return an array of at most `max_items` items, as they are."""
        value = next(self._values)
        if not isinstance(value, list):
            raise self.bad(name, "is no array")
        if len(value) > max_items:
            raise Refusal(Reason.OVERSIZE, f"{self.what}: {name} has more than {max_items} items")
        return value

    def inner(self, name: str, num_fields: int) -> "Fields":
        """Return the fields of an array within, which has exactly so many in every minor version."""
        value = next(self._values)
        if not isinstance(value, list) or len(value) != num_fields:
            raise self.bad(name, f"is no array of {num_fields} fields")
        return Fields(f"{self.what}: {name}", value, self.version)

    def each(self, name: str, max_items: int) -> "tuple[Fields, int]":
        """Return the items of an array as fields, to be read one after another, and how many there are."""
        values = self.array(name, max_items)
        return Fields(f"{self.what}: {name}", values, self.version), len(values)

    def bad(self, name: str, problem: str) -> Refusal:
        """Return what to raise where a field is not what it must be."""
        return Refusal(Reason.BAD_SCHEMA, f"{self.what}: {name} {problem}")


def open_record(
    what: str, data: bytes, *, num_fields: int, max_bytes: int, max_values: int, added: tuple[int, ...] = ()
) -> Fields:
    """Return the fields that follow the version.

    num_fields: those of minor version 0, the two of the version not counted.
    added: the minor versions that each appended one field.
    max_values: scalars and containers in the largest record of this minor version.
    """
    if len(data) > max_bytes:
        raise Refusal(Reason.OVERSIZE, f"{what}: {len(data)} bytes are over the limit of {max_bytes}")
    version = peek_version(data)
    if version is None:
        raise Refusal(Reason.BAD_SCHEMA, f"{what}: does not begin with a version")
    check_version(version)
    try:
        values = codec.decode(data, max_bytes=max_bytes, max_values=max_values + _NUM_SPARE_VALUES)
    except CodecError as error:
        raise Refusal(Reason.BAD_SCHEMA, f"{what}: {error}") from error
    found, expected = len(values) - 2, num_fields + sum(version[1] >= minor for minor in added)
    if found < expected or (found > expected and version <= PROTOCOL_VERSION):
        raise Refusal(Reason.BAD_SCHEMA, f"{what}: {found} fields after the version instead of {expected}")
    return Fields(what, values[2:], version)


def write_record(what: str, fields: list[Any], max_bytes: int) -> bytes:
    """Return the bytes of a record of this version. Raises Refusal where the node's own record breaks a limit."""
    try:
        data = codec.encode([*PROTOCOL_VERSION, *fields])
    except CodecError as error:
        raise Refusal(Reason.BAD_SCHEMA, f"{what}: {error}") from error
    if len(data) > max_bytes:
        raise Refusal(Reason.OVERSIZE, f"{what}: {len(data)} bytes are over the limit of {max_bytes}")
    return data
