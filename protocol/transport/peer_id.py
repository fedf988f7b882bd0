"""The peer id of libp2p and the node id name one Ed25519 key: each is a pure function of the other.

A peer id is base58 (Bitcoin's alphabet) of an identity multihash: 00 24, then the public key as libp2p's
protobuf, 08 01 12 20 and 32 bytes. It begins with `12D3KooW`.
"""

from functools import lru_cache

from protocol.errors import IdentityError
from protocol.identity import node_id_of, public_key_of

__all__ = ["base58_decode", "base58_encode", "node_id_of_peer", "node_id_of_peer_bytes", "peer_bytes_of", "peer_id_of"]

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS = {character: digit for digit, character in enumerate(_ALPHABET)}
_PREFIX = bytes.fromhex("002408011220")
_MAX_BASE58_CHARACTERS = 128  # longer text is no peer id; decoding takes quadratic time


def base58_encode(data: bytes) -> str:
    """Return base58 text of some bytes."""
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text


def base58_decode(text: str) -> bytes:
    """Return the bytes of base58 text. Raises ValueError for text that is not."""
    if len(text) > _MAX_BASE58_CHARACTERS or not all(character in _DIGITS for character in text):
        raise ValueError("not base58")
    number = 0
    for character in text:
        number = number * 58 + _DIGITS[character]
    num_zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * num_zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")


def peer_bytes_of(node_id: str) -> bytes:
    """Return a node's peer id as bytes. Raises IdentityError for a string that is no node id."""
    return _PREFIX + public_key_of(node_id)


@lru_cache(maxsize=65_536)
def peer_id_of(node_id: str) -> str:
    """Return a node's peer id. Raises IdentityError for a string that is no node id."""
    return base58_encode(peer_bytes_of(node_id))


def node_id_of_peer_bytes(peer: bytes) -> str:
    """Return the node id of a peer id's bytes. Raises IdentityError for a peer whose key is not Ed25519."""
    if len(peer) != len(_PREFIX) + 32 or not peer.startswith(_PREFIX):
        raise IdentityError("not the peer id of an Ed25519 key: it begins with 12D3KooW")
    return node_id_of(peer[len(_PREFIX) :])


@lru_cache(maxsize=65_536)
def node_id_of_peer(peer_id: str) -> str:
    """Return the node id of a peer id. Raises IdentityError for text that is none."""
    try:
        peer = base58_decode(peer_id)
    except ValueError:
        raise IdentityError(f"not a peer id: {peer_id[:64]!r}; it begins with 12D3KooW") from None
    return node_id_of_peer_bytes(peer)
