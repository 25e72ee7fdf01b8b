"""A pytest plugin: the kernels in the libraries that NCPVAE_TEST_KERNELS names take the place of the package's own.

Only tests that take the `device` fixture are run: they are what a CUDA device would be tested with.
"""

import os

import torch

import ncpvae.ops  # noqa: F401

for library in os.environ["NCPVAE_TEST_KERNELS"].split(os.pathsep):
    torch.ops.load_library(library)


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if "device" in item.fixturenames]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
