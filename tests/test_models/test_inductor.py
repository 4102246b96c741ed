"""The compiler of PyTorch, with its real backend, gives the same results."""

import logging
from types import SimpleNamespace

import pytest
import torch

from mmvvt.engine import CompileBackboneHook
from mmvvt.models import VVT
from mmvvt.ops.strips import common

from conftest import relative_error

# One small stage: the compiler takes most of a minute for each graph.
ARCH = dict(
    embed_dims=[8, 8, 8, 8],
    num_heads=[1, 1, 1, 1],
    mlp_ratios=[1, 1, 1, 1],
    depths=[1, 1, 1, 1],
)


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """Compile without vector instructions, which is faster.

    All eager blocks run in strips. The compiler must not: it could not
    optimise them.
    """
    monkeypatch.setattr(common, 'MIN_ELEMENTS', 0)
    torch._dynamo.reset()
    with torch._inductor.config.patch({'cpp.simdlen': 1}):
        yield
    torch._dynamo.reset()


def build(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = VVT(**{'arch': ARCH, 'out_indices': (0,), **options})
    model.init_weights()
    model.to(dtype)
    return model, torch.compile(model, fullgraph=True)


def images(*size, dtype=torch.float32):
    """Images of a size that the compiler shall not take for a constant."""
    x = torch.randn(2, 3, *size, dtype=dtype)
    for dim in (2, 3):
        torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def forward_backward(network, model, x):
    """Return the output and the gradients of the parameters of a model."""
    model.zero_grad()
    (out,) = network(x)
    # The output of a LayerNorm sums to zero, but its square does not.
    out.to(torch.promote_types(out.dtype, torch.float32)).pow(
        4
    ).mean().backward()
    grads = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return out, grads


def errors(found, expected, least=1e-3):
    """Relative error of each gradient that is not almost zero.

    ``least`` is the smallest norm relative to that of the largest gradient.
    """
    assert found.keys() == expected.keys()
    largest = max(grad.norm() for grad in expected.values())
    # Others are sums of terms that cancel out.
    names = [
        n for n, grad in expected.items() if grad.norm() > least * largest
    ]
    assert 2 * len(names) >= len(expected)
    return {n: relative_error(found[n], expected[n]) for n in names}


def test_training_at_several_sizes():
    """In float64: queries amplify rounding errors by a factor of 1000.

    Their gradients are differences of almost equal sums. In float32, the
    errors are 1e-5 to 3e-4 with and without the compiler.
    """
    model, compiled = build(torch.float64)
    # The first size is compiled as a constant, the second one as a symbol.
    for size in ((64, 96), (96, 64)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        out, grads = forward_backward(compiled, model, x)
        expected, wanted = forward_backward(model, model, x)
        assert relative_error(out, expected) < 1e-12
        assert max(errors(grads, wanted, 1e-6).values()) < 1e-9


def test_inference_at_several_sizes():
    model, compiled = build()
    model.eval()
    with torch.no_grad():
        for size in ((64, 96), (96, 64), (70, 45)):
            x = images(*size)
            assert relative_error(compiled(x)[0], model(x)[0]) < 1e-5


def test_training_under_autocast():
    """The errors are those of layers that run one by one in bfloat16."""
    model, compiled = build()
    x = torch.randn(2, 3, 32, 32)
    exact, wanted = forward_backward(model, model, x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        eager, eager_grads = forward_backward(model, model, x)
        out, grads = forward_backward(compiled, model, x)
    assert relative_error(out, exact) < 0.05
    assert relative_error(out, exact) < 2 * relative_error(eager, exact)
    allowed = errors(eager_grads, wanted)
    for name, error in errors(grads, wanted).items():
        assert error < 2 * allowed[name] + 0.02, name


@pytest.mark.parametrize(
    'options',
    [
        dict(
            attn_cfg=dict(attention='softmax', fpc=False),
            patch_cfg=dict(overlap=False),
        ),
        dict(
            attn_cfg=dict(attention='global_context'),
            mlp_cfg=dict(dwconv=False),
            patch_cfg=dict(pos_embed_size=64),
        ),
    ],
    ids=['softmax', 'global-context'],
)
def test_training_with_symbolic_sizes(options, monkeypatch):
    """Ablation variants, at sizes that no stride divides.

    Without the layout optimisation, a graph serves all widths.
    """
    monkeypatch.setattr(torch._inductor.config, 'layout_optimization', False)
    model, compiled = build(torch.float64, **options)
    torch._dynamo.utils.counters.clear()
    for size in ((64, 94), (97, 66)):
        x = images(*size, dtype=torch.float64)
        out, grads = forward_backward(compiled, model, x)
        expected, wanted = forward_backward(model, model, x)
        assert relative_error(out, expected) < 1e-12
        assert max(errors(grads, wanted, 1e-6).values()) < 1e-9
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


def test_training_of_two_stages_with_symbolic_sizes():
    """The output of a stage is the input of a convolution.

    PyTorch compiles this again at each further size.
    """
    arch = dict(ARCH, sr_ratios=[2, 1, 1, 1])
    model, compiled = build(torch.float64, arch=arch, out_indices=(1,))
    x = images(97, 66, dtype=torch.float64)
    out, grads = forward_backward(compiled, model, x)
    expected, wanted = forward_backward(model, model, x)
    assert relative_error(out, expected) < 1e-12
    assert max(errors(grads, wanted, 1e-6).values()) < 1e-9


def test_blocks_share_one_graph_at_all_sizes():
    """Blocks with different drop path rates, compiled one by one."""
    arch = dict(ARCH, depths=[3, 1, 1, 1])
    model, _ = build(torch.float64, arch=arch)
    plain, _ = build(torch.float64, arch=arch)
    for network in (model, plain):
        for block, rate in zip(network.block1, (0.2, 0.5, 0.7)):
            block.drop_path.drop_prob = rate
    hook = CompileBackboneHook('VVTBlock', dynamic=True, fullgraph=True)
    runner = SimpleNamespace(
        model=SimpleNamespace(backbone=model), logger=logging.getLogger('hook')
    )
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(fallback_random=True):
        hook.before_train(runner)
        for size in ((64, 96), (96, 64), (70, 45)):
            x = torch.randn(2, 3, *size, dtype=torch.float64)
            torch.manual_seed(1)
            out, grads = forward_backward(model, model, x)
            torch.manual_seed(1)
            expected, wanted = forward_backward(plain, plain, x)
            assert relative_error(out, expected) < 1e-12
            assert max(errors(grads, wanted, 1e-6).values()) < 1e-9
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
