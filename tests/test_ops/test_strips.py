"""Compare blocks that run in strips with the layers."""

import contextlib
import copy
import math
import platform
from collections import defaultdict

import pytest
import torch
import torch.nn as nn

from mmvvt.errors import UserError
from mmvvt.models import strips
from mmvvt.models.vvt import VVTBlock
from mmvvt.ops import LOCALITIES, processor
from mmvvt.ops.strips import (
    MLPWeights,
    attention,
    common,
    mlp,
    mlp_branch,
)
from mmvvt.ops.strips.torch_ops import TorchOps

from conftest import relative_error

# Maximum number of elements of a strip, for blocks with 16 channels and 64
# hidden channels: the minimum of three rows, three rows, and several images
STRIPS = dict(narrow=1, some=64 * 5 * 3, whole=10**7)
GRIDS = [(7, 5), (4, 4), (1, 6), (6, 1), (2, 3), (1, 1)]


def build_block(dtype=torch.float64, path_rate=0.0, drop_rate=0.0, **attn_cfg):
    block = VVTBlock(
        16,
        2,
        4,
        2,
        1,
        drop_rate=drop_rate,
        drop_path_rate=path_rate,
        attn_cfg=attn_cfg,
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.to(dtype)


class LayerByLayer(VVTBlock):
    """Block that does not run in strips."""

    def _forward(self, x, spatial_shape):
        x = x + self.drop_path(self.attn(self.norm1(x), spatial_shape))
        return x + self.drop_path(self.mlp(self.norm2(x), spatial_shape))


def layer_by_layer(block):
    block = copy.deepcopy(block)
    block.__class__ = LayerByLayer
    return block


def runs_in_strips(block, x, grid=(7, 5)):
    return strips.find_obstacle(block, x, grid) is None


def run(block, x, grid, cotangent):
    """Return the output and all gradients by name."""
    x = x.detach().clone().requires_grad_()
    block.zero_grad()
    out = block(x, grid)
    out.backward(cotangent)
    return dict(
        output=out.detach(),
        input=x.grad,
        **{name: p.grad for name, p in block.named_parameters()},
    )


def assert_same(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    for name, want in expected.items():
        # A gradient may be zero everywhere because of a clamp.
        error = (ours[name] - want).norm() / want.norm().clamp(min=1e-9)
        assert error < tolerance, name


@pytest.fixture(autouse=True)
def _small_images_too(monkeypatch):
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)


@pytest.fixture(params=STRIPS)
def strip_numbers(request, monkeypatch):
    monkeypatch.setattr(common, 'STRIP_ELEMENTS', STRIPS[request.param])
    return request.param


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('training', [True, False])
def test_block(grid, training, strip_numbers):
    block = build_block().train(training)
    x = torch.randn(3, grid[0] * grid[1], 16, dtype=torch.float64)
    assert runs_in_strips(block, x, grid)
    cotangent = torch.randn_like(x)
    expected = run(layer_by_layer(block), x, grid, cotangent)
    assert_same(run(block, x, grid, cotangent), expected, 1e-9)
    with torch.no_grad():
        assert relative_error(block(x, grid), expected['output']) < 1e-9


@pytest.mark.parametrize('locality', LOCALITIES)
@pytest.mark.parametrize('clamp', [True, False])
def test_every_form(locality, clamp, strip_numbers):
    block = build_block(locality=locality, clamp=clamp)
    x = torch.randn(2, 35, 16, dtype=torch.float64)
    cotangent = torch.randn_like(x)
    assert_same(
        run(block, x, (7, 5), cotangent),
        run(layer_by_layer(block), x, (7, 5), cotangent),
        1e-9,
    )


@pytest.mark.parametrize(
    'names,scale',
    [
        ('qkvo', 1e-5),
        ('qkvo', 3e3),
        ('k', 1e-5),  # only the sums are clamped
    ],
)
def test_active_clamps(names, scale, strip_numbers):
    """Results are equal for inputs that are clamped."""
    block = build_block()
    layers = dict(
        q=block.attn.q_proj,
        k=block.attn.k_proj,
        v=block.attn.v_proj,
        o=block.attn.out_proj,
    )
    with torch.no_grad():
        for name in names:
            layers[name].weight.mul_(scale)
            layers[name].bias.zero_()
    x = torch.randn(2, 35, 16, dtype=torch.float64)
    cotangent = torch.randn_like(x)
    assert_same(
        run(block, x, (7, 5), cotangent),
        run(layer_by_layer(block), x, (7, 5), cotangent),
        1e-9,
    )


def test_gradcheck(strip_numbers):
    """Gradients match finite differences, without the clamps."""
    block = build_block(clamp=False)
    with torch.no_grad():
        # Avoid inputs close to 0, where the ReLU is not differentiable.
        block.attn.q_proj.bias += 3
        block.attn.k_proj.bias += 3
    names, tensors = zip(*block.named_parameters())

    def function(x, *parameters):
        return torch.func.functional_call(
            block, dict(zip(names, parameters)), (x, (4, 3))
        )

    x = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    assert runs_in_strips(block, x, (4, 3))
    assert torch.autograd.gradcheck(
        function, (x, *tensors), fast_mode=True, atol=1e-4
    )


def test_poisoned_buffers(strip_numbers):
    """Uninitialised memory is not read."""
    block = build_block()
    x = torch.randn(2, 35, 16, dtype=torch.float64)
    cotangent = torch.randn_like(x)
    expected = run(block, x, (7, 5), cotangent)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        poisoned = run(block, x, (7, 5), cotangent)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(poisoned, expected, 1e-12)


# Dtypes of the weights, of the tokens, and of autocast
PRECISIONS = {
    'float32': (torch.float32, torch.float32, None),
    'bfloat16': (torch.bfloat16, torch.bfloat16, None),
    'float16': (torch.float16, torch.float16, None),
    'autocast': (torch.float32, torch.bfloat16, torch.bfloat16),
    'autocast, float32 tokens': (torch.float32, torch.float32, torch.bfloat16),
}


def mixed(autocast):
    if autocast is None:
        return contextlib.nullcontext()
    return torch.autocast('cpu', autocast)


@pytest.mark.parametrize('products', [True, False])
@pytest.mark.parametrize('precision', PRECISIONS)
def test_not_worse_than_layers(
    precision, products, strip_numbers, monkeypatch
):
    """Errors against float64 are at most twice those of the layers.

    With and without a processor that multiplies in the dtype. The root mean
    square over several draws is compared, because a token with a very small
    sum of weights can increase either error by a factor of ten.
    """
    monkeypatch.setattr(common, 'has_products', lambda dtype: products)
    of_weights, of_tokens, autocast = PRECISIONS[precision]
    errors = defaultdict(list)
    for draw in range(8):
        block = build_block(
            of_weights, locality=LOCALITIES[draw % 4], clamp=draw < 4
        )
        x = torch.randn(2, 35, 16).to(of_tokens)
        cotangent = torch.randn(2, 35, 16).to(of_tokens)
        expected = run(
            layer_by_layer(block).double(),
            x.double(),
            (7, 5),
            cotangent.double(),
        )
        sides = []
        for candidate in (block, layer_by_layer(block)):
            with mixed(autocast):
                assert runs_in_strips(block, x)
                sides.append(run(candidate, x, (7, 5), cotangent))
        for name, want in expected.items():
            assert sides[0][name].dtype == sides[1][name].dtype, name
            errors[name].append([relative_error(t[name], want) for t in sides])
    for name, values in errors.items():
        ours, layers = torch.tensor(values).square().mean(dim=0).sqrt()
        assert ours <= 2 * layers, name


def test_autocast_converts_weights_once(monkeypatch):
    """The strips convert no weights, and autocast is off inside them."""
    seen = []

    class Ops(TorchOps):
        def depthwise(self, window, weight, *args):
            seen.append((weight.data_ptr(), torch.is_autocast_enabled('cpu')))
            assert window.strip.dtype == weight.dtype == torch.bfloat16
            return super().depthwise(window, weight, *args)

    monkeypatch.setattr(mlp, 'select_ops', lambda *_: Ops())
    monkeypatch.setattr(common, 'STRIP_ELEMENTS', 1)
    monkeypatch.setattr(common, 'has_products', lambda dtype: True)
    block = build_block(torch.float32)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        block(torch.randn(1, 35, 16), (7, 5))
    assert len(seen) == 3 and len(set(seen)) == 1
    assert not seen[0][1]


@pytest.mark.parametrize('precision', list(PRECISIONS)[1:])
def test_stochastic_depth_in_half_precision(precision):
    """The same samples are dropped, and the others are scaled."""
    of_weights, of_tokens, autocast = PRECISIONS[precision]
    block = build_block(of_weights, path_rate=0.5).train()
    x = torch.randn(16, 35, 16).to(of_tokens)
    outs = []
    for candidate in (block, layer_by_layer(block)):
        torch.manual_seed(3)
        with mixed(autocast):
            outs.append(candidate(x, (7, 5)))
    assert outs[0].dtype == outs[1].dtype == of_tokens
    assert relative_error(outs[0], outs[1]) < 0.02
    dropped, same = ((out == x).all(dim=2).all(dim=1) for out in outs)
    assert torch.equal(dropped, same) and 0 < dropped.sum() < 16


def test_stochastic_depth_draws_the_same(strip_numbers):
    block = build_block(path_rate=0.5).train()
    x = torch.randn(8, 35, 16, dtype=torch.float64)
    cotangent = torch.randn_like(x)
    results = []
    for candidate in (block, layer_by_layer(block)):
        torch.manual_seed(3)
        results.append(run(candidate, x, (7, 5), cotangent))
    assert_same(*results, 1e-9)
    dropped = (results[0]['output'] == x).all(dim=2).all(dim=1)
    assert 0 < dropped.sum() < 8  # some samples are dropped and some are not


def test_frozen_layers_get_no_gradient(strip_numbers):
    block = build_block()
    block.attn.requires_grad_(False)
    x = torch.randn(2, 35, 16, dtype=torch.float64)
    block(x, (7, 5)).sum().backward()
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == name.startswith('attn.'), name


def test_saves_less_than_half(monkeypatch):
    """Strips save less than half of the memory for the backward pass."""
    monkeypatch.setattr(common, 'STRIP_ELEMENTS', 64 * 16 * 4)
    block = build_block(torch.float32)
    x = torch.randn(1, 16 * 16, 16)

    def saved_bytes(candidate):
        weights = {p.data_ptr() for p in candidate.parameters()}
        storages = {}

        def pack(tensor):
            if tensor.data_ptr() not in weights:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = candidate(x.clone().requires_grad_(), (16, 16))
        assert out.requires_grad
        return sum(storages.values())

    assert saved_bytes(block) < 0.5 * saved_bytes(layer_by_layer(block))


@pytest.mark.parametrize('strip_rows', [3, 16])
def test_queries_need_no_memory(strip_rows, monkeypatch):
    """Without gradients, those of several strips are stored in the output."""
    block = build_block(torch.float32)
    x = torch.randn(1, 16 * 16, 16)
    # The attention strips are as wide as two tensors of 4 * 8 features.
    monkeypatch.setattr(common, 'STRIP_ELEMENTS', strip_rows * 16 * 2 * 32)
    attend = TorchOps.attend
    seen = []

    def spy(self, queries, *arguments):
        storage = queries.untyped_storage()
        seen.append((storage.data_ptr(), storage.nbytes()))
        return attend(self, queries, *arguments)

    monkeypatch.setattr(TorchOps, 'attend', spy)
    for module in (attention, mlp):
        monkeypatch.setattr(module, 'select_ops', lambda *_: TorchOps())
    with torch.no_grad():
        block(x, (16, 16))
    assert len(seen) == math.ceil(16 / strip_rows)
    if len(seen) > 1:
        assert len(set(seen)) == 1  # one tensor, of the size of the output
        assert seen[0][1] == x.numel() * 4


@pytest.mark.parametrize('grad', [True, False])
def test_input_is_left_as_it_was(grad, strip_numbers):
    """The input of a block is not modified."""
    block = build_block().eval()
    x = torch.randn(2, 35, 16, dtype=torch.float64)
    before = x.clone()
    with torch.set_grad_enabled(grad):
        out = block(x, (7, 5))
    assert torch.equal(x, before)
    assert relative_error(out, layer_by_layer(block)(x, (7, 5))) < 1e-12


def test_mlp_overwrites_where_told_and_nothing_records(strip_numbers):
    weights = MLPWeights(
        *(
            torch.randn(shape)
            for shape in (
                16,
                16,
                (64, 16),
                64,
                (64, 1, 3, 3),
                64,
                (16, 64),
                16,
            )
        )
    )
    x = torch.randn(2, 35, 16)
    expected = mlp_branch(x, (7, 5), weights, 1e-6)
    assert expected.data_ptr() != x.data_ptr()
    kept = mlp_branch(x.requires_grad_(), (7, 5), weights, 1e-6, inplace=True)
    assert kept.data_ptr() != x.data_ptr()
    with torch.no_grad():
        out = mlp_branch(x, (7, 5), weights, 1e-6, inplace=True)
    assert out.data_ptr() == x.data_ptr()
    for result in (kept, out):
        assert torch.equal(result, expected)


def test_double_backward_is_refused():
    block = build_block()
    x = torch.randn(1, 35, 16, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match='create_graph.*reference'):
        torch.autograd.grad(block(x, (7, 5)).sum(), x, create_graph=True)
    plain = build_block(backend='reference')
    (grad,) = torch.autograd.grad(plain(x, (7, 5)).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_what_goes_layer_by_layer(monkeypatch):
    x = torch.randn(2, 35, 16, dtype=torch.float64)
    assert not runs_in_strips(build_block(backend='reference'), x)
    dropout = build_block(drop_rate=0.1)
    assert not runs_in_strips(dropout.train(), x)
    assert runs_in_strips(dropout.eval(), x)
    assert not runs_in_strips(build_block(), x.float())  # different dtypes
    with torch.autocast('cpu', torch.bfloat16):
        assert not runs_in_strips(build_block(), x)
        assert not runs_in_strips(build_block(torch.float32), x.half())
        assert not runs_in_strips(build_block(torch.bfloat16), x.bfloat16())
    # number of elements in the hidden layers of two images
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 2 * 35 * 64)
    assert not runs_in_strips(build_block(), x)
    assert runs_in_strips(build_block(), torch.cat([x, x[:1]]))


@pytest.mark.parametrize('grid', [(7, 5), (0, 4)])
def test_batch_without_images(grid, monkeypatch):
    """The layers compute it, also where all other blocks run in strips."""
    monkeypatch.setattr(common, 'has_products', lambda dtype: False)
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)
    batch = 0 if grid[0] else 2
    x = torch.zeros(batch, grid[0] * grid[1], 16, dtype=torch.bfloat16)
    block = build_block(torch.bfloat16)
    assert not runs_in_strips(block, x, grid)
    if batch == 0:
        block(x.requires_grad_(), grid).sum().backward()
        assert x.grad.shape == x.shape
    else:
        with pytest.raises(UserError, match='spatial_shape'):
            block(x, grid)


