"""What random networks are made of: modules and calls from and to maps [N, 8, H, W].

Each is written as people write such parts around the networks' blocks, and torch.fx can trace it,
but for what decides by the data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODULES = (
    lambda: nn.Conv2d(8, 8, 3, padding=1), lambda: nn.Conv2d(8, 8, 1), lambda: nn.BatchNorm2d(8),
    lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), lambda: nn.ReLU(True), nn.ReLU, nn.Sigmoid,
    lambda: nn.SiLU(True), lambda: nn.Hardswish(True), nn.Identity, nn.Dropout,
    lambda: nn.MaxPool2d(3, 1, 1), lambda: nn.AvgPool2d(3, 1, 1),
)  # fmt: skip
RARER_MODULES = (
    lambda: nn.Conv2d(8, 8, 3, padding="same", dilation=2, padding_mode="reflect"),
    lambda: nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=2),
    lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False),
    lambda: nn.ConvTranspose2d(8, 8, 3, padding=1), lambda: nn.ConvTranspose2d(8, 8, 1, groups=2),
    lambda: nn.BatchNorm2d(8, affine=False), lambda: nn.BatchNorm2d(8, track_running_stats=False),
    lambda: nn.GroupNorm(4, 8), lambda: nn.InstanceNorm2d(8, affine=True),
    lambda: nn.InstanceNorm2d(8, track_running_stats=True), lambda: nn.LocalResponseNorm(3),
    nn.GELU, lambda: nn.GELU("tanh"), nn.Hardtanh, lambda: nn.LeakyReLU(0.1), nn.Mish, nn.ReLU6,
    lambda: nn.PReLU(8), nn.PReLU, lambda: nn.ELU(0.5), nn.Tanh, nn.Hardsigmoid, nn.Softplus,
    lambda: nn.Softmax(1), nn.Softmax2d, lambda: nn.Dropout2d(0.2), lambda: nn.ChannelShuffle(2),
    lambda: nn.Sequential(nn.PixelShuffle(2), nn.ReLU(), nn.PixelUnshuffle(2)),
    lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3)),
    lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.MaxPool2d(2, 1)),
    lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.AvgPool2d(2)),
    lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.MaxPool2d(3, 2, 1)),
    lambda: nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, 1, 1, dilation=2)),
    lambda: nn.AvgPool2d(3, 1, 1, False, False),
    lambda: nn.AvgPool2d(3, 1, 1, divisor_override=5), lambda: nn.LPPool2d(2, 1),
    lambda: nn.Sequential(nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)), nn.Sequential(
        nn.ReLU(), nn.Sequential(nn.Conv2d(16, 8, 3, padding=1)), nn.Identity()
    )),
)  # fmt: skip


class Decides(nn.Module):
    """Decides by the data, so that torch.fx cannot see through it; may write what it is given."""

    def __init__(self, writes: bool, flips: bool) -> None:
        super().__init__()
        self.conv, self.writes, self.flips = nn.Conv2d(8, 8, 1), writes, flips

    def forward(self, x):
        if x.sum() > -1e30 and self.writes:
            x.mul_(0.5)
        return x.flip(1) if self.flips else F.relu(self.conv(x))


# Beside MODULES, in a network of blocks that writes in place and in one that does not.
WRITING = tuple(lambda flips=flips: Decides(True, flips) for flips in (False, True))
DECIDING = tuple(lambda flips=flips: Decides(False, flips) for flips in (False, True))


class SqueezeExcite(nn.Module):
    """By linear layers on a vector, or by convolutions of one pixel."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        layer = nn.Linear if linear else lambda *widths: nn.Conv2d(*widths, 1)
        self.reduce, self.expand, self.linear = layer(8, 4), layer(4, 8), linear

    def forward(self, x):
        gate = F.adaptive_avg_pool2d(x, 1)
        gate = gate.view(x.size(0), -1) if self.linear else gate
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(gate))))
        return x * (gate[:, :, None, None] if self.linear else gate)


class EfficientChannelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv(x.mean((2, 3)).unsqueeze(-1).transpose(-1, -2))
        return x * y.transpose(-1, -2).unsqueeze(-1).sigmoid().expand_as(x)


class ChannelAndSpatialAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, 8, 1))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        most = self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * (self.mlp(F.adaptive_avg_pool2d(x, 1)) + most).sigmoid()
        maps = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], dim=1)
        return x * self.spatial(maps).sigmoid()


class Attention(nn.Module):
    """Over the pixels of a map."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.project, self.fused = nn.Linear(8, 24), nn.Linear(8, 8), fused

    def forward(self, x):
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(b, h * w, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q @ k.transpose(-2, -1)) * 0.5).softmax(dim=-1) @ v
        tokens = tokens + self.project(mixed.transpose(1, 2).reshape(b, h * w, c))
        return tokens.transpose(1, 2).view(b, c, h, w)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.gamma = nn.Parameter(torch.rand(8))

    def forward(self, x):
        y = self.gamma * self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


class CalledTwice(nn.Module):
    """One convolution and norm, on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        return self.layer(self.layer(x) + x)


class Named(nn.Module):
    """Returns a dict of maps, of which its caller takes some."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, scale: float = 1.0, *, flips: bool = False):
        right = self.right(x) * scale
        return {"left": self.left(x), "both": (right.flip(2) if flips else right, [x])}


class OfNamed(nn.Module):
    """Calls by keyword, and leaves default arguments out."""

    def __init__(self, flips: bool) -> None:
        super().__init__()
        self.named, self.flips = Named(), flips

    def forward(self, x):
        found = self.named(x, flips=True) if self.flips else self.named(x=x, scale=0.5)
        right, (same,) = found["both"]
        return found["left"] + right - same


class WeightedSum(nn.Module):
    """As of a feature pyramid: positive weights that are learned, and of sum one."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.rand(3))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.register_buffer("mask", torch.rand(1, 8, 1, 1) > 0.3)

    def forward(self, x):
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + 1e-3)
        maps = [x, *(conv(x) for conv in self.convs)]
        y = sum(weight * each for weight, each in zip(weights.unbind(0), maps, strict=True))
        return torch.where(self.mask, y, x)


class OfRows(nn.Module):
    """One-dimensional layers on flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x.flatten(2)))).reshape_as(x)


class Branches(nn.Module):
    """Like an Inception block, its dropped paths scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.wide = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.norm, self.scale = nn.BatchNorm2d(8), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        y = self.norm(torch.cat((self.point(x), self.wide(F.relu(x))), dim=1))
        if self.training:
            keep = torch.rand(x.size(0), 1, 1, 1, dtype=x.dtype, device=x.device) > 0.2
            y = y * keep.to(x.dtype) / 0.8
        return torch.add(x, y * self.scale, alpha=0.7)


PARTS = (
    lambda: SqueezeExcite(True), lambda: SqueezeExcite(False), EfficientChannelAttention,
    ChannelAndSpatialAttention, lambda: Attention(True), lambda: Attention(False), ConvNeXt,
    CalledTwice, lambda: OfNamed(True), lambda: OfNamed(False), WeightedSum, OfRows, Branches,
)  # fmt: skip


