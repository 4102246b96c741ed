"""A block computes the same as its layers, also if users change the layers.

A block of unmodified layers runs in strips on large images; in these tests, on
all images. Each test changes something and compares the output of the block
with that of its layers, called one after the other.
"""

import copy
import inspect

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, parametrize, prune

from mmvvt.models import strips
from mmvvt.models.vvt import VVTBlock
from mmvvt.ops import LOCALITIES
from mmvvt.ops.strips import common

from conftest import relative_error

GRID = (7, 5)


@pytest.fixture(autouse=True)
def _small_images_too(monkeypatch):
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)


def build_block(dtype=torch.float64, **options):
    torch.manual_seed(0)
    block = VVTBlock(16, 2, 4, 2, 1, drop_path_rate=0.3, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.to(dtype)


def one_by_one(block, x, grid):
    """Compute the block by calling each layer, as in the paper."""
    x = x + block.drop_path(block.attn(block.norm1(x), grid))
    return x + block.drop_path(block.mlp(block.norm2(x), grid))


def make_input(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 35, 16, dtype=torch.float64, generator=generator).to(
        dtype
    )


def outcome(function, block, dtype=torch.float64):
    """Return the output and the input gradient, or the error type."""
    torch.manual_seed(2)  # drop the same paths
    x = make_input(dtype).requires_grad_()
    try:
        out = function(block, x, GRID)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
    except Exception as error:
        return type(error)
    return out.detach(), grad


def assert_honoured(change, block=None):
    """Apply a change and compare the block with its layers.

    Returns:
        bool: Whether the change made a difference to the result.
    """
    base = build_block() if block is None else block
    differs = False
    for training in (False, True):
        block = copy.deepcopy(base).train(training)
        before = outcome(VVTBlock.__call__, block)
        # Use two blocks with the same change: spectral norm has a state.
        twin = copy.deepcopy(block)
        for changed in (block, twin):
            torch.manual_seed(4)
            change(changed)
        ours = outcome(VVTBlock.__call__, block)
        expected = outcome(one_by_one, twin)
        if isinstance(expected, type):
            assert ours is expected
            differs = True
            continue
        assert not isinstance(ours, type), ours
        for a, b in zip(ours, expected):
            torch.testing.assert_close(
                a, b, rtol=1e-7, atol=1e-7, equal_nan=True
            )
        differs |= not relative_error(expected[0], before[0]) < 1e-6
    return differs


# -- every setting of every layer ---------------------------------------------


class Doubled:
    """Mixin for a layer class that doubles the output."""

    def forward(self, *args):
        return 2 * super().forward(*args)


class Halved(nn.Module):
    """Parametrization that halves a parameter."""

    def forward(self, tensor):
        return tensor / 2


class TensorSubclass(torch.Tensor):
    pass


# Alternative values of a string setting, by its value
WORDS = dict(
    zeros=['reflect', 'replicate', 'circular'],
    none=['tanh'],
    sum=[*LOCALITIES[1:], 'nonsense'],
    vicinity=['softmax', 'nonsense'],
    auto=['reference', 'torch', 'nonsense'],
    torch=['reference', 'auto', 'nonsense'],
)


def other_values(value):
    """Return other values that a user could set."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value]
    if isinstance(value, float):
        return [value + 0.2, 0.0]
    if isinstance(value, str):
        return WORDS[value]
    if isinstance(value, tuple):
        return [
            tuple(2 * v + 1 for v in value),
            tuple(2 * v for v in value),
            (*value, 1),
            'same',
        ]
    return []


def replace_layer(block, name, new):
    parent, _, child = name.rpartition('.')
    parent = block.get_submodule(parent)
    if isinstance(parent, nn.Sequential):
        parent[int(child)] = new
    else:
        setattr(parent, child, new)


def setting_changes(layer):
    """Yield the name and function of a change for each setting."""
    for key, value in vars(layer).items():
        if key.startswith('_') or key == 'training':
            continue
        for other in other_values(value):
            yield (
                f'{key} {value!r} -> {other!r}',
                lambda m, k=key, v=other: setattr(m, k, v),
            )
    yield 'training', lambda m: m.train(not m.training)


def parameter_changes(layer):
    for name, parameter in layer._parameters.items():
        if parameter is None:
            length = layer.weight.shape[0]
            yield (
                f'{name} added',
                lambda m, n=name, size=length: setattr(
                    m, n, nn.Parameter(torch.randn(size, dtype=torch.float64))
                ),
            )
            continue
        yield f'{name} removed', lambda m, n=name: setattr(m, n, None)
        yield (
            f'{name} of another value',
            lambda m, n=name: setattr(m, n, nn.Parameter(getattr(m, n) * 1.5)),
        )
        yield (
            f'{name} of float32',
            lambda m, n=name: setattr(
                m, n, nn.Parameter(getattr(m, n).float())
            ),
        )
        yield (
            f'{name} frozen',
            lambda m, n=name: getattr(m, n).requires_grad_(False),
        )
        yield (
            f'{name} shorter',
            lambda m, n=name: setattr(m, n, nn.Parameter(getattr(m, n)[:-1])),
        )
        yield (
            f'{name} twice as long',
            lambda m, n=name: setattr(
                m, n, nn.Parameter(torch.cat([getattr(m, n)] * 2))
            ),
        )
        yield (
            f'{name} of a subclass',
            lambda m, n=name: setattr(
                m, n, nn.Parameter(getattr(m, n).as_subclass(TensorSubclass))
            ),
        )
        yield (
            f'{name} parametrised',
            lambda m, n=name: parametrize.register_parametrization(
                m, n, Halved()
            ),
        )
        yield (
            f'{name} pruned',
            lambda m, n=name: prune.l1_unstructured(m, n, 0.5),
        )
        yield (
            f'{name} pruned for good',
            lambda m, n=name: prune.remove(
                prune.l1_unstructured(m, n, 0.5), n
            ),
        )
        if parameter.dim() > 1:
            yield (
                f'{name} with spectral norm',
                lambda m, n=name: parametrizations.spectral_norm(m, n),
            )
            yield (
                f'{name} with weight norm',
                lambda m, n=name: nn.utils.weight_norm(m, n),
            )


def method_changes(layer):
    def double(method):
        return lambda *args: 2 * method(*args)

    yield (
        'forward replaced',
        lambda m: setattr(m, 'forward', double(m.forward)),
    )
    yield (
        'a subclass',
        lambda m: setattr(
            m, '__class__', type('Other', (Doubled, type(m)), {})
        ),
    )
    yield (
        'forward pre-hook',
        lambda m: m.register_forward_pre_hook(
            lambda module, args: (2 * args[0], *args[1:])
        ),
    )
    yield (
        'forward hook',
        lambda m: m.register_forward_hook(lambda module, args, out: 2 * out),
    )
    yield (
        'backward hook',
        lambda m: m.register_full_backward_hook(
            lambda module, grads, out_grads: (2 * grads[0], *grads[1:])
        ),
    )
    yield (
        'backward pre-hook',
        lambda m: m.register_full_backward_pre_hook(
            lambda module, grads: (2 * grads[0],)
        ),
    )


def replacements(layer):
    yield 'identity', lambda m: nn.Identity()
    yield 'wrapped', lambda m: nn.Sequential(m)
    yield 'another layer', lambda m: nn.Tanh()


LAYERS = [name for name, _ in build_block().named_modules() if name]


@pytest.mark.parametrize('name', LAYERS)
def test_every_setting_of_every_layer(name, record_property):
    layer = build_block().get_submodule(name)
    tried = differ = 0
    for make in (setting_changes, parameter_changes, method_changes):
        for title, change in make(layer):
            try:
                differs = assert_honoured(
                    lambda block, change=change: change(
                        block.get_submodule(name)
                    )
                )
            except AssertionError as error:
                raise AssertionError(f'{name}: {title}: {error}') from error
            tried, differ = tried + 1, differ + differs
    for title, new in replacements(layer):
        try:
            differs = assert_honoured(
                lambda block, new=new: replace_layer(
                    block, name, new(block.get_submodule(name))
                )
            )
        except AssertionError as error:
            raise AssertionError(f'{name}: {title}: {error}') from error
        tried, differ = tried + 1, differ + differs
    record_property('changes', f'{tried} tried, {differ} made a difference')
    assert tried >= 10 and differ >= 5


def test_every_layer_has_a_line_in_the_list():
    assert LAYERS == [*strips.LAYERS]
    block = build_block()
    for name, stock in strips.LAYERS.items():
        layer = block.get_submodule(name)
        assert set(layer._parameters) == set(stock.parameters), name


# -- blocks of unmodified layers run in strips --------------------------------


@pytest.mark.parametrize(
    'change',
    [
        lambda block: None,
        lambda block: block.eval(),
        lambda block: block.requires_grad_(False),
        lambda block: block.load_state_dict(build_block().state_dict()),
        lambda block: block.to(memory_format=torch.channels_last),
        lambda block: block.register_forward_hook(lambda *args: None),
        lambda block: setattr(block.norm1, 'eps', 1e-3),
        lambda block: setattr(block.drop_path, 'drop_prob', 0.5),
        lambda block: setattr(block.attn, 'eps', 1e-3),
        # structured pruning of the hidden layer, the gate and the heads
        lambda block: narrow(block, 'mlp.fc1', 'mlp.dwconv.dwconv', 'mlp.fc2'),
        lambda block: narrow(block, 'attn.se_fc.0', None, 'attn.se_fc.2'),
    ],
)
def test_stock_blocks_run_in_strips(change):
    block = build_block()
    change(block)
    assert strips.find_obstacle(block, make_input(), GRID) is None
    assert_honoured(change)


def narrow(block, first, middle, last):
    """Remove half of the channels between two layers."""
    for name in (first, middle):
        if name is not None:
            layer = block.get_submodule(name)
            half = layer.weight.shape[0] // 2
            layer.weight = nn.Parameter(layer.weight[:half])
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias[:half])
            if hasattr(layer, 'groups'):
                layer.groups = half
    layer = block.get_submodule(last)
    layer.weight = nn.Parameter(layer.weight[:, : layer.weight.shape[1] // 2])


def test_reasons_name_the_layer():
    x = make_input()
    for change, reason in [
        (
            lambda b: setattr(b.mlp.dwconv.dwconv, 'dilation', (2, 2)),
            'mlp.dwconv.dwconv has dilation (2, 2)',
        ),
        (lambda b: setattr(b, 'norm1', nn.Identity()), 'norm1 is a Identity'),
        (
            lambda b: setattr(b.attn.q_proj, 'bias', None),
            'attn.q_proj has no bias',
        ),
        (
            lambda b: setattr(b.attn.se_fc[0], 'bias', nn.Parameter(x[0, 0])),
            'attn.se_fc.0 has a bias',
        ),
        (
            lambda b: b.mlp.fc2.register_forward_hook(lambda *a: None),
            'mlp.fc2 has hooks',
        ),
        (
            lambda b: b.mlp.add_module('adapter', nn.Identity()),
            'mlp.adapter was added',
        ),
        (
            lambda b: setattr(b.attn, 'locality', 'nonsense'),
            "attn has locality 'nonsense'",
        ),
        (
            lambda b: b.mlp.fc1.float(),
            'mlp.fc1 has a weight of dtype torch.float32',
        ),
    ]:
        block = build_block()
        change(block)
        found = strips.find_obstacle(block, x, GRID)
        assert found.startswith(reason), found
    assert 'large float inputs' in strips.find_obstacle(
        build_block(), x.int(), GRID
    )
    assert 'does not match the grid' in strips.find_obstacle(
        build_block(), x, (7, 6)
    )


# -- several layers, and global state -----------------------------------------


@pytest.mark.parametrize('name', ['mlp.drop', 'drop_path'])
def test_dropout_alone_in_training(name):
    """Dropout layers in training mode work in a model in eval mode."""
    block = build_block(drop_rate=0.5).eval()
    before = outcome(VVTBlock.__call__, block)

    def change(block):
        block.eval().get_submodule(name).train()

    assert_honoured(change, block)
    change(block)
    after = outcome(VVTBlock.__call__, block)
    assert relative_error(after[0], before[0]) > 1e-2


def test_pruned_heads():
    """Blocks with pruned projections compute the same as their layers."""

    def change(block):
        for name, rows in (('q', 4), ('k', 8), ('v', 12)):
            layer = getattr(block.attn, f'{name}_proj')
            layer.weight = nn.Parameter(torch.randn(rows, 16).double())
            layer.bias = nn.Parameter(torch.randn(rows).double())

    assert assert_honoured(change)

    def keep_one_head(block):
        block.attn.num_heads = 1
        for name in 'qkv':
            layer = getattr(block.attn, f'{name}_proj')
            layer.weight = nn.Parameter(layer.weight[:4])
            layer.bias = nn.Parameter(layer.bias[:4])
        block.attn.out_proj.weight = nn.Parameter(
            block.attn.out_proj.weight[:, :4]
        )

    assert assert_honoured(keep_one_head)
    block = build_block()
    keep_one_head(block)
    assert strips.find_obstacle(block, make_input(), GRID) is None


def test_shared_layers():
    def change(block):
        block.norm2 = block.norm1
        block.attn.v_proj = block.attn.k_proj

    assert assert_honoured(change)


def test_forward_of_a_class(monkeypatch):
    forward = nn.Linear.forward
    block = build_block()
    before = outcome(VVTBlock.__call__, block)[0]
    monkeypatch.setattr(
        nn.Linear, 'forward', lambda self, x: 2 * forward(self, x)
    )
    ours, expected = (
        outcome(f, block)[0] for f in (VVTBlock.__call__, one_by_one)
    )
    assert relative_error(ours, expected) < 1e-9
    assert relative_error(ours, before) > 1e-3


GLOBAL_HOOKS = {
    'register_module_forward_pre_hook': lambda m, args: (
        (2 * args[0], *args[1:]) if isinstance(m, nn.Linear) else None
    ),
    'register_module_forward_hook': lambda m, args, out: (
        2 * out if isinstance(m, nn.Linear) else None
    ),
    'register_module_full_backward_hook': lambda m, grads, outs: (
        (2 * grads[0],) if isinstance(m, nn.Linear) else None
    ),
    'register_module_full_backward_pre_hook': lambda m, grads: (
        (2 * grads[0],) if isinstance(m, nn.Linear) else None
    ),
}


@pytest.mark.parametrize('register', GLOBAL_HOOKS)
def test_global_hooks(register):
    block = build_block()
    before = outcome(VVTBlock.__call__, block)
    handle = getattr(nn.modules.module, register)(GLOBAL_HOOKS[register])
    try:
        ours, expected = (
            outcome(f, block) for f in (VVTBlock.__call__, one_by_one)
        )
    finally:
        handle.remove()
    for a, b in zip(ours, expected):
        assert relative_error(a, b) < 1e-9
    assert max(relative_error(a, b) for a, b in zip(ours, before)) > 1e-3
    assert strips.find_obstacle(block, make_input(), GRID) is None


def test_profilers_see_every_layer():
    from torch.utils.flop_counter import FlopCounterMode

    block = build_block()
    with FlopCounterMode(display=False) as counter:
        block(make_input(), GRID)
    seen = {name.partition('.')[2] for name in counter.get_flop_counts()}
    products = [
        n
        for n, m in block.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    assert len(products) == 9 and set(products) <= seen


def test_modes_of_functions_and_operations():
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class DoubledLinear(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return 2 * out if function is nn.functional.linear else out

    class DoubledReLU(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return 2 * out if function is torch.ops.aten.gelu.default else out

    block = build_block().eval()
    x = make_input()
    with torch.no_grad():
        before = block(x, GRID)
        for mode in (DoubledLinear, DoubledReLU):
            with mode():
                ours, expected = block(x, GRID), one_by_one(block, x, GRID)
            assert relative_error(ours, expected) < 1e-9
            assert relative_error(ours, before) > 1e-3
        with torch.device('cpu'):  # a mode that has no effect here
            assert strips.find_obstacle(block, x, GRID) is None


def test_lora():
    mmpretrain = pytest.importorskip('mmpretrain.models')
    arch = dict(
        embed_dims=[8, 16, 24, 32],
        num_heads=[1, 2, 3, 4],
        mlp_ratios=[2, 2, 2, 2],
        depths=[1, 1, 1, 1],
    )
    for target in ('fc1', 'q_proj', 'se_fc.2'):
        model = mmpretrain.LoRAModel(
            module=dict(type='VVT', arch=arch),
            alpha=1,
            rank=4,
            targets=[dict(type=target)],
        )
        for name, parameter in model.named_parameters():
            if 'lora_' in name:
                nn.init.normal_(parameter)
        block = model.module.block1[0].double()
        x = make_input()[..., :8]
        ours = block(x, GRID)
        assert relative_error(ours, one_by_one(block, x, GRID)) < 1e-9
        ours.sum().backward()
        assert all(
            p.grad is not None
            for n, p in block.named_parameters()
            if 'lora_' in n
        )


def test_dynamic_quantisation():
    block = build_block(torch.float32).eval()
    x = make_input(torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(
        block, {nn.Linear}, torch.qint8
    )
    with torch.no_grad():
        out = quantised(x, GRID)
        assert relative_error(out, one_by_one(quantised, x, GRID)) < 1e-6
        assert 0 < relative_error(out, block(x, GRID)) < 0.2


def test_half_of_the_weights_in_another_type():
    block = build_block()
    block.mlp.float()
    x = make_input()
    for function in (VVTBlock.__call__, one_by_one):
        with pytest.raises(RuntimeError):
            function(block, x, GRID)


@pytest.mark.parametrize('transform', ['grad', 'vmap', 'jvp', 'jacrev'])
def test_transforms_of_functions(transform):
    """Function transforms give the same values and gradients in strips."""
    block = build_block().eval()
    x = make_input()
    loss_of_layers = one_by_one(block, x, GRID).square().sum()
    expected = torch.autograd.grad(loss_of_layers, [*block.parameters()])
    parameters = dict(block.named_parameters())

    def loss(parameters, x):
        return (
            torch.func.functional_call(block, parameters, (x, GRID))
            .square()
            .sum()
        )

    if transform == 'grad':
        found = torch.func.grad(loss)(parameters, x)
    elif transform == 'jacrev':
        found = torch.func.jacrev(loss)(parameters, x)
    elif transform == 'vmap':  # per-sample gradients
        each = torch.func.vmap(
            torch.func.grad(lambda p, t: loss(p, t[None])), (None, 0)
        )(parameters, x)
        found = {name: g.sum(dim=0) for name, g in each.items()}
    else:
        torch.manual_seed(3)
        tangents = {n: torch.randn_like(p) for n, p in parameters.items()}
        value, found = torch.func.jvp(
            lambda p: loss(p, x), (parameters,), (tangents,)
        )
        want = sum((g * t).sum() for g, t in zip(expected, tangents.values()))
        assert relative_error(value, loss_of_layers) < 1e-9
        assert relative_error(found, want) < 1e-6
        return
    for (name, grad), want in zip(found.items(), expected):
        assert relative_error(grad, want) < 1e-6, name


def test_source_of_the_walk():
    """The table of layers covers all layer types of a block."""
    kinds = {type(m) for m in build_block().modules()} - {VVTBlock}
    assert kinds == {stock.cls for stock in strips.LAYERS.values()}
    assert all(inspect.isclass(kind) for kind in kinds)
