"""The C library of a loader's worker keeps the pages of pictures that were freed."""

import platform
import subprocess
import sys

import pytest

FAULTS_OF_PICTURES = """
import resource, sys
import numpy as np
from kinema.pipelines.loader.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def read():
    # Batches of pictures that grow and shrink, larger ones than the C library keeps of itself.
    return [np.ones(40_000_000 // (n + 2), np.uint8) for n in range(5)]
read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    read()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library can be told")
def test_freed_pictures_are_not_asked_for_again():
    faults = {}
    for what in ("keep", "let go"):
        command = [sys.executable, "-c", FAULTS_OF_PICTURES, what]
        faults[what] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["keep"] < faults["let go"] / 20, faults
