"""What an op raises for a tensor that PyTorch's own operator refuses with a RuntimeError.

So code around a network that catches RuntimeError keeps working when the network's ops are fused.
"""


class InputValueError(ValueError, RuntimeError):
    """A tensor's shape or device does not fit."""


class InputTypeError(TypeError, RuntimeError):
    """A tensor's dtype does not fit."""
