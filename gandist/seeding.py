"""Randomness as a function of progress: every generator is seeded from what it is for and when, never from a state."""

import hashlib


def derive(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed for one purpose at one point of progress.

    BLAKE2b keeps the seeds of two runs apart: with `seed + epoch`, epoch 1 of seed 0 would be epoch 0 of seed 1.
    63 bits, since `torch.Generator.manual_seed` takes a signed integer.
    """
    text = "/".join([purpose, str(seed), *map(str, counters)])
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"gandist/v1").digest()
    return int.from_bytes(digest, "little") >> 1
