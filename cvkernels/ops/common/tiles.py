"""What cutting work into the programs of a Triton launch needs; free of Triton."""

from __future__ import annotations

INT32_MAX = 2**31 - 1
# By compute capability; for others, take the A100's.
SM_COUNT = {(8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def sm_count(capability: tuple[int, int]) -> int:
    major, minor = capability
    return SM_COUNT.get((major, minor), 108)