@pytest.mark.parametrize(
    'flag,dtype',
    [
        ('_is_avx512_bf16_supported', torch.bfloat16),
        ('_is_amx_tile_supported', torch.bfloat16),
        ('_is_amx_fp16_supported', torch.float16),
        (None, None),
    ],
)
def test_products_by_processor(flag, dtype, monkeypatch):
    """Without products of its dtype, a block of any size runs in strips."""
    for name in (
        '_is_avx512_bf16_supported',
        '_is_amx_tile_supported',
        '_is_amx_fp16_supported',
    ):
        monkeypatch.setattr(
            torch.cpu, name, lambda name=name: name == flag, raising=False
        )
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 10**9)
    x = torch.randn(2, 35, 16)
    for low in (torch.bfloat16, torch.float16):
        assert common.has_products(low) is (low == dtype)
        computed = low if low == dtype else torch.float32
        assert common.dtype_of_strips(x.to(low)) == computed
        in_strips = runs_in_strips(build_block(low), x.to(low))
        assert in_strips is (low != dtype)
        with mixed(low):
            assert common.dtype_of_strips(x) == computed
            in_strips = runs_in_strips(build_block(torch.float32), x)
            assert in_strips is (low != dtype)
    # The usual dtypes are always multiplied.
    for usual in (torch.float32, torch.float64):
        assert common.has_products(usual)
        assert not runs_in_strips(build_block(usual), x.to(usual))


