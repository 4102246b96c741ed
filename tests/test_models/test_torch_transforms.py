"""Tracing, exporting, torch.func, quantisation and fake tensors of PyTorch."""

import copy
import io
import math

import pytest
import torch
import torch.nn as nn
from mmengine.analysis import get_model_complexity_info
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.ao.quantization import quantize_dynamic
from torch.autograd import forward_ad

from mmvvt.models import VVT
from mmvvt.ops.strips import common

from conftest import relative_error

DIMS = [8, 16, 24, 32]
NANO = dict(
    embed_dims=DIMS,
    num_heads=[1, 2, 3, 4],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
)
ALL = (0, 1, 2, 3)


def nano(**options):
    model = VVT(NANO, **{'out_indices': ALL, **options})
    model.init_weights()
    return model


@pytest.fixture
def strips(monkeypatch):
    """Run all blocks in strips wherever strips can be used."""
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)


@pytest.fixture(params=[False, True], ids=['layers', 'strips'])
def branch(request, monkeypatch):
    """Run eager blocks layer by layer, or all of them in strips."""
    least = 0 if request.param else math.inf
    monkeypatch.setattr(common, 'MIN_ELEMENTS', least)


def check_outputs(outs, expected, tolerance=1e-5):
    outs, expected = list(outs), list(expected)
    assert len(outs) == len(expected) > 0
    for out, want in zip(outs, expected):
        assert relative_error(out, want) < tolerance


def shapes(size, batch):
    """Shapes of the four outputs for images of a size."""
    return [
        (batch, dims, *(math.ceil(n / (4 * 2**i)) for n in size))
        for i, dims in enumerate(DIMS)
    ]


# -- tracing and exporting ----------------------------------------------------


def test_traced_with_gradients_enabled(strips):
    """A traced model is saved, loaded and run at another size and batch."""
    model = nano().eval()
    traced = torch.jit.trace(model, torch.randn(2, 3, 64, 96))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for shape in ((1, 3, 70, 45), (3, 3, 96, 64)):
        x = torch.randn(shape)
        check_outputs(loaded(x), model(x))


def test_complexity_by_mmengine(strips):
    """mmengine counts with gradients enabled, in training and evaluation."""
    model = nano()
    counts = [
        get_model_complexity_info(model, (3, *size), show_table=False)
        for size in ((64, 96), (128, 96))
    ]
    for found in counts:
        assert found['params'] == sum(p.numel() for p in model.parameters())
    # Linear in the number of pixels
    assert counts[1]['flops'] == pytest.approx(2 * counts[0]['flops'], 0.01)
    again = get_model_complexity_info(
        model.eval(), (3, 64, 96), show_table=False
    )
    assert again['flops'] == counts[0]['flops'] > 0


@pytest.mark.parametrize('opset,gradients', [(13, True), (17, False)])
def test_older_onnx_exporter(opset, gradients, strips):
    """The file runs at sizes and batches other than those of the example."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    model = nano().eval()
    names = ['x', *(f'stage{i}' for i in ALL)]
    file = io.BytesIO()
    with torch.set_grad_enabled(gradients):
        torch.onnx.export(
            model,
            (torch.randn(2, 3, 64, 96),),
            file,
            dynamo=False,
            opset_version=opset,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_axes={
                name: {0: 'batch', 2: 'height', 3: 'width'} for name in names
            },
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=['CPUExecutionProvider']
    )
    for shape in ((1, 3, 70, 45), (3, 3, 64, 64), (2, 3, 128, 33)):
        x = torch.randn(shape)
        check_outputs(session.run(None, {'x': x.numpy()}), model(x))


def test_exported_program_with_dynamic_sizes(strips):
    model = nano(out_indices=(0, 1)).eval()
    dynamic = {i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)}
    exported = torch.export.export(
        model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(dynamic,)
    ).module()
    for shape in ((3, 3, 96, 64), (1, 3, 70, 45)):
        x = torch.randn(shape)
        check_outputs(exported(x), model(x))


def test_scripting_and_symbolic_tracing_are_not_supported():
    """mmengine's BaseModule has no script, and checks depend on shapes."""
    with pytest.raises(RuntimeError, match='base_module'):
        torch.jit.script(nano())
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(nano())


# -- torch.func ---------------------------------------------------------------


def functional(model):
    """Return the parameters, and the loss as a function of parameters."""
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(parameters, x):
        outs = torch.func.functional_call(model, parameters, (x,))
        # The output of a LayerNorm sums to zero, but its square does not.
        return sum(out.pow(4).mean() for out in outs)

    return parameters, loss


