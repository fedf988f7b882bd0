"""Imports much at once, without looking for garbage in it.

What torch and transformers are made of in memory stays until the process ends. Python's collector goes through it
again and again while they are imported, which takes a quarter of their time, and through all of it once more with
every full collection afterwards.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["importing"]


@contextmanager
def importing() -> Iterator[None]:
    """Put collections off until the block ends, and leave what is there by then out of all later ones.

    For imports alone: of what else is made within, nothing that is part of a cycle is ever freed.
    """
    if not gc.isenabled():  # the block around this one goes on
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
