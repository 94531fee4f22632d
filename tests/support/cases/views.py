"""Views of an image of 48 channels and about 11 x 12 pixels, of every kind of strides."""

STRIDED = {
    "channel-slice": lambda x: x[:, 8:40],
    "unaligned-channel-slice": lambda x: x[:, 3:36],
    "every-second-channel": lambda x: x[:, ::2],
    "window-of-an-image": lambda x: x[:, :, 2:9, 1:8],
    "every-second-column": lambda x: x[:, :, :, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded-batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded-channels": lambda x: x[:, :1].expand(-1, 16, -1, -1),
    "expanded-pixels": lambda x: x[:, :, :1, :1].expand(-1, -1, 4, 4),
}
