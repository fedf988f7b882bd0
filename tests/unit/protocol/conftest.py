"""What tests of the protocol share."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fuzzing():
    """The module `fuzzing`: real records, mutations of them, hostile bytes, all decoders."""
    spec = importlib.util.spec_from_file_location("fuzzing", Path(__file__).with_name("fuzzing.py"))
    module = sys.modules["fuzzing"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
