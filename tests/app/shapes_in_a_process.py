"""Multiplies matrices of many shapes and says by how many bytes the heap grew: python shapes_in_a_process.py FIRST LAST."""

import ctypes
import sys

import torch

from app.models import bound_shape_caches


class _Heap(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def main() -> None:
    """Measure after the first so many shapes, and after the others."""
    first, last = map(int, sys.argv[1:])
    bound_shape_caches()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Heap
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    for rows in range(1, first):
        torch.nn.functional.linear(torch.zeros(rows, 64, dtype=torch.bfloat16), weight)
    before = libc.mallinfo2().uordblks
    for rows in range(first, last):
        torch.nn.functional.linear(torch.zeros(rows, 64, dtype=torch.bfloat16), weight)
    sys.stdout.write(f"{libc.mallinfo2().uordblks - before}\n")


if __name__ == "__main__":
    main()
