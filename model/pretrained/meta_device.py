"""Build a model before its weights are read: shapes without memory, and without initial values."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


class SkipInitialisation(TorchFunctionMode):
    """Functions of torch.nn.init leave their tensor as it is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@contextmanager
def meta_device():
    """Modules that are built inside stand on the meta device.

    On torch.device("meta") alone the random initial values, which nobody needs, make PyTorch load
    its compiler: seconds before the first word of an answer.
    """
    with torch.device("meta"), SkipInitialisation():
        yield
