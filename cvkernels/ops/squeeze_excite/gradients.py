"""The former home of the gradients in :mod:`.reference`."""

from cvkernels.ops.squeeze_excite.reference import (
    excite_backward,
    se_scale_backward,
    squeeze_excite_backward,
)

__all__ = ["excite_backward", "se_scale_backward", "squeeze_excite_backward"]
