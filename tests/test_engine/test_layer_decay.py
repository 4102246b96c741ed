"""Layer-wise learning rates under mmpretrain, mmseg and mmdet."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS

from mmvvt.engine.optim_constructor import layer_scales
from mmvvt.errors import UserError

from conftest import GOLDEN_ARCH, ROOT, build_model

CONFIGS = ROOT / 'configs'
OURS = 'MergedOptimWrapperConstructor'
MMPRETRAIN = 'mmpretrain.LearningRateDecayOptimWrapperConstructor'
LR, DECAY, RATE = 1e-3, 0.05, 0.75
NO_DECAY = dict(norm_decay_mult=0.0, bias_decay_mult=0.0)

BACKBONE = dict(type='VVT', arch=GOLDEN_ARCH)
# Depths of GOLDEN_ARCH, with blocks 1, 1, 2 and 1: exponents of the rate
EXPONENTS = {
    'patch_embed1.': 6,
    'block1.0.': 5,
    'norm1.': 5,
    'patch_embed2.': 5,
    'block2.0.': 4,
    'norm2.': 4,
    'patch_embed3.': 4,
    'block3.0.': 3,
    'block3.1.': 2,
    'norm3.': 2,
    'patch_embed4.': 2,
    'block4.0.': 1,
    'norm4.': 0,
}


def classifier(**backbone):
    return dict(
        type='ImageClassifier',
        backbone=dict(BACKBONE, **backbone),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=48),
    )


def segmentor():
    model = Config.fromfile(
        CONFIGS / 'demo/vvt-nano_fpn_digit-scenes.py'
    ).model
    model.backbone.update(arch=GOLDEN_ARCH, init_cfg=None)
    model.neck.in_channels = GOLDEN_ARCH['embed_dims']
    model.auxiliary_head.in_channels = GOLDEN_ARCH['embed_dims'][1]
    return model


def detector():
    model = Config.fromfile(
        CONFIGS / 'demo/retinanet_vvt-nano_digit-scenes.py'
    ).model
    model.backbone.update(arch=GOLDEN_ARCH, init_cfg=None)
    model.neck.in_channels = GOLDEN_ARCH['embed_dims'][1:]
    return model


def optimize(model, constructor=OURS, **paramwise):
    optimizer = dict(type='AdamW', lr=LR, weight_decay=DECAY)
    options = {**NO_DECAY, 'layer_decay_rate': RATE, **paramwise}
    return build_optim_wrapper(
        model,
        dict(
            optimizer=optimizer,
            constructor=constructor,
            paramwise_cfg=copy.deepcopy(options),
        ),
    )


def settings(model, wrapper):
    """Return the learning rate and weight decay of each parameter by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [
        (names[parameter], (group['lr'], group['weight_decay']))
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    ]
    assert len(dict(found)) == len(found), 'a parameter is in two groups'
    return dict(found)


def exponent(name, prefix):
    """Exponent of the decay rate for a parameter, by hand."""
    if not name.startswith(prefix):
        return 0
    (value,) = (
        value
        for module, value in EXPONENTS.items()
        if name[len(prefix) :].startswith(module)
    )
    return value


def is_norm_or_bias(model, name):
    owner, _, kind = name.rpartition('.')
    module = model.get_submodule(owner)
    return 'Norm' in type(module).__name__ or kind == 'bias'


def check(model, prefix='backbone.'):
    """Check the settings of each parameter of a model."""
    wrapper = optimize(model)
    found = settings(model, wrapper)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert set(found) == set(trained)
    for name, (lr, decay) in found.items():
        assert lr == pytest.approx(LR * RATE ** exponent(name, prefix)), name
        plain = is_norm_or_bias(model, name)
        assert decay == (0.0 if plain else DECAY), name
    options = {tuple(value) for value in found.values()}
    assert len(wrapper.optimizer.param_groups) == len(options)
    return found


