"""The former home of what :mod:`.norm` holds."""

from cvkernels.ops.common.autograd import needs_grad  # noqa: F401
from cvkernels.ops.common.norm import ARGUMENTS, NO_VECTORS, BatchNormParams, vectors_of

__all__ = ["ARGUMENTS", "NO_VECTORS", "vectors_of"]


def vector_bytes(bn: BatchNormParams | None) -> int:
    vectors = () if bn is None else bn[:4]
    return sum(v.numel() * v.element_size() for v in vectors if v is not None)
