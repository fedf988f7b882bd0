"""The errors of `protocol`.

ProtocolError
├── CodecError       bytes that are not a valid record, or a record over a limit
├── IdentityError    a key file that is missing, malformed, or readable by others
├── Refusal          what a peer sent and this node does not take, with its reason   (refusals)
└── TransportError   a request that brought nothing back                             (transport.base)
"""

__all__ = ["CodecError", "IdentityError", "ProtocolError"]


class ProtocolError(Exception):
    """Root of everything that `protocol` raises on purpose."""


class CodecError(ProtocolError):
    """Bytes that do not decode to a valid record, or a record over a size limit."""


class IdentityError(ProtocolError):
    """A key file that cannot be used. The message is one line and names the fix."""
