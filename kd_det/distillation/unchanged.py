"""The random state that student and data draw from."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def unchanged_rng() -> contextlib.AbstractContextManager[None]:
    """
    Leave the random state as it was, so that arms with and without a teacher train on the same
    data.

    Models draw their first weights on the CPU; other devices' generators are not touched.
    """
    return torch.random.fork_rng(devices=[])


@contextlib.contextmanager
def unchanged_generators() -> Iterator[None]:
    """Leave every generator as it was: Python's, numpy's, and torch's of all devices in use."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
