"""The public ops, as functions of tensors. Each docstring is the op's contract."""

from cvkernels.ops.avg_pool.op import avg_pool
from cvkernels.ops.conv_bn_act import registration as _conv_bn_act  # noqa: F401 - registers the op
from cvkernels.ops.conv_bn_act.folding import DerivedWeights
from cvkernels.ops.conv_bn_act.op import conv_bn_act
from cvkernels.ops.conv_bn_act.reference import BatchNormParams
from cvkernels.ops.dense_concat.op import dense_concat
from cvkernels.ops.max_pool.op import max_pool

__all__ = [
    "BatchNormParams",
    "DerivedWeights",
    "avg_pool",
    "conv_bn_act",
    "dense_concat",
    "max_pool",
]
