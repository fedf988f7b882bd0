"""A node's identity: one Ed25519 key pair in a file that only its owner can read.

The node id is the public key. A key file is created once, atomically, and never replaced: whoever wants a
new identity moves the old file away. Signatures carry a domain tag, so that one made for one purpose is
never valid for another. Which bytes are signed is `signing`'s.
"""

import base64
import binascii
import contextlib
import os
import secrets
import stat
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.errors import IdentityError

__all__ = ["Identity", "node_id_of", "public_key_of", "verify"]

_SIGNATURE_PREFIX = b"swarm-node/1"
_MAX_DOMAIN_BYTES = 64
_MAX_KEY_FILE_BYTES = 4096
_PUBLIC_KEY_BYTES = 32
_MAX_CACHED = 16_384  # names of keys, a few hundred bytes each: more than a node has peers and authors


class Identity:
    """A node's key pair. Make one with `create`, `load` or `load_or_create`."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.public_key: bytes = private_key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        """Show the public half alone."""
        return f"Identity({self.node_id})"

    @property
    def node_id(self) -> str:
        """The public key in base32: 52 lower-case characters."""
        return node_id_of(self.public_key)

    @property
    def seed(self) -> bytes:
        """The private half (32 bytes), for a transport whose own identity is the node's. Never leaves the node."""
        return self._private_key.private_bytes_raw()

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """Return the detached signature (64 bytes) of a message for one purpose."""
        return self._private_key.sign(_tagged(domain, message))

    @classmethod
    def create(cls, path: Path) -> "Identity":
        """Make a new key pair in a new file of mode 0600. Raises IdentityError where a file exists already."""
        taken = f"{path} exists and is not replaced: move it away to get a new identity"
        if os.path.lexists(path):
            raise IdentityError(taken)
        identity = cls(Ed25519PrivateKey.generate())
        try:
            os.makedirs(path.parent, exist_ok=True)
            if not _write_new_file(path, identity._pem()):
                raise IdentityError(taken)
        except OSError as error:
            raise IdentityError(f"cannot write the identity {path}: {error.strerror}; choose another path") from error
        return identity

    @classmethod
    def load(cls, path: Path) -> "Identity":
        """Read a key pair. Raises IdentityError if it is missing, malformed, or readable by others."""
        pem = _read_private_file(path)
        malformed = f"{path} is not an Ed25519 private key: restore it from a backup, or move it away"
        try:
            private_key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise IdentityError(malformed) from error
        if not isinstance(private_key, Ed25519PrivateKey):
            raise IdentityError(malformed)
        return cls(private_key)

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """Read the key pair, or make it where there is none, also when another process makes it meanwhile."""
        if not os.path.lexists(path):
            try:
                return cls.create(path)
            except IdentityError:
                if not os.path.lexists(path):
                    raise
        return cls.load(path)

    def _pem(self) -> bytes:
        return self._private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def verify(public_key: bytes, domain: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is the key's signature of this message for this purpose."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _tagged(domain, message))
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(maxsize=_MAX_CACHED)
def node_id_of(public_key: bytes) -> str:
    """Return the node id of a public key."""
    return base64.b32encode(public_key).decode().rstrip("=").lower()


@lru_cache(maxsize=_MAX_CACHED)
def public_key_of(node_id: str) -> bytes:
    """Return the public key of a node id. Raises IdentityError for a string that is not one."""
    try:
        public_key = base64.b32decode(node_id.upper() + "====")
    except (binascii.Error, ValueError):
        public_key = b""
    if len(public_key) != _PUBLIC_KEY_BYTES or node_id_of(public_key) != node_id:
        raise IdentityError(f"not a node id: {node_id[:64]!r}; it has 52 characters of a-z and 2-7")
    return public_key


def _tagged(domain: bytes, message: bytes) -> bytes:
    """Return what is really signed; the length byte keeps two domains from sharing a text."""
    if not 0 < len(domain) <= _MAX_DOMAIN_BYTES:
        raise ValueError(f"a domain tag has 1 to {_MAX_DOMAIN_BYTES} bytes, not {len(domain)}")
    return _SIGNATURE_PREFIX + bytes([len(domain)]) + domain + message


def _read_private_file(path: Path) -> bytes:
    """Return a key file's content, after its kind, size and mode have been checked on the open file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise IdentityError(f"{path} is not a file: name the identity's key file")
            if status.st_mode & 0o077:
                raise IdentityError(f"{path} can be read by others: run `chmod 600 {path}`")
            if status.st_size > _MAX_KEY_FILE_BYTES:
                raise IdentityError(f"{path} is too large for a key file: name the identity's key file")
            return file.read(_MAX_KEY_FILE_BYTES)
    except FileNotFoundError:
        raise IdentityError(f"no identity at {path}: make one with `swarm-node init`") from None
    except OSError as error:
        raise IdentityError(f"cannot read the identity {path}: {error.strerror}; check its owner and mode") from error


def _write_new_file(path: Path, content: bytes) -> bool:
    """Write a file of mode 0600 that appears whole or not at all. Returns False where there is one already."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, a link never replaces what is there
        except FileExistsError:
            return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True
