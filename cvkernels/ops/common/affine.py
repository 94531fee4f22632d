"""The former home of what :mod:`.norm` holds."""

from cvkernels.ops.common.norm import ARGUMENTS, NO_VECTORS, vectors_of

__all__ = ["ARGUMENTS", "NO_VECTORS", "vectors_of"]
