"""What malloc does with a block that was freed, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.patience import PATIENCE_S

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="this is about glibc's malloc"
)

BLOCK_PAGES = 16_384  # 64 MiB or more; glibc maps every block above 32 MiB anew
PROBE = """
import ctypes, resource, sys
from shared import freed_memory

libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # no huge pages, of which a block would take very few
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def faults_of_a_block(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for call in sys.argv[2:]:
    getattr(freed_memory, call)()
size = int(sys.argv[1]) * resource.getpagesize()
faults_of_a_block(size)
print(faults_of_a_block(size))
if "keep_freed_memory" in sys.argv:
    freed_memory.return_freed_memory()
    print(faults_of_a_block(size))
"""


def faults(*calls: str, **environment: str) -> list[int]:
    """Pages that a block takes the second time; once more after memory was given back."""
    settings = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run(
        [sys.executable, "-c", PROBE, str(BLOCK_PAGES), *calls],
        env=settings | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    return [int(line) for line in found.stdout.split()]


def test_a_freed_block_is_used_again_until_it_is_given_back() -> None:
    assert faults()[0] > BLOCK_PAGES / 2
    kept, returned = faults("keep_freed_memory")
    assert kept < BLOCK_PAGES / 100 and returned > BLOCK_PAGES / 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TOP_PAD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.top_pad=65536")],
)
def test_whoever_sets_malloc_decides(name: str, value: str) -> None:
    assert faults("keep_freed_memory", **{name: value})[0] > BLOCK_PAGES / 2


def test_another_setting_of_malloc_decides_nothing() -> None:
    assert faults("keep_freed_memory", MALLOC_ARENA_MAX="1")[0] < BLOCK_PAGES / 100
