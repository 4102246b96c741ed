"""Merged parameter groups have the same options and updates."""

import torch
from mmengine.optim import build_optim_wrapper

from conftest import GOLDEN_ARCH, build_model

MODEL = dict(type='VVT', arch=GOLDEN_ARCH, frozen_stages=0)
# Two weight decays, and a different learning rate for one stage
OPTIONS = dict(
    optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=dict(block4=dict(lr_mult=0.5)),
    ),
)
MERGED = 'MergedOptimWrapperConstructor'
PLAIN = 'DefaultOptimWrapperConstructor'


def build(constructor):
    torch.manual_seed(0)
    model = build_model(MODEL)
    return model, build_optim_wrapper(
        model, dict(OPTIONS, constructor=constructor)
    )


def options(model, wrapper):
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [
        (names[parameter], (group['lr'], group['weight_decay']))
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    ]
    assert len(dict(found)) == len(found), 'a parameter is in two groups'
    return dict(found)


def test_same_options_in_fewer_groups():
    model, merged = build(MERGED)
    _, plain = build(PLAIN)
    wanted = [p for p in model.parameters() if p.requires_grad]
    assert len(plain.optimizer.param_groups) == len(wanted)
    assert len(merged.optimizer.param_groups) == 3
    found = options(model, merged)
    assert len(found) == len(wanted) < len(list(model.parameters()))
    assert found == options(*build(PLAIN))
    assert set(found.values()) == {(1e-2, 0.1), (1e-2, 0.0), (5e-3, 0.1)}


def test_same_updates():
    image = torch.randn(2, 3, 32, 32)
    results = []
    for constructor in (MERGED, PLAIN):
        model, wrapper = build(constructor)
        for _ in range(3):
            wrapper.update_params(model(image)[-1].square().mean())
        results.append(model.state_dict())
    before = build(PLAIN)[0].state_dict()
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], msg=key)
    assert not torch.equal(results[0]['norm4.bias'], before['norm4.bias'])


def test_without_options_all_is_left_to_mmengine():
    model = build_model(MODEL)
    wrapper = build_optim_wrapper(
        model, dict(optimizer=OPTIONS['optimizer'], constructor=MERGED)
    )
    assert len(wrapper.optimizer.param_groups) == 1
