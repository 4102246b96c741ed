"""Tests of mixed precision without a GPU and of weight decay."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPERS

from mmvvt.engine import optim_wrapper

from conftest import ROOT, build_model


def build(**options):
    parameter = torch.nn.Parameter(torch.ones(2))
    return parameter, OPTIM_WRAPPERS.build(
        dict(
            type='AutoAmpOptimWrapper',
            optimizer=torch.optim.SGD([parameter], lr=1.0),
            **options,
        )
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_float32_on_the_cpu_and_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(
        optim_wrapper, 'print_log', lambda message, **_: said.append(message)
    )
    parameter, wrapper = build(
        loss_scale='dynamic', dtype='float16', clip_grad=dict(max_norm=1.0)
    )
    assert len(said) == 1 and 'No GPU' in said[0] and 'float32' in said[0]
    model = torch.nn.Linear(2, 2)
    with wrapper.optim_context(model):
        assert model(torch.ones(1, 2)).dtype == torch.float32
    wrapper.update_params((parameter * torch.tensor([30.0, 40.0])).sum())
    # The gradient with norm 50 was clipped to norm 1.
    torch.testing.assert_close(parameter.data, torch.tensor([0.4, 0.2]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_mixed_precision_on_a_gpu():
    assert isinstance(build()[1], AmpOptimWrapper)


@pytest.mark.parametrize(
    'name',
    [
        'classification/vvt-tiny_8xb128_in1k.py',
        'classification/vvt-tiny_8xb128_cifar100.py',
        'demo/vvt-nano_digits.py',
    ],
)
def test_no_weight_decay_on_biases_and_norms(name):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    model = build_model(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {
        id(parameter): group['weight_decay']
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }
    kinds = set()
    for key, parameter in model.named_parameters():
        # Biases and the weights of norms are one-dimensional.
        expected = 0.0 if parameter.ndim == 1 else 0.05
        assert decay[id(parameter)] == expected, key
        kinds.add(expected)
    assert kinds == {0.0, 0.05}
