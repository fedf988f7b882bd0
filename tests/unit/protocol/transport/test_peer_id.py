import pytest

from protocol.errors import IdentityError
from protocol.identity import node_id_of
from protocol.transport.peer_id import base58_decode, base58_encode, node_id_of_peer, node_id_of_peer_bytes, peer_id_of


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"", ""), (b"\0", "1"), (b"\0\0\x01", "112"), (b"hello world", "StV1DL6CwTryKyV"), (b"\xff" * 4, "7YXq9G")],
)
def test_base58(data, text):
    assert base58_encode(data) == text
    assert base58_decode(text) == data


@pytest.mark.parametrize("text", ["0", "O", "I", "l", "é", " ", "1" * 129])
def test_not_base58(text):
    with pytest.raises(ValueError, match="base58"):
        base58_decode(text)


def test_a_known_peer_id():
    # The key and peer id of libp2p's specification of peer ids.
    public_key = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    assert peer_id_of(node_id_of(public_key)) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


@pytest.mark.parametrize("seed", range(20))
def test_there_and_back(seed):
    node_id = node_id_of(bytes([seed * 12]) * 32)
    assert peer_id_of(node_id).startswith("12D3KooW")
    assert node_id_of_peer(peer_id_of(node_id)) == node_id


@pytest.mark.parametrize("peer_id", ["", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "12D3KooW", "not a peer"])
def test_a_peer_of_another_kind_is_refused(peer_id):
    with pytest.raises(IdentityError):
        node_id_of_peer(peer_id)
    with pytest.raises(IdentityError):
        node_id_of_peer_bytes(peer_id.encode())
