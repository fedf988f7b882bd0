"""Imports what a node uses of hivemind, its p2pd bindings and its DHT, and leaves out the rest.

hivemind's packages import torch and scipy when they are imported, for the training that they also offer: three
seconds and 200 MB before a node could say a word, and a bootstrap needs neither. The three packages in question are
put in place here without running them; their modules are hivemind's own, as they are. Where hivemind has been
imported whole, that is used.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec

__all__ = ["import_dht"]

# What modules of hivemind import from the package itself: (name, module that has it).
_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "hivemind": (),
    "hivemind.dht": (),
    "hivemind.utils": (
        ("get_logger", "hivemind.utils.logging"),
        ("MSGPackSerializer", "hivemind.utils.serializer"),
        ("SerializerBase", "hivemind.utils.serializer"),
        ("get_dht_time", "hivemind.utils.timed_storage"),
    ),
}


def import_dht() -> None:
    """Import `protocol.transport.hivemind_dht`, and with it hivemind. Takes most of a second, the first time."""
    if "hivemind" not in sys.modules:
        for package in _NAMES:
            spec = find_spec(package)  # for a module within a package, that is in place by now
            if spec is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            _put(package, spec)
        for package, names in _NAMES.items():
            for name, module in names:
                setattr(sys.modules[package], name, getattr(importlib.import_module(module), name))
    importlib.import_module("protocol.transport.hivemind_dht")


def _put(package: str, spec: ModuleSpec) -> None:
    """Put a package in place that knows where its modules are, and has not been run."""
    module = module_from_spec(spec)
    sys.modules[package] = module
    parent, _, name = package.rpartition(".")
    if parent:
        setattr(sys.modules[parent], name, module)
