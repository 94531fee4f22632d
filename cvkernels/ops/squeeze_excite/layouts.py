"""The former home of what :mod:`cvkernels.ops.common.layout` holds."""

from cvkernels.ops.common.layout import fits, fitting, is_nhwc, new_like, pixel_stride
from cvkernels.ops.squeeze_excite.native import matrices

__all__ = ["fits", "fitting", "is_nhwc", "matrices", "new_like", "pixel_stride"]
