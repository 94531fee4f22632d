"""Training that saves convolution outputs alone and recomputes what stands between two of them.

``act(bn(conv(x)))`` in training saves the convolution's output ``y`` and its batch statistics; the
normalised map is computed again from them in backward, as in Gruslys et al. 2016, arXiv:1606.03401,
and Pleiss et al. 2017, arXiv:1707.06990. The next convolution's input is then such a map, one that
squeeze-and-excitation scaled, a concatenation or a max pool of such, and is not saved either: the
function that makes the map attaches a :class:`~.recompute.Recompute` to the tensor, and a consumer
that finds it saves the tensors that it names, which are saved anyway. Where there is none (the
image, the output of another library's module, a map that was changed in place) the input is saved
as usual. The maps along the shortcuts of a stage are computed one from the other, from the last
shortcut that has a convolution.

Each map is recomputed once: the first consumer to need it in backward keeps it for the others, and
the function that computed it in forward, whose backward comes after all of theirs, drops it.
Statistics are computed, and running ones updated, in forward alone.

A backward pass under ``create_graph=True``, or of a batch of gradients, computes each block again
by stock operations, which autograd differentiates: see :mod:`.place`. Several threads may not run
backward through one graph at once.
"""
