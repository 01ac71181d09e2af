"""Every test starts from one thread and one seed, and leaves no global state behind."""

import logging
import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist


def pytest_configure(config):
    if config.pluginmanager.hasplugin("randomly"):
        config.option.randomly_reset_seed = False  # it would undo the seeds of the fixture below


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    loud = logging.getLogger("lightning.pytorch").level  # the examples' comparisons turn it down
    # a distributed Trainer and examples set variables in this process; one started later would take them for its own
    environment = dict(os.environ)
    yield
    logging.getLogger("lightning.pytorch").setLevel(loud)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    torch.set_default_dtype(torch.float32)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
