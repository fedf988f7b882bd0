"""What the process of a unit says to the one that has started it."""

import subprocess
import sys

PROGRAM = """
import os
from node.experiment.child import _keep_stdout
out = _keep_stdout()
print("a library is chatty", flush=True)
os.system("echo so is a program")
print("{}", file=out, flush=True)
"""


def test_only_its_rows_are_on_stdout_whatever_libraries_print():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"
    assert done.stderr == "a library is chatty\nso is a program\n"
