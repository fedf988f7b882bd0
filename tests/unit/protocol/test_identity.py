"""Key files are private and never replaced; signatures are Ed25519's, bound to one purpose."""

import os
import threading

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import IdentityError
from protocol.identity import Identity, node_id_of, public_key_of, verify

# RFC 8032, section 7.1, test 1
SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
NODE_ID = "25njqamcweflpvkl73j4szahhihoc4xt3ktcgjnpaingr5yhkena"


@pytest.fixture
def identity():
    return Identity(Ed25519PrivateKey.from_private_bytes(SECRET))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys" / "identity.pem"


def test_the_node_id_is_the_public_key(identity):
    assert identity.public_key == PUBLIC
    assert identity.node_id == node_id_of(PUBLIC) == NODE_ID
    assert public_key_of(NODE_ID) == PUBLIC
    assert repr(identity) == f"Identity({NODE_ID})"


def test_what_is_signed_is_prefix_length_domain_message(identity):
    raw = Ed25519PrivateKey.from_private_bytes(SECRET)
    signature = identity.sign(b"batch", b"hello")
    assert signature == raw.sign(b"swarm-node/1\x05batchhello")
    assert signature.hex() == (
        "3dba10fd5134951ecc937db801965088ae7762a2e73eb23351a0f1157533ea98"
        "be838f7ddf4ec5e449c14c704b7828d9eb41cbc967f469d8eb9c77f3df832b0d"
    )
    assert verify(PUBLIC, b"batch", b"hello", signature)


@given(st.binary(), st.binary(min_size=1, max_size=64), st.data())
def test_a_signature_holds_for_its_own_key_domain_and_message_alone(message, domain, data):
    identity = Identity(Ed25519PrivateKey.from_private_bytes(SECRET))
    signature = identity.sign(domain, message)
    assert verify(PUBLIC, domain, message, signature)
    other_message = data.draw(st.binary().filter(lambda other: other != message))
    other_domain = data.draw(st.binary(min_size=1, max_size=64).filter(lambda other: other != domain))
    bit = data.draw(st.integers(0, 511))
    forged = bytearray(signature)
    forged[bit // 8] ^= 1 << bit % 8
    assert not verify(PUBLIC, domain, other_message, signature)
    assert not verify(PUBLIC, other_domain, message, signature)
    assert not verify(PUBLIC, domain, message, bytes(forged))
    assert not verify(Ed25519PrivateKey.generate().public_key().public_bytes_raw(), domain, message, signature)


def test_text_moved_between_domain_and_message_does_not_verify(identity):
    assert not verify(PUBLIC, b"ab", b"c", identity.sign(b"a", b"bc"))


@pytest.mark.parametrize(("key", "signature"), [(b"", b""), (b"short", b"x" * 64), (b"\xff" * 32, b"x" * 64)])
def test_a_malformed_key_or_signature_verifies_nothing(key, signature):
    assert not verify(key, b"d", b"m", signature)


@pytest.mark.parametrize("domain", [b"", b"x" * 65])
def test_a_domain_has_between_1_and_64_bytes(identity, domain):
    with pytest.raises(ValueError, match="domain tag"):
        identity.sign(domain, b"m")


@pytest.mark.parametrize("node_id", ["", NODE_ID.upper(), NODE_ID[:-1], NODE_ID + "a", NODE_ID[:-1] + "b", "é" * 52])
def test_a_node_id_has_one_spelling(node_id):
    with pytest.raises(IdentityError, match="not a node id"):
        public_key_of(node_id)


def test_a_created_key_is_private_and_comes_back(path):
    created = Identity.create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]
    assert Identity.load(path).node_id == created.node_id
    assert Identity.load_or_create(path).node_id == created.node_id


def test_the_mode_does_not_depend_on_the_umask(path):
    before = os.umask(0)
    try:
        Identity.create(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"not a key"])
def test_what_is_there_is_never_replaced(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(IdentityError, match="not replaced: move it away"):
        Identity.create(path)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="not an Ed25519 private key"):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_a_dangling_link_is_not_followed(path):
    path.parent.mkdir()
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(IdentityError, match="not replaced"):
        Identity.create(path)
    assert not path.with_name("elsewhere").exists()


def test_of_many_that_create_at_once_one_wins_and_all_agree(path):
    start = threading.Barrier(8)
    node_ids = []

    def run():
        start.wait()
        node_ids.append(Identity.load_or_create(path).node_id)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(node_ids) == 8
    assert set(node_ids) == {Identity.load(path).node_id}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_can_use_is_refused_with_the_command_that_mends_it(path, mode):
    Identity.create(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        Identity.load(path)


def test_a_missing_key_names_the_command(path):
    with pytest.raises(IdentityError, match="swarm-node init"):
        Identity.load(path)


def test_a_key_of_another_kind_is_refused(path):
    path.parent.mkdir()
    pem = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(pem)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="not an Ed25519 private key"):
        Identity.load(path)


def test_a_folder_a_huge_file_and_a_pipe_are_refused(path):
    path.mkdir(parents=True, mode=0o700)
    with pytest.raises(IdentityError):
        Identity.load(path)
    huge = path / "huge"
    huge.write_bytes(b"x" * 5000)
    huge.chmod(0o600)
    with pytest.raises(IdentityError, match="too large"):
        Identity.load(huge)
    pipe = path / "pipe"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(IdentityError, match="not a file"):
        Identity.load(pipe)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(IdentityError, match="choose another path") as caught:
        Identity.create(tmp_path / "file" / "identity.pem")
    assert "\n" not in str(caught.value)
