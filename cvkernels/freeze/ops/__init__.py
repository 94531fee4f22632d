"""The ops of a frozen model's graph and of its plans: one class each, which holds all about it.

A graph has the ops below. Lowering replaces some of them by others, which only plans have::

    op                  inputs
    input
    conv                x; residual, gate and output_gate where ``roles`` names them
    affine, act         x
    add, mul            a, b
    cat                 parts, along the channels
    part                x, of which it takes some channels
    pad, pad_same       x
    max_pool, avg_pool  x
    mean                x
    se                  x; residual where ``roles`` names it
    sums                a conv with ``squeeze``
    squeeze             x
    excite              sums or squeeze
    linear, flatten     x
    call                the values that its arguments refer to

and in int8 those of :mod:`cvkernels.freeze.ops.quantised`.
"""

from cvkernels.freeze.graph import Op
from cvkernels.freeze.ops.convolution import Conv, ConvPool, Depthwise, PlannedConv, Scratch, Sums
from cvkernels.freeze.ops.elementwise import Act, Add, Affine, Copy, Linear, Mul
from cvkernels.freeze.ops.pooling import AvgPool, MaxPool, Mean
from cvkernels.freeze.ops.quantised import (
    Dequantise,
    Quantise,
    QuantisedAvgPool,
    QuantisedConv,
    QuantisedDepthwise,
    QuantisedMaxPool,
    QuantisedMean,
    QuantisedSqueeze,
)
from cvkernels.freeze.ops.squeeze_excite import Excite, Scale, Squeeze, SqueezeExcite
from cvkernels.freeze.ops.structure import (
    Buffer,
    Call,
    Cat,
    Concat,
    Flatten,
    Input,
    Pad,
    Part,
    SamePad,
)

GRAPH_OPS: dict[str, type[Op]] = {
    op.name: op
    for op in (
        Input, Conv, Affine, Act, Add, Mul, Cat, Part, Pad, SamePad, MaxPool, AvgPool, Mean,
        SqueezeExcite, Sums, Squeeze, Excite, Linear, Flatten, Call, Quantise, Dequantise,
        QuantisedConv, QuantisedDepthwise, QuantisedMaxPool, QuantisedAvgPool, QuantisedMean,
        QuantisedSqueeze,
    )
}  # fmt: skip
PLAN_OPS = (PlannedConv, Scratch, ConvPool, Depthwise, Scale, Copy, Concat, Buffer)