@pytest.fixture
def vendor(monkeypatch):
    """Function that changes the manufacturer of the processor."""
    yield lambda intel: monkeypatch.setattr(common, 'is_intel', lambda: intel)


@pytest.mark.parametrize(
    'capability,intel,expected',
    [('AVX512', False, True), ('AVX512', True, False), ('AVX2', False, False)],
)
def test_weight_gradients_by_processor(
    capability, intel, expected, vendor, monkeypatch
):
    vendor(intel)
    monkeypatch.setattr(
        torch.backends.cpu, 'get_cpu_capability', lambda: capability
    )
    assert common.convolves_weight_grads(torch.float32) is expected
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not common.convolves_weight_grads(dtype)


@pytest.mark.parametrize(
    'name,text,field',
    [
        ('linux', 'processor\t: 0\nvendor_id\t: GenuineIntel\n', ''),
        ('linux', 'processor\t: 0\nvendor_id\t: AuthenticAMD\n', ''),
        ('arm', 'processor\t: 0\nCPU implementer\t: 0x41\n', 'aarch64'),
        ('windows', None, 'Intel64 Family 6 Model 85, GenuineIntel'),
        ('windows', None, 'AMD64 Family 25 Model 33, AuthenticAMD'),
    ],
)
def test_manufacturer(name, text, field, tmp_path, monkeypatch):
    """It is read from /proc/cpuinfo, and elsewhere from `platform`."""
    if text is not None:
        (tmp_path / 'cpuinfo').write_text(text)
    monkeypatch.setattr(processor, 'CPUINFO', tmp_path / 'cpuinfo')
    monkeypatch.setattr(platform, 'processor', lambda: field)
    expected = 'GenuineIntel' in (text or field)
    assert common.is_intel.__wrapped__() is expected


