"""Training that keeps convolution outputs alone; what stands between two of them is redone.

``act(bn(conv(x)))`` in training saves the convolution's output ``y`` and its batch statistics; the
normalised map is computed again from them in backward, as in Gruslys et al. 2016, arXiv:1606.03401,
and Pleiss et al. 2017, arXiv:1707.06990. The next convolution's input is then such a map, one that
squeeze-and-excitation scaled, a concatenation or a max pool of such, and is not saved either:
whoever computes the map leaves a :class:`Recipe` on the tensor, and a consumer that finds it saves
what it names, tensors that are saved anyway. Without a recipe (the image, a module of somebody else
in between, a map that was changed in place) the input is saved as usual. The maps along the
shortcuts of a stage are computed again one from the other, from where the shortcut has a
convolution of its own.

Each map is computed again once: the first to need it in backward keeps it for the others, and the
function that computed it in forward, which is behind them all in backward, lets it go. Statistics
are computed, and running ones updated, in forward alone.

Derivatives of derivatives are refused by name; several threads may not run backward through one
graph at once.
"""
