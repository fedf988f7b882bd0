"""What docs/protocol.md says of the DHT's messages, held to what hivemind's own descriptors and p2pd's say."""

import re
from pathlib import Path

import msgpack
import pytest
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils import MSGPackSerializer

from protocol import limits
from protocol.transport import hivemind_dht, hivemind_records

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
BLOCK = re.search(r"```proto\n(.*?)```", PAGE, re.DOTALL)
assert BLOCK is not None
MESSAGES = dict(re.findall(r"^(\w+) +\{(.*?)\}", re.sub(r"//.*", "", BLOCK[1]), re.DOTALL | re.MULTILINE))
REAL = {
    "Envelope": p2pd_pb2.PersistentConnectionRequest,
    "Call": p2pd_pb2.CallUnaryRequest,
    "Answer": p2pd_pb2.CallUnaryResponse,
}
NAMES = {"call_id": "callId", "call": "callUnary", "answer": "unaryResponse", "name": "proto"}  # on the page: in it
TYPES = {1: "double", 8: "bool", 9: "string", 12: "bytes"}


@pytest.mark.parametrize("name", [name for name in MESSAGES if name != "ResultType"])
def test_messages_have_these_fields(name):
    fields = REAL.get(name, getattr(dht_pb2, name, None)).DESCRIPTOR.fields_by_name
    said = re.findall(r"(repeated )?(\w+) (\w+) = (\d+);", MESSAGES[name])
    assert said
    for repeated, kind, field_name, number in said:
        field = fields[NAMES.get(field_name, field_name)]
        assert field.number == int(number)
        assert (field.is_repeated) == bool(repeated)
        real = field.message_type or field.enum_type
        if real is None:
            assert TYPES[field.type] == kind
        elif kind in REAL:
            assert real is REAL[kind].DESCRIPTOR
        else:
            assert real.name == kind
    if name not in REAL:
        assert {field for _, _, field, _ in said} | {"auth"} >= set(fields)


def test_results_have_these_types():
    said = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+);", MESSAGES["ResultType"])}
    assert said == dict(dht_pb2.ResultType.items())


def test_a_dictionary_is_what_the_page_says():
    value = DictionaryDHTValue()
    value.store("node", b"packed", 4e9)
    extension = msgpack.unpackb(MSGPackSerializer.dumps(value))
    assert extension.code == 0x50 == int(re.search(r"extension of type 0x50 \((\d+)\)", PAGE)[1])
    size, latest, items = msgpack.unpackb(extension.data)
    assert isinstance(size, float)
    assert (latest, items) == (4e9, [["node", b"packed", 4e9]])


def test_the_numbers_stated_are_those_that_hold():
    def number(pattern):
        return int(re.search(pattern, PAGE)[1].replace(",", ""))

    assert number(r"more than ([\d,]+) s apart do not connect") == hivemind_records.MAX_CLOCK_SKEW_S
    assert number(r"five lists of one length, 1 to (\d)") == hivemind_dht.MAX_KEYS_PER_REQUEST
    assert number(r"up to (\d+) nodes that are near it") == hivemind_dht.NUM_NEIGHBOURS
    assert number(r"A request has at most ([\d,]+) bytes") == hivemind_dht.MAX_REQUEST_BYTES
    assert "until the eight nearest" in PAGE
    assert hivemind_dht.NUM_NEAREST_ANSWERED == hivemind_dht.NUM_REPLICAS == 8
    assert number(r"/ 1000 \+ ([\d,]+),") == limits.NODE_RECORD_TTL_S
    assert number(r"within 1 s of ([\d,]+) s after") == limits.NODE_RECORD_TTL_S
