"""``freeze``: a trained model as one planned sequence of kernels, for deployment."""