@pytest.mark.parametrize(
    'scope,make',
    [('mmpretrain', classifier), ('mmseg', segmentor), ('mmdet', detector)],
)
def test_learning_rates_by_hand(scope, make):
    pytest.importorskip(scope)
    found = check(build_model(make(), scope))
    heads = [n for n in found if not n.startswith('backbone.')]
    assert heads and all(found[name][0] == LR for name in heads)
    assert min(lr for lr, _ in found.values()) == LR * RATE**6


def test_bare_backbone():
    check(build_model(BACKBONE), prefix='')


@pytest.mark.parametrize(
    'recipe,frozen_stages',
    [
        ('vvt-nano_1xb128_fashion-mnist', 3),
        ('vvt-tiny_8xb128_cifar100', -1),
        ('vvt-tiny_8xb128_in1k-384px', 0),
        ('vvt-small_8xb128_in1k', -1),
        ('vvt-medium_8xb128_in1k', 2),
        ('vvt-large_8xb128_in1k', -1),
    ],
)
def test_equals_the_constructor_of_mmpretrain(recipe, frozen_stages):
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(CONFIGS / 'classification' / f'{recipe}.py')
    cfg.model.backbone.frozen_stages = frozen_stages
    model = build_model(cfg.model)
    wrappers = []
    for constructor in (OURS, MMPRETRAIN):
        options = cfg.optim_wrapper.to_dict()
        options['constructor'] = constructor
        options.setdefault('paramwise_cfg', {})['layer_decay_rate'] = 0.8
        wrappers.append(build_optim_wrapper(model, options))
    ours, theirs = (settings(model, wrapper) for wrapper in wrappers)
    assert ours == theirs
    # At most two weight decays for each depth
    groups = wrappers[0].optimizer.param_groups
    assert len(groups) <= 2 * (sum(model.backbone.depths) + 2)


@pytest.mark.parametrize(
    'options',
    [
        dict(flat_decay_mult=0.0),
        dict(norm_decay_mult=None, bias_decay_mult=0.5),
        dict(
            custom_keys={
                'norm': dict(decay_mult=0.3),
                'backbone.block3': dict(decay_mult=2.0),
                'block3.1.attn.q_proj': dict(decay_mult=0.1, eps=1e-6),
                'head': dict(decay_mult=0.0),
            }
        ),
    ],
)
def test_options_equal_those_of_mmpretrain(options):
    pytest.importorskip('mmpretrain')
    model = build_model(classifier(frozen_stages=0))
    ours = settings(model, optimize(model, **options))
    assert ours == settings(model, optimize(model, MMPRETRAIN, **options))
    assert len(ours) < len(list(model.parameters()))


def test_learning_rates_of_custom_keys_are_scaled():
    model = build_model(BACKBONE)
    keys = {'block4': dict(lr_mult=0.1, decay_mult=0.5)}
    found = settings(model, optimize(model, custom_keys=keys))
    lr, decay = found['block4.0.attn.q_proj.weight']
    assert lr == pytest.approx(LR * 0.1 * RATE)
    assert decay == pytest.approx(DECAY * 0.5)


def test_backbone_in_a_wrapper():
    """LoRA trains new layers in the blocks, whose depths are theirs."""
    pytest.importorskip('mmpretrain')
    model = classifier()
    model['backbone'] = dict(
        type='LoRAModel',
        module=BACKBONE,
        alpha=4,
        rank=2,
        targets=[dict(type='.*q_proj')],
    )
    found = check(build_model(model), prefix='backbone.module.')
    rates = {n: lr for n, (lr, _) in found.items() if 'lora_' in n}
    assert len(rates) == 10  # two matrices in each of five blocks
    assert rates['backbone.module.block3.1.attn.q_proj.lora_up.weight'] == (
        LR * RATE**2
    )