def _write_a_chunk(f, which):
    parts = f.chunk(2, 1) if which % 2 else f.split([3, 5], 1)
    parts[which // 2].mul_(3)


def _view_and_back(f, which):
    b, c, h, w = f.shape
    if which == 0:
        return f.reshape(b, c, h * w).reshape(b, c, h, w)
    if which == 1:
        return f.flatten(2).relu_().view(b, c, h, -1)
    if which == 2:
        return f.transpose(2, 3).mul_(2).transpose(2, 3)
    return f.permute(0, 2, 3, 1).mul(2).permute(0, 3, 1, 2)


def _iadd(f, g, net):
    f += g
    return f


def _isub(f, g, net):
    f -= g * 0.3
    return f


def _imul(f, g, net):
    f *= net.scale
    return f


# What makes a map of two, f and g; of one as a case of that.
MAPS = (
    _iadd, _isub, _imul,
    lambda f, g, net: f.add_(g, alpha=0.5),
    lambda f, g, net: torch.cat(f.chunk(2, 1)[::-1], 1),
    lambda f, g, net: torch.cat((f.chunk(2, 1)[0], g[:, 4:]), 1),
    lambda f, g, net: torch.stack((f, g), 1).sum(1),
    lambda f, g, net: torch.stack(f.chunk(2, 1), 2).flatten(1, 2),
    lambda f, g, net: torch.stack((f, g)).mean(0),
    lambda f, g, net: torch.cat((f, g), 1)[:, 4:12],
    lambda f, g, net: f + g,
    lambda f, g, net: f * g,
    lambda f, g, net: f - g * net.scale,
    lambda f, g, net: 2 - f,
    lambda f, g, net: f / f.size(1),
    lambda f, g, net: f * torch.sigmoid(f.mean((2, 3), keepdim=True)),
    lambda f, g, net: f * f.mean(1, keepdim=True),
    lambda f, g, net: f * F.adaptive_avg_pool2d(g, 1).sigmoid(),
    lambda f, g, net: f * f.mean(3, keepdim=True).mean(2, keepdim=True),
    lambda f, g, net: f,
    lambda f, g, net: f.view_as(g),
    lambda f, g, net: f.detach(),
    lambda f, g, net: f[:],
    lambda f, g, net: F.max_pool2d(f, 3, 1, 1),
    lambda f, g, net: F.avg_pool2d(f, 3, 1, 1),
    lambda f, g, net: F.interpolate(F.avg_pool2d(f, 2), size=g.shape[2:]),
    lambda f, g, net: F.pad(F.max_pool2d(f, 3, 1), (1, 1, 1, 1)),
    lambda f, g, net: F.dropout(f, 0.3, net.training),
    *(lambda f, g, net, which=which: _view_and_back(f, which) for which in range(4)),
)  # fmt: skip
IN_PLACE = MAPS[:4]
OF_A_LAYOUT = (MAPS[-5], MAPS[-4], MAPS[-3])


def _resized(f: Tensor, **how) -> Tensor:
    return F.interpolate(F.adaptive_avg_pool2d(f, (3, 2)), size=f.shape[-2:], **how)


RARER_MAPS = (
    lambda f, g, net: torch.stack(f.unbind(1)[::-1], 1),
    lambda f, g, net: torch.cat([f.narrow(1, 2, 4), g.narrow(1, 0, 4)], 1),
    lambda f, g, net: torch.cat(f.split((3, 3, 2), dim=1)[::-1], 1),
    lambda f, g, net: torch.concat(f.tensor_split((2, 5), 1)[::-1], 1),
    lambda f, g, net: f.roll(1, 3) + f.roll((1, 2), (2, 3)),
    lambda f, g, net: f.flip(2),
    lambda f, g, net: f.mean(1, keepdim=True).expand_as(g) - g,
    lambda f, g, net: f[:, :1].expand(-1, 8, -1, -1),
    lambda f, g, net: f[:, ::2].repeat(1, 2, 1, 1),
    lambda f, g, net: f[:, 1:3].repeat_interleave(4, 1),
    lambda f, g, net: f.index_select(1, net.order),
    lambda f, g, net: f[:, net.order],
    lambda f, g, net: torch.gather(f, 1, net.order.view(1, 8, 1, 1).expand_as(f)),
    lambda f, g, net: torch.where(f > 0, f, f * 0.1),
    lambda f, g, net: f.masked_fill(f < 0, 0),
    lambda f, g, net: f.softmax(1),
    lambda f, g, net: F.log_softmax(f, dim=1) * 0.1,
    lambda f, g, net: torch.softmax(f.flatten(2), -1).view_as(f) * g,
    lambda f, g, net: torch.einsum("nchw,kc->nkhw", f, net.matrix),
    lambda f, g, net: torch.matmul(net.matrix, f.flatten(2)).view(f.shape),
    lambda f, g, net: torch.baddbmm(
        f.flatten(2), net.matrix.expand(f.size(0), -1, -1), g.flatten(2)
    ).reshape_as(f),
    lambda f, g, net: F.unfold(f, 3, padding=1).view(f.size(0), 8, 9, *f.shape[2:]).mean(2),
    lambda f, g, net: F.pixel_unshuffle(F.pixel_shuffle(f, 2).neg(), 2),
    lambda f, g, net: F.group_norm(f, 2, net.slope, net.slope),
    lambda f, g, net: F.layer_norm(f, f.shape[1:]),
    lambda f, g, net: F.instance_norm(f),
    lambda f, g, net: F.batch_norm(f, net.slope, net.slope, eps=0.1),
    lambda f, g, net: F.gelu(f, approximate="tanh"),
    lambda f, g, net: F.hardtanh(f, -0.5, 2.0),
    lambda f, g, net: F.leaky_relu(f, 0.2),
    lambda f, g, net: F.prelu(f, net.slope),
    lambda f, g, net: f.clamp(-1, 1) + f.clamp_min(0.5),
    lambda f, g, net: f.abs().add(1).log(),
    lambda f, g, net: f.square().add(0.1).rsqrt(),
    lambda f, g, net: torch.maximum(f, g) - torch.minimum(f, g),
    lambda f, g, net: torch.lerp(f, g, 0.3),
    lambda f, g, net: torch.addcmul(f, g, net.scale, value=0.5),
    lambda f, g, net: torch.sub(f, g, alpha=0.5),
    lambda f, g, net: torch.mul(input=f, other=g.sigmoid()),
    lambda f, g, net: torch.rsub(f, 1.5),
    lambda f, g, net: F.normalize(f, dim=1),
    lambda f, g, net: f.cumsum(1) * 0.2,
    lambda f, g, net: f.sort(1).values,
    lambda f, g, net: torch.cat([f.topk(3, 1).values, g.topk(5, 1, largest=False)[0]], 1),
    lambda f, g, net: _resized(f),
    lambda f, g, net: _resized(f, mode="bilinear", align_corners=False),
    lambda f, g, net: _resized(f, mode="bicubic", align_corners=True),
    lambda f, g, net: _resized(f, mode="nearest-exact"),
    lambda f, g, net: F.interpolate(F.adaptive_max_pool2d(f, 2), f.shape[2:], mode="area"),
    lambda f, g, net: F.avg_pool2d(F.interpolate(f, scale_factor=2.0, mode="bilinear"), 2),
    lambda f, g, net: F.conv2d(f, net.taps, padding=1),
    lambda f, g, net: F.conv2d(f, net.taps[:, :4], net.slope, padding="same", groups=2),
    lambda f, g, net: F.conv2d(f, net.taps[:, :1], stride=1, padding=1, groups=8),
    lambda f, g, net: F.conv_transpose2d(f, net.taps, padding=1),
    lambda f, g, net: F.linear(f.movedim(1, -1), net.matrix, net.slope).movedim(-1, 1),
    lambda f, g, net: f.to(g.dtype).type_as(net.scale).contiguous(),
    lambda f, g, net: f.contiguous(memory_format=torch.channels_last) + g.clone(),
    lambda f, g, net: f.unsqueeze(2).squeeze(2),
    lambda f, g, net: f.view(f.size(0), 2, 4, *f.shape[2:]).transpose(1, 2).reshape(g.shape),
    lambda f, g, net: f.unflatten(1, (2, 4)).amax(1).repeat(1, 2, 1, 1),
    lambda f, g, net: f.reshape(f.shape[0], -1).reshape(f.shape),
    lambda f, g, net: f - f.max(1, keepdim=True).values,
    lambda f, g, net: (f - f.mean((2, 3), True)) / (f.var((2, 3), keepdim=True) + 1e-1).sqrt(),
    lambda f, g, net: f + torch.ones_like(g) + f.new_zeros(f.shape),
    lambda f, g, net: f + torch.arange(f.size(3), dtype=f.dtype, device=f.device) / 8,
    lambda f, g, net: f + torch.linspace(-1, 1, f.shape[2]).to(f)[:, None],
    lambda f, g, net: f * net.gamma + net.gamma.sigmoid(),
    lambda f, g, net: f * (1 + 0.1 * f.shape[0]) - f.numel() / 1e4,
    lambda f, g, net: F.dropout2d(f, 0.3, training=net.training),
    lambda f, g, net: torch.bmm(f.flatten(0, 1), g.flatten(0, 1).mT @ f.flatten(0, 1)).view_as(f),
    lambda f, g, net: F.glu(torch.cat((f, g), 1), dim=1),
    lambda f, g, net: F.softplus(f) * F.mish(g) - F.celu(f) * F.softsign(g),
)  # fmt: skip
# What writes f and makes no map.
WRITES = (
    lambda f, g: f.mul_(0.7),
    lambda f, g: f.div_(2),
    lambda f, g: f.copy_(g * 0.5),
    lambda f, g: F.relu(f, inplace=True),
    lambda f, g: f.clamp_(-1, 1),
    lambda f, g: f.sigmoid_(),
    lambda f, g: f[:, 3].mul_(2),
    lambda f, g: f[:, 2:5].relu_(),
    lambda f, g: f[0].add_(1),
    lambda f, g: f[..., 0].zero_(),
    *(lambda f, g, which=which: _write_a_chunk(f, which) for which in range(4)),
)
RARER_WRITES = (
    lambda f, g: f.masked_fill_(f < 0, 0.0),
    lambda f, g: f[:, ::2].mul_(0.5),
    lambda f, g: f.select(1, 2).zero_(),
    lambda f, g: f.narrow(1, 0, 2).copy_(g.narrow(1, 4, 2)),
    lambda f, g: f.unbind(1)[2].mul_(2),
    lambda f, g: f.transpose(2, 3).add_(1),
    lambda f, g: f.unsqueeze(0).mul_(0.8),
    lambda f, g: f.view(-1).mul_(0.5),
    lambda f, g: f.permute(0, 2, 3, 1)[..., 1:].add_(0.1),
    lambda f, g: F.leaky_relu_(f, 0.1),
    lambda f, g: F.hardtanh_(f),
    lambda f, g: F.silu(f, inplace=True),
    lambda f, g: F.relu6(f, True),
    lambda f, g: torch.relu_(f),
    lambda f, g: f.lerp_(g, 0.3),
    lambda f, g: f.addcmul_(g, g, value=0.1),
    lambda f, g: f.neg_().tanh_(),
    lambda f, g: torch.add(f, g, out=f),
    lambda f, g: f.movedim(1, 3).select(3, 0).fill_(0.5),
    lambda f, g: f.unflatten(1, (2, 4))[:, 1].sub_(0.2),
    lambda f, g: f.expand(2, *f.shape)[0].mul_(0.9),
)
RESULTS = (
    lambda f: f.mean(1),
    lambda f: f.mean(3).mean(2),
    lambda f: f.mean([2, 3]),
    lambda f: f.flatten(2).mean(-1),
    lambda f: F.avg_pool2d(f, f.size()[2:]),
    lambda f: F.max_pool2d(f, (f.size(2), f.size(3))).flatten(1),
    lambda f: f.amax((2, 3)),
    lambda f: f.clamp(min=1e-6).pow(3).mean((-2, -1)).pow(1 / 3),
)
RARER_RESULTS = (
    lambda f: f.softmax(1).mean((2, 3)),
    lambda f: f.std((2, 3)),
    lambda f: torch.einsum("nchw->nc", f),
    lambda f: f.flatten(1).norm(dim=1, keepdim=True),
    lambda f: F.adaptive_avg_pool2d(f, (2, 2)).flatten(1),
    lambda f: F.adaptive_avg_pool2d(f, (1, None))[:, :, 0].sum(-1),
    lambda f: F.adaptive_max_pool2d(f, 1)[..., 0, 0],
    lambda f: f.max(3)[0].max(dim=2).values,
    lambda f: f.logsumexp((2, 3)),
    lambda f: f.view(f.size(0), -1)[:, :5],
    lambda f: {"mean": f.mean(1), "parts": (f.sum(), [f[:, 0], f[-1:]])},
    lambda f: f.topk(2, dim=1),
    lambda f: torch.flatten(torch.sum(f, dim=(2, 3), keepdim=True), 1),
    lambda f: F.log_softmax(f.mean((2, 3)), -1),
)
