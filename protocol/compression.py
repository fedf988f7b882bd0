"""zstd as frames use it: with a dictionary that every node has, and never more memory than a limit.

The dictionary is a constant of the protocol, made by `swarm.tasks.make_dictionary`: completions are short, and
without it each frame spends its first kilobytes on learning the language. A frame names it by number in its header.
"""

from functools import cache
from importlib import resources

import zstandard

from protocol.limits import ZSTD_LEVEL
from protocol.refusals import Reason, Refusal

__all__ = ["DICTIONARY_ID", "compress", "decompress"]

DICTIONARY_ID = 32769  # numbers from 32768 are for private use, and those below 65536 take two bytes
_NO_CONTENT_SIZE = 2**64 - 1


def compress(data: bytes) -> bytes:
    """Return a zstd frame that says how large its content is."""
    return zstandard.ZstdCompressor(dict_data=_dictionary(), level=ZSTD_LEVEL, write_content_size=True).compress(data)


def decompress(frame: bytes, max_bytes: int) -> bytes:
    """Return the content of exactly one zstd frame, which must declare its size. Raises Refusal.

    The header is read first, and nothing is allocated for one that declares more than `max_bytes`.
    """
    try:
        header = zstandard.get_frame_parameters(frame)
        if header.content_size == _NO_CONTENT_SIZE:
            raise Refusal(Reason.BAD_COMPRESSION, "frame: its header does not say how large the content is")
        if max(header.content_size, header.window_size) > max_bytes:
            raise Refusal(Reason.OVERSIZE, f"frame: declares more than {max_bytes} bytes")
        if header.dict_id not in (0, DICTIONARY_ID):
            raise Refusal(Reason.UNKNOWN_MINOR, f"frame: compressed with the unknown dictionary {header.dict_id}")
        dictionary = _dictionary() if header.dict_id else None
        decompressor = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=max(max_bytes, 1024))
        return decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Refusal(Reason.BAD_COMPRESSION, f"frame: {error}") from error


@cache
def _dictionary() -> zstandard.ZstdCompressionDict:
    content = resources.files("protocol").joinpath("dictionary.zdict").read_bytes()
    dictionary = zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_FULLDICT)
    dictionary.precompute_compress(level=ZSTD_LEVEL)
    return dictionary
