import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder():
    """The folder of real data sets, where the environment names one."""
    folder = os.environ.get("NCPVAE_DATA")
    if not folder:
        pytest.skip("NCPVAE_DATA is not set")
    return folder