@pytest.mark.parametrize('grid', GRIDS)
def test_weight_gradients_by_convolution(grid, strip_numbers, monkeypatch):
    calls = []

    def convolves(dtype):
        calls.append(dtype)
        return True

    monkeypatch.setattr(common, 'convolves_weight_grads', convolves)
    block = build_block(locality='sum')
    x = torch.randn(3, grid[0] * grid[1], 16, dtype=torch.float64)
    cotangent = torch.randn_like(x)
    ours = run(block, x, grid, cotangent)
    assert calls
    assert_same(ours, run(layer_by_layer(block), x, grid, cotangent), 1e-9)


def test_cut_covers_everything_once(strip_numbers):
    """Each row is computed once, also where windows overlap."""
    for batch, height, width in [(3, 7, 5), (2, 1, 6), (5, 2, 2), (1, 9, 1)]:
        counts = torch.zeros(batch, height)
        covered = torch.zeros(batch, height)
        for images, pieces in common.cut(batch, height, width, 64):
            window = common.RowWindow(height)
            for rows in pieces:
                counts[images, rows] += 1
                count = rows.stop - rows.start
                assert count >= 3 or len(pieces) == 1 or rows == pieces[-1]
                strip = torch.arange(rows.start + 1.0, rows.stop + 1.0)
                strip = strip.view(1, -1, 1, 1).repeat(
                    images.stop - images.start, 1, width, 2
                )
                seen, rows = window.push(strip, rows)
                assert seen.shape[1] == rows.stop - rows.start
                covered[images, rows] += 1
                wanted = torch.arange(rows.start, rows.stop + 2.0)
                wanted[wanted == height + 1] = 0  # rows outside the image
                joined, padding = TorchOps()._joined(seen)
                if padding:
                    wanted = wanted[1:-1]
                assert torch.equal(joined[0, :, 0, 0], wanted)
                strip.fill_(-1)  # its memory may be used again
        assert (counts == 1).all() and (covered == 1).all()