def autograd_gradients(model, loss, x):
    """Gradients of all parameters by ordinary automatic differentiation."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss(parameters, x), parameters.values())
    return dict(zip(parameters, grads))


def check_gradients(grads, expected):
    # The biases of some layers have gradients that are zero up to rounding.
    assert grads.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(
            grads[name], want, rtol=1e-8, atol=1e-12, msg=name
        )
    assert sum(want.norm() > 1e-6 for want in expected.values()) > 50


def test_functional_gradients(branch):
    model = nano().double()
    parameters, loss = functional(model)
    x = torch.randn(2, 3, 64, 40, dtype=torch.float64)
    grads = torch.func.grad(loss)(parameters, x)
    check_gradients(grads, autograd_gradients(model, loss, x))


def test_gradients_per_sample(branch):
    model = nano().double()
    parameters, loss = functional(model)
    images = torch.randn(3, 1, 3, 64, 40, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    grads = per_sample(parameters, images)
    for i, x in enumerate(images):
        check_gradients(
            {name: grad[i] for name, grad in grads.items()},
            autograd_gradients(model, loss, x),
        )


@pytest.mark.parametrize('gradients', [True, False])
def test_vectorised_forward(gradients, branch):
    model = nano().double()
    images = torch.randn(3, 2, 3, 64, 40, dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        outs = torch.func.vmap(model)(images)
        for i, x in enumerate(images):
            check_outputs((out[i] for out in outs), model(x), 1e-10)


def test_forward_mode(branch):
    """The directional derivative equals a central difference."""
    model = nano().double()
    x = torch.randn(2, 3, 64, 40, dtype=torch.float64)
    direction = torch.randn_like(x)
    outs, tangents = torch.func.jvp(model, (x,), (direction,))
    check_outputs(outs, model(x), 1e-10)
    step = 1e-6
    with torch.no_grad():
        above, below = (model(x + sign * step * direction) for sign in (1, -1))
    differences = [(a - b) / (2 * step) for a, b in zip(above, below)]
    check_outputs(tangents, differences, 1e-7)


def test_dual_numbers(branch):
    """Forward mode without torch.func."""
    model = nano().double()
    x = torch.randn(2, 3, 64, 40, dtype=torch.float64)
    direction = torch.randn_like(x)
    _, expected = torch.func.jvp(model, (x,), (direction,))
    with forward_ad.dual_level():
        outs = model(forward_ad.make_dual(x, direction))
        tangents = [forward_ad.unpack_dual(out).tangent for out in outs]
    check_outputs(tangents, expected, 1e-10)


def test_jacobian(branch):
    model = nano().double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)

    def means(x):
        return model(x)[-1].mean(dim=(0, 2, 3))[::4]

    jacobian = torch.func.jacrev(means)(x)
    assert jacobian.shape == (8, *x.shape)
    expected = torch.autograd.functional.jacobian(means, x)
    assert relative_error(jacobian, expected) < 1e-10


# -- quantisation, meta and fake tensors --------------------------------------


def test_dynamic_quantisation(branch):
    model = nano().eval()
    quantised = quantize_dynamic(model, {nn.Linear})
    assert not any(type(m) is nn.Linear for m in quantised.modules())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for out, want in zip(quantised(x), model(x)):
            # Also an error of zero would mean that a float path was used.
            assert 1e-6 < relative_error(out, want) < 0.02


def check_shapes(model, x):
    """Check the outputs and the gradients of tensors without data."""
    outs = model(x)
    size = tuple(x.shape[2:])
    assert [tuple(out.shape) for out in outs] == shapes(size, len(x))
    sum(out.square().sum() for out in outs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.shape == parameter.shape, name
        assert parameter.grad.device == x.device, name
    return outs


def test_built_on_the_meta_device(branch):
    with torch.device('meta'):
        model = VVT(NANO, out_indices=ALL)
    assert all(p.is_meta for p in model.parameters())
    outs = check_shapes(model, torch.empty(2, 3, 71, 90, device='meta'))
    assert all(out.is_meta for out in outs)
    model.to_empty(device='cpu').init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    check_shapes(model, torch.randn(2, 3, 71, 90))


def test_moved_to_the_meta_device(branch):
    model = nano(drop_path_rate=0.2, drop_rate=0.1).to('meta')
    check_shapes(model, torch.empty(2, 3, 71, 90, device='meta'))
    with torch.no_grad():
        x = torch.empty(1, 3, 32, 64, device='meta')
        outs = model.eval()(x)
    assert [tuple(out.shape) for out in outs] == shapes((32, 64), 1)


def test_fake_tensors(branch):
    with FakeTensorMode():
        outs = check_shapes(nano(), torch.empty(2, 3, 71, 90))
    assert all(isinstance(out, FakeTensor) for out in outs)


# -- mmengine -----------------------------------------------------------------


def test_accumulated_gradients(branch):
    """Two half batches give the step of the whole batch."""
    x = torch.randn(4, 3, 64, 40, dtype=torch.float64)
    start = nano().double()
    states = {}
    for parts in (1, 2):
        model = copy.deepcopy(start)
        wrapper = OptimWrapper(
            torch.optim.SGD(model.parameters(), lr=0.1),
            accumulative_counts=parts,
        )
        wrapper.initialize_count_status(model, 0, parts)
        for number, images in enumerate(x.chunk(parts), start=1):
            with wrapper.optim_context(model):
                loss = sum(out.pow(4).mean() for out in model(images))
            wrapper.update_params(loss)
            states[number, parts] = copy.deepcopy(model.state_dict())
    for name, before in start.state_dict().items():
        assert torch.equal(states[1, 2][name], before), name
        torch.testing.assert_close(
            states[2, 2][name], states[1, 1][name], rtol=1e-8, atol=1e-12
        )
    key = 'patch_embed1.proj.weight'
    assert relative_error(states[1, 1][key], start.state_dict()[key]) > 1e-4


def test_moving_average():
    model = nano()
    average = ExponentialMovingAverage(model, momentum=0.25)
    expected = {k: t.clone() for k, t in model.state_dict().items()}
    average.update_parameters(model)  # The first call copies the weights.
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update_parameters(model)
        for name, value in model.state_dict().items():
            expected[name] = 0.75 * expected[name] + 0.25 * value
    found = average.module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    # The average is a network that runs.
    x = torch.randn(2, 3, 64, 40)
    model.load_state_dict(expected)
    check_outputs(average(x), model(x))
