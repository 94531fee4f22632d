"""The public ops, as functions of tensors. Each docstring is the op's contract.

What holds for all of them: a tensor is dense, not sparse, and no view that negates as it is read
(:meth:`torch.Tensor.is_neg`); an integer option is less than 2**31 and no bool, and may be one of
NumPy's; ``out`` shares no element with an argument, itself included, but where its op allows it.
What is not allowed is refused before anything is written, by an error that begins with the op's
name and names the argument.
"""

from cvkernels.ops.avg_pool.op import avg_pool
from cvkernels.ops.batch_norm_act.op import batch_norm_act
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.conv_bn_act.op import conv_bn_act
from cvkernels.ops.dense_concat.op import dense_concat
from cvkernels.ops.depthwise_conv_bn_act.op import depthwise_conv_bn_act
from cvkernels.ops.max_pool.op import max_pool
from cvkernels.ops.squeeze_excite.excite import excite
from cvkernels.ops.squeeze_excite.op import squeeze_excite
from cvkernels.ops.squeeze_excite.scale import se_scale
from cvkernels.ops.squeeze_excite.squeeze import squeeze

__all__ = [
    "BatchNormParams",
    "DerivedWeights",
    "avg_pool",
    "batch_norm_act",
    "conv_bn_act",
    "dense_concat",
    "depthwise_conv_bn_act",
    "excite",
    "max_pool",
    "se_scale",
    "squeeze",
    "squeeze_excite",
]