def test_half_of_a_batch_is_the_same():
    """Results do not depend on the other images of the batch."""
    block = build_block().eval()
    x = torch.randn(4, 35, 16, dtype=torch.float64)
    with torch.no_grad():
        assert (
            relative_error(block(x[:2], (7, 5)), block(x, (7, 5))[:2]) < 1e-12
        )


@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float64, *common.HALF_DTYPES]
)
@pytest.mark.parametrize('intel', [False, True])
@pytest.mark.parametrize('rows', [1, 17, 65])
def test_linear_layers(dtype, intel, rows, vendor, monkeypatch):
    """Few tokens are multiplied by a convolution in some dtypes only."""
    vendor(intel)
    convolutions = []
    conv2d = nn.functional.conv2d
    monkeypatch.setattr(
        nn.functional,
        'conv2d',
        lambda *a, **k: convolutions.append(a) or conv2d(*a, **k),
    )
    x = torch.randn(2, rows, 16, 24).to(dtype)
    weight, bias = torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype)
    for values in (bias, None):
        out = common.linear(x, weight, values)
        expected = nn.functional.linear(
            x.double(),
            weight.double(),
            None if values is None else values.double(),
        )
        assert out.dtype == dtype and out.is_contiguous()
        assert relative_error(out, expected) < 4 * torch.finfo(dtype).eps
    tokens = 32 * rows
    if dtype in common.HALF_DTYPES:
        few = tokens <= 256
    else:
        few = intel and tokens <= 1024
    assert len(convolutions) == (0 if few else 2)