def test_module_wrapper():
    """mmengine passes the module inside of a distributed wrapper."""
    model = torch.nn.DataParallel(build_model(BACKBONE))
    wrapper = optimize(model)
    lr, _ = settings(model.module, wrapper)['patch_embed1.proj.weight']
    assert lr == LR * RATE**6


def test_backbone_of_mmpretrain():
    """The constructor supports all backbones that have depths."""
    pytest.importorskip('mmpretrain')
    model = build_model(
        dict(
            type='ImageClassifier',
            backbone=dict(type='SwinTransformer', arch='tiny'),
            head=dict(type='LinearClsHead', num_classes=2, in_channels=768),
        )
    )
    ours = settings(model, optimize(model))
    assert ours == settings(model, optimize(model, MMPRETRAIN))
    assert len({lr for lr, _ in ours.values()}) == 14


def schedulers(wrapper):
    return [
        PARAM_SCHEDULERS.build(
            config, default_args=dict(optimizer=wrapper, verbose=False)
        )
        for config in (
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=3),
            dict(
                type='CosineAnnealingLR',
                eta_min_ratio=0.01,
                by_epoch=False,
                begin=3,
                end=10,
            ),
        )
    ]


def test_schedule_and_resume_keep_the_ratios():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32)

    def start():
        torch.manual_seed(1)
        model = build_model(BACKBONE)
        model.init_weights()
        wrapper = optimize(model)
        return model, wrapper, schedulers(wrapper)

    def step(model, wrapper, plan, count):
        rates = []
        for _ in range(count):
            wrapper.update_params(model(image)[-1].square().mean())
            for scheduler in plan:
                scheduler.step()
            rates.append(
                {n: lr for n, (lr, _) in settings(model, wrapper).items()}
            )
        return rates

    model, wrapper, plan = start()
    scales = layer_scales(model, RATE)
    before = step(model, wrapper, plan, 5)
    saved = copy.deepcopy([x.state_dict() for x in (model, wrapper, *plan)])
    after = step(model, wrapper, plan, 4)
    for rates in before + after:
        last = rates['norm4.weight']
        for name, lr in rates.items():
            assert lr == pytest.approx(last * scales[name], rel=1e-6), name
    assert len({rates['norm4.weight'] for rates in before + after}) > 5

    resumed, wrapper, plan = start()
    for target, state in zip((resumed, wrapper, *plan), saved):
        target.load_state_dict(state)
    assert step(resumed, wrapper, plan, 4) == after
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize(
    'options,message',
    [
        (
            dict(layer_decay_rate=0),
            r'layer_decay_rate must be greater than 0 and at most 1, got 0',
        ),
        (dict(layer_decay_rate=1.5), 'at most 1, got 1.5'),
        (dict(layer_decay_rate='0.75'), "at most 1, got '0.75'"),
        (
            dict(decay_rate=0.75, num_layers=6),
            'decay_rate is unknown .* its name is layer_decay_rate',
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        optimize(build_model(BACKBONE), **options)


def test_no_learning_rate():
    with pytest.raises(UserError, match='layer_decay_rate needs optimizer.lr'):
        build_optim_wrapper(
            build_model(BACKBONE),
            dict(
                optimizer=dict(type='Adadelta'),
                constructor=OURS,
                paramwise_cfg=dict(layer_decay_rate=RATE),
            ),
        )


@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='MobileNetV2'),  # without the method
        dict(type='ResNet', depth=18),  # its method raises an error
    ],
    ids=lambda backbone: backbone['type'],
)
def test_backbone_without_depths(backbone):
    pytest.importorskip('mmpretrain')
    model = build_model(
        dict(
            type='ImageClassifier',
            backbone=backbone,
            head=dict(type='LinearClsHead', num_classes=2, in_channels=8),
        )
    )
    with pytest.raises(
        UserError,
        match='needs a backbone with the method get_layer_depth, which '
        f'{backbone["type"]} does not support',
    ):
        optimize(model)
