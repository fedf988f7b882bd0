"""The dictionary that is shipped is the protocol's, and the one that its script makes."""

import hashlib
from importlib import resources

import pytest
import zstandard

from protocol.compression import DICTIONARY_ID

SHIPPED = resources.files("protocol").joinpath("dictionary.zdict").read_bytes()


def test_the_dictionary_is_that_of_this_version_of_the_protocol():
    """Another one needs another number: frames that were compressed with this one must stay readable."""
    assert zstandard.ZstdCompressionDict(SHIPPED).dict_id() == DICTIONARY_ID == 32769
    assert hashlib.sha256(SHIPPED).hexdigest() == ("853fc8759ad418c7cd651ff4b57246560e6023db37f648e61e17bb1055125252")


@pytest.mark.soak  # half a minute of processor time: some generators are slow
def test_the_script_makes_the_dictionary_that_is_shipped():
    from swarm.tasks.make_dictionary import make_dictionary

    assert make_dictionary() == SHIPPED
