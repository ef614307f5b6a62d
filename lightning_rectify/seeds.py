"""Seeds of random streams that have nothing to do with each other."""

import numpy as np


def derive_seed(*keys: int) -> int:
    """A seed for each sequence of numbers (run's seed, rank, batch, ...).

    Their sum would not do: seed + rank is rank 0 of the next seed.

    Args:
        keys: what the stream belongs to, each at least 0. Zeros at the end do not count: (1,) is (1, 0).

    Returns:
        In [0, 2**63), as every generator takes it. The same on each machine.

    Raises:
        ValueError: for a negative number.

    Example:
        >>> derive_seed(0, 1) == derive_seed(1, 0)
        False
    """
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))
