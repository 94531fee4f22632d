"""Training residual blocks: stock's gradients and statistics, convolution outputs alone kept."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cvkernels
from cvkernels import backend
from cvkernels.nn import Bottleneck, SqueezeExcitation
from cvkernels.nn.fused.module import FusedModule
from cvkernels.nn.training import recompute
from tests.support.autograd_memory import megabytes_per_image
from tests.support.inception_training_checks import is_recomputed
from tests.support.numerics import assert_close_as_eager, max_error
from tests.support.pairs import assert_equal, loss_of, step
from tests.support.residual_training_checks import NETWORKS, image, residual_pair


def seeded(model):
    def run(x):
        torch.manual_seed(5)
        return model(x)

    return run


def block_maps(model, x):
    """What the blocks and sequences of a model return, by their names."""
    maps = {}

    def keep(module, args, y):
        maps[names[module]] = y

    names = {module: name for name, module in model.named_modules() if blocklike(module)}
    handles = [module.register_forward_hook(keep) for module in names]
    model(x)
    for handle in handles:
        handle.remove()
    return maps


def blocklike(module):
    """Whether it is no part that a block fuses with others, which a hook would forbid."""
    return type(module).__module__.startswith("cvkernels.nn") or type(module) is nn.Sequential


# What is computed


@pytest.mark.parametrize("name", NETWORKS)
def test_three_optimiser_steps_match_stock(name, memory_format):
    results = []
    for model in residual_pair(name):
        optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        x = image().contiguous(memory_format=memory_format)
        for _ in range(3):
            results.append(step(model, x, run=seeded(model)))
            optimiser.step()
        results[-1] += [p.detach() for p in model.parameters()]
    for ours, stock in zip(results[:3], results[3:], strict=True):
        assert_equal(ours, stock, 1e-7)


class Unit(FusedModule):
    """``act(se(bn(conv(x))) + shortcut)``, the parts that there are."""

    def __init__(self, act, adds, excites, conv):
        super().__init__()
        self.conv, self.bn, self.act = conv, nn.BatchNorm2d(24), act
        self.se = SqueezeExcitation(24, 6) if excites else None
        self.adds = adds

    def forward(self, x, shortcut):
        residual = shortcut if self.adds else None
        if self.se is None:
            return self.fused(x, self.conv, self.bn, self.act, residual=residual)
        y = self.fused(x, self.conv, self.bn)
        if not self.adds:
            return self.se(y)
        if self.se.why_not_added(y, self.act):
            return self.act(self.se(y) + shortcut)
        return self.se.added_step(y, shortcut, self.act, False, False).run(y, shortcut)


UNITS = {
    "none": (None, False, False),
    "relu": (nn.ReLU(), False, False),
    "silu": (nn.SiLU(), False, False),
    "none-added": (None, True, False),
    "relu-added": (nn.ReLU(), True, False),
    "se": (None, False, True),
    "se-relu-added": (nn.ReLU(), True, True),
}
# Without a bias: behind it a norm takes the mean, and its gradient is zero but for rounding.
CONVOLUTIONS = {
    "1x1": lambda: nn.Conv2d(24, 24, 1, bias=False),
    "3x3": lambda: nn.Conv2d(24, 24, 3, padding=1, bias=False),
    "depthwise": lambda: nn.Conv2d(24, 24, 5, padding=2, groups=24, bias=False),
    "grouped": lambda: nn.Conv2d(24, 24, 3, padding=1, groups=4, bias=False),
}


@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS.keys())
def test_gradients_follow_the_numerics_rule(unit, dtype, conv, device, memory_format):
    ours = Unit(*unit, conv()).to(device, dtype)
    with torch.no_grad():
        ours.bn.weight.uniform_(0.2, 1.5)
        ours.bn.bias.normal_(0, 0.3)
    x, shortcut = torch.randn(2, 4, 24, 9, 7, device=device).to(dtype)
    x, shortcut = (t.contiguous(memory_format=memory_format) for t in (x, shortcut))
    cotangent = torch.randn(x.shape, device=device)
    if isinstance(ours.act, nn.ReLU):
        # None for what a rounding may keep from passing, or let pass.
        smooth = copy.deepcopy(ours).double()
        smooth.act = nn.Identity()
        with backend.use("reference"):
            cotangent *= smooth(x.double(), shortcut.double()).abs() > 0.1

    def gradients(unit, *inputs):
        unit.zero_grad()
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = unit(*inputs)
        y.backward(cotangent.to(y.dtype))
        return [y.detach(), *(t.grad for t in (*inputs[: 1 + unit.adds], *unit.parameters()))]

    actual = gradients(ours, x, shortcut)
    with backend.use("reference"):
        exact = gradients(copy.deepcopy(ours).double(), x.double(), shortcut.double())
        # Ours are channels_last within; stock's error is the larger of its two layouts'.
        planar, pixels = (
            gradients(ours, *(t.contiguous(memory_format=layout) for t in (x, shortcut)))
            for layout in (torch.contiguous_format, torch.channels_last)
        )
    for a, *eager, truth in zip(actual, planar, pixels, exact, strict=True):
        assert_close_as_eager(a, max(eager, key=lambda e: max_error(e, truth)), truth)


@pytest.mark.parametrize("name", ["bottleneck", "se-bottleneck", "legacy", "mbconv", "timm-mbconv"])
def test_what_is_recomputed_is_bit_equal(name):
    ours, _ = residual_pair(name, torch.float32)
    maps = block_maps(ours, image(dtype=torch.float32)).values()
    maps = [y for y in maps if isinstance(y, torch.Tensor) and recompute.recompute_of(y)]
    assert len(maps) >= 3
    for y in maps:
        how = y._cvkernels_recompute
        assert torch.equal(how.node.value(how.saved), y)


@pytest.mark.parametrize("name", ["bottleneck", "se-bottleneck", "mbconv"])
def test_autocast_matches_stock(name):
    ours, stock = residual_pair(name, torch.float32)
    x = image(dtype=torch.float32)

    def run(model):
        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x).float()

        return step(model, x, run=forward)

    results = [run(ours), run(stock), step(copy.deepcopy(stock).double(), x.double())]
    # Through a whole network rounding is amplified: the gradients as one vector, by its length.
    for kinds in ([0], range(1, len(list(ours.parameters())) + 2)):
        actual, eager, truth = (
            torch.cat([r[i].double().flatten() for i in kinds]) for r in results
        )
        assert (actual - truth).norm() <= 2 * (eager - truth).norm()


FROZEN = {
    "stem": ["conv1", "bn1"],
    "stages": ["conv1", "bn1", "layer1", "layer2"],
    "shortcuts": ["layer2.0.downsample", "layer3.0.downsample"],
    "ends": ["layer1.1.conv3", "layer1.1.bn3", "layer2.1.bn3"],
    "norms": ["layer1.0.bn1", "layer1.1.bn2", "layer2.0.bn2"],
    "excitation": ["layer1.1.se", "layer2.0.se"],
}


@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parts(names, evaluated):
    """Without gradients of their own, and with running statistics, as in fine-tuning."""
    ours, stock = residual_pair("se-bottleneck")
    for model in (ours, stock):
        for name in names:
            model.get_submodule(name).requires_grad_(False).train(not evaluated)
    x = image()
    assert_equal(step(ours, x), step(stock, x), 1e-9)
    results = []
    for model in (ours, stock):
        model.zero_grad()
        loss_of(model(x)).backward()
        results.append([p.grad for p in model.parameters()])
    assert_equal(*results, 1e-9)


def test_part_of_the_graph_and_several_backwards():
    results = []
    for model in residual_pair("bottleneck"):
        maps = block_maps(model, image().requires_grad_())
        first, second = maps["layer1"], maps["layer2"]
        (grad,) = torch.autograd.grad(second.square().sum(), first, retain_graph=True)
        weight = model.layer2[1].conv1.weight
        (alone,) = torch.autograd.grad(second.sum(), weight, retain_graph=True)
        loss = second.square().sum() + first.pow(3).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([grad, alone, *(p.grad for p in model.parameters())])
    assert_equal(*results, 1e-9)


# What is kept


@pytest.mark.parametrize("patched", [False, True], ids=["builder", "patched"])
@pytest.mark.parametrize(
    ("name", "most"),
    [("resnet18", 5.4), ("resnet50", 22.7), ("seresnet50", 22.8), ("efficientnet_b0", 14.4)],
)
def test_megabytes_per_image(name, most, patched):
    """Of 224 x 224 in bfloat16: the convolutions' outputs, and little else."""
    if patched and name == "seresnet50":
        model = pytest.importorskip("timm").create_model(name)
    else:
        library = pytest.importorskip("torchvision") if patched else cvkernels
        model = getattr(library.models, name)()
    if patched:
        cvkernels.patch(model)
    assert megabytes_per_image(model) <= most


