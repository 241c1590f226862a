"""The random state that student and data draw from."""

import contextlib

import torch


def unchanged_rng() -> contextlib.AbstractContextManager[None]:
    """
    Leave the random state as it was, so that arms with and without a teacher train on the same
    data.

    Models draw their first weights on the CPU; other devices' generators are not touched.
    """
    return torch.random.fork_rng(devices=[])