def test_the_end_of_a_long_chain_is_kept():
    class Chain(nn.Sequential):
        def __init__(self):
            blocks = (Bottleneck(8, 2) for _ in range(80))
            first = Bottleneck(4, 2, downsample=cvkernels.nn.ConvBNAct(4, 8, 1))
            super().__init__(first, *blocks)

    torch.manual_seed(0)
    chain, x = Chain().double().train(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    counts = [
        len(y._cvkernels_recompute.saved) if is_recomputed(y) else None
        for y in block_outputs(chain, x)
    ]
    assert max(c for c in counts if c) <= recompute.MOST_SAVED + 2
    assert None not in counts and min(counts[1:]) < 6
    grads = []
    for name in ("auto", "reference"):
        with backend.use(name):
            leaf = x.clone().requires_grad_()
            chain(leaf).square().sum().backward()
            grads.append([leaf.grad, *(p.grad.clone() for p in chain.parameters())])
            chain.zero_grad()
    assert_equal(*grads, 1e-7)


def block_outputs(chain, x):
    for block in chain:
        x = block(x)
        yield x


@pytest.mark.parametrize("name", ["bottleneck", "se-bottleneck", "mbconv"])
def test_maps_are_let_go_as_backward_passes(name, monkeypatch):
    ours, _ = residual_pair(name, torch.float32)
    nodes, value = [], recompute.RecomputeNode.value
    monkeypatch.setattr(
        recompute.RecomputeNode,
        "value",
        lambda node, leaves: nodes.append(node) or value(node, leaves),
    )
    loss_of(ours(image(dtype=torch.float32))).backward()
    assert nodes and not any(node._value for node in nodes)


# In others' hands


def test_hooks_that_change_an_output():
    def replace(module, args, out):
        return out * 1.5

    def in_place(module, args, out):
        out.mul_(0.5)

    for hook in (replace, in_place):
        ours, stock = residual_pair("bottleneck")
        for model in (ours, stock):
            model.layer1[0].register_forward_hook(replace)
            model.layer1.register_forward_hook(replace)
            model.layer2[0].bn2.register_forward_hook(replace)
        # Stock's ReLU in place keeps its output, and refuses a change of it.
        if hook is in_place:
            ours.layer1[1].register_forward_hook(hook)
            stock.layer1[1].register_forward_hook(lambda m, a, y: y * 0.5)
        x = image()
        assert_equal(step(ours, x), step(stock, x), 1e-9)


def registered_again(module):
    """What ``prune.remove`` and ``remove_parametrizations`` leave: the weight is the last one."""
    weight = module.weight
    del module.weight
    module.weight = weight


CHANGES = {
    "group-norm": lambda b: setattr(b, "bn3", nn.GroupNorm(4, 256)),
    "instance": lambda b: setattr(b, "bn2", nn.InstanceNorm2d(64, affine=True)),
    "gelu": lambda b: setattr(b, "relu", nn.GELU()),
    "hook": lambda b: b.conv2.register_forward_hook(lambda *_: None),
    "padding": lambda b: setattr(b.conv2, "padding_mode", "circular"),
    "bias": lambda b: setattr(b.conv3, "bias", nn.Parameter(torch.linspace(-1, 1, 256).double())),
    "stride": lambda b: setattr(b.conv2, "stride", 1),
    "dilation": lambda b: setattr(b.conv3, "dilation", [1, 1]),
    "weight-behind-bias": lambda b: registered_again(b.bn1),
    "weight-registered-again": lambda b: registered_again(b.conv1),
    "extra-parameter": lambda b: b.conv2.register_parameter("extra", nn.Parameter(torch.ones(1))),
    "forward": lambda b: setattr(
        b.conv2, "forward", lambda x, c=b.conv2: type(c).forward(c, x) * 2
    ),
    "no-running": lambda b: setattr(b, "bn3", nn.BatchNorm2d(256, track_running_stats=False)),
    "shortcut": lambda b: setattr(b, "downsample", nn.AvgPool2d(1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_other_blocks_match_stock(change):
    ours, stock = residual_pair("bottleneck")
    for model in (ours, stock):
        torch.manual_seed(1)
        change(model.layer1[1])
        model.double()
    x = image()
    assert_equal(step(ours, x), step(stock, x), 1e-8)


def test_a_shortcut_of_another_shape_or_dtype_is_stocks():
    """It is broadcast, or refused, as there."""
    ours, stock = residual_pair("bottleneck", torch.float32)
    for change in (nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=2)):
        blocks = [model.layer1[1] for model in (ours, stock)]
        x, results = torch.randn(2, 256, 6, 6), []
        for block in blocks:
            block.downsample = change
            try:
                results.append(block(x).detach())
            except RuntimeError as error:
                results.append(str(error).splitlines()[0])
        if isinstance(results[1], str):
            assert results[0] == results[1]
        else:
            torch.testing.assert_close(*results)


def test_second_derivatives_are_refused_by_name():
    ours, stock = residual_pair("se-bottleneck")
    x = image().requires_grad_()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*backend.use\('reference'\)"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    results = []
    for model in (ours, stock):
        with backend.use("reference"):
            (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x))
    assert_equal(*results, 1e-7)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
@pytest.mark.parametrize("name", ["bottleneck", "se-bottleneck"])
def test_checkpointed_stages(name, reentrant):
    results = []
    for model in residual_pair(name):

        def run(x, model=model):
            x = model.maxpool(torch.relu(model.bn1(model.conv1(x))))
            for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
                x = checkpoint(stage, x, use_reentrant=reentrant)
            return model.fc(x.mean((2, 3)))

        results.append(step(model, image(), run=run))
    assert_equal(*results, 1e-9)


def test_saved_tensors_may_lie_elsewhere():
    ours, stock = residual_pair("se-bottleneck")

    def run(x):
        with torch.autograd.graph.save_on_cpu():
            return ours(x)

    x = image()
    assert_equal(step(ours, x, run=run), step(stock, x), 1e-9)


def test_what_is_copied_when_saved_is_copied_about_once():
    """On the CPU, say: each block of a chain would keep the chain before it."""
    torch.manual_seed(0)
    blocks = [Bottleneck(16, 4) for _ in range(12)]
    chain, x = nn.Sequential(*blocks).train(), torch.randn(2, 16, 8, 8)
    sizes = []
    for name in ("auto", "reference"):
        packed = []
        hooks = torch.autograd.graph.save_on_cpu()
        pack = hooks.pack_hook

        def counted(tensor, packed=packed, pack=pack):
            packed.append(tensor.nbytes)
            return pack(tensor)

        counted.__qualname__ = pack.__qualname__
        hooks.pack_hook = counted
        with backend.use(name), hooks:
            chain(x)
        sizes.append(sum(packed))
    assert sizes[0] <= 1.1 * sizes[1]


def test_running_statistics_are_heard_of():
    block = Bottleneck(16, 4).train()
    before = block.bn1.running_mean._version, block.bn1.running_var._version
    block(torch.randn(2, 16, 8, 8))
    assert block.bn1.running_mean._version > before[0]
    assert block.bn1.running_var._version > before[1]


def test_data_parallel_training(tmp_path):
    ours, stock = residual_pair("mbconv")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped, x = nn.parallel.DistributedDataParallel(ours), image()
        assert_equal(step(ours, x, run=wrapped), step(stock, x), 1e-9)
    finally:
        torch.distributed.destroy_process_group()
