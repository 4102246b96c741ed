"""The recipes have the settings of their sources, or state the difference."""

import argparse
import copy
import importlib
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmvvt.cli import add_cfg_options
from mmvvt.preflight import type_name

from conftest import ROOT, build_model, load_tool, photograph

pytest.importorskip('mmseg')
pytest.importorskip('mmdet')

CONFIGS = sorted(
    path.relative_to(ROOT / 'configs').with_suffix('').as_posix()
    for path in (ROOT / 'configs').rglob('*.py')
    if '_base_' not in path.parts
)
# Published embed_dims, so that necks and heads match; reduced depths
SHALLOW = dict(
    embed_dims=[96, 160, 320, 512],
    num_heads=[1, 2, 5, 8],
    mlp_ratios=[1, 1, 1, 1],
    depths=[1, 1, 1, 1],
)


def load(name):
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


# -- weight decay -------------------------------------------------------------


def timm_decay(name, parameter):
    """timm 0.4.12, for ImageNet: no decay for biases and vectors."""
    return not (parameter.ndim == 1 or name.endswith('.bias'))


def swin_decay(name, parameter):
    """Swin's segmentors and detectors: no decay for names with 'norm'."""
    return 'norm' not in name


def decay_of_all(name, parameter):
    """PVT's segmentors and detectors, and DINO."""
    return True


@pytest.mark.parametrize(
    'name,weight_decay,rule,without_decay',
    [
        ('classification/vvt-tiny_8xb128_in1k', 0.05, timm_decay, 'head.fc.b'),
        ('classification/vvt-tiny_8xb128_cifar100', 0.05, timm_decay, 'norm4'),
        (
            'classification/vvt-tiny_8xb128_in1k-384px',
            1e-8,
            timm_decay,
            'bias',
        ),
        (
            'segmentation/vvt-tiny_fpn_8xb4-40k_ade20k-512x512',
            1e-4,
            decay_of_all,
            None,
        ),
        (
            'segmentation/vvt-tiny_upernet_8xb2-160k_ade20k-512x512',
            0.01,
            swin_decay,
            'patch_embed1.norm.w',
        ),
        (
            'segmentation/vvt-small_upernet_8xb1-80k_cityscapes-1024x1024',
            0.01,
            swin_decay,
            'norm1.b',
        ),
        ('detection/retinanet_vvt-tiny_fpn_1x_coco', 1e-4, decay_of_all, None),
        (
            'detection/mask-rcnn_vvt-tiny_fpn_1x_coco',
            0.05,
            swin_decay,
            'norm4',
        ),
        (
            'detection/cascade-mask-rcnn_vvt-small_fpn_ms-3x_coco',
            0.05,
            swin_decay,
            'block1.0.norm2.w',
        ),
        (
            'detection/dino-4scale_vvt-small_12e_coco',
            1e-4,
            decay_of_all,
            None,
        ),
    ],
)
def test_weight_decay_of_every_parameter(
    name, weight_decay, rule, without_decay
):
    """The optimizer has the weight decay that the source would give."""
    scope = dict(classification='mmpretrain', segmentation='mmseg').get(
        name.split('/')[0], 'mmdet'
    )
    pytest.importorskip(scope)
    cfg = load(name)
    cfg.model.backbone.update(arch=SHALLOW, init_cfg=None)
    with DefaultScope.overwrite_default_scope(scope):
        model = build_model(copy.deepcopy(cfg.model), scope)
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    found = {
        id(parameter): group['weight_decay']
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }
    names = dict(model.named_parameters())
    assert len(found) == len(names)
    for key, parameter in names.items():
        expected = weight_decay if rule(key, parameter) else 0
        assert found[id(parameter)] == expected, key
    free = [key for key in names if found[id(names[key])] == 0]
    assert bool(free) == (without_decay is not None)
    if without_decay:
        assert any(without_decay in key for key in free)
    if rule is swin_decay:
        assert found[id(names['backbone.block1.0.mlp.fc1.bias'])] > 0
        assert all(key.startswith('backbone.') for key in free)
    for key in names:  # the batch norms of heads
        if '.bn.' in key:
            assert found[id(names[key])] == weight_decay, key


def test_mask_rcnn_with_the_settings_of_pvt():
    """The option in the README of the detectors."""
    pytest.importorskip('mmdet')
    text = (ROOT / 'configs/detection/README.md').read_text()
    (options,) = re.findall(r'`--cfg-options (optim_wrapper[^`]*)`', text)
    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    args = parser.parse_args(['--cfg-options', *options.split()])
    cfg = load('detection/mask-rcnn_vvt-small_fpn_1x_coco')
    cfg.merge_from_dict(args.cfg_options)
    cfg.model.backbone.update(arch=SHALLOW, init_cfg=None)
    assert cfg.model.backbone.drop_path_rate == 0.1
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = build_model(copy.deepcopy(cfg.model), 'mmdet')
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    (group,) = wrapper.optimizer.param_groups
    assert (group['lr'], group['weight_decay']) == (2e-4, 1e-4)


# -- learning rate ------------------------------------------------------------


def learning_rates(cfg, batch_size, epoch_length, work_dir):
    """Learning rate in each iteration, as a run with --auto-scale-lr has it.

    Args:
        cfg (Config): Config of a recipe.
        batch_size (int): Batch size of the run.
        epoch_length (int): Number of iterations per epoch.
        work_dir (Path): Folder for the log.
    """
    runner = Runner(
        model=torch.nn.Linear(1, 1),
        work_dir=str(work_dir),
        train_dataloader=DataLoader(
            range(batch_size * epoch_length), batch_size=batch_size
        ),
        train_cfg=cfg.train_cfg,
        # The optimizer makes no difference.
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=cfg.optim_wrapper.optimizer.lr)
        ),
        param_scheduler=copy.deepcopy(cfg.param_scheduler),
        auto_scale_lr=dict(cfg.auto_scale_lr, enable=True),
        experiment_name=work_dir.name,
    )
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    schedulers = runner.build_param_scheduler(runner.param_schedulers)
    (group,) = runner.optim_wrapper.optimizer.param_groups
    runner.optim_wrapper.optimizer.step()
    rates = []
    for iteration in range(runner.max_iters):
        rates.append(group['lr'])
        for scheduler in schedulers:
            if not scheduler.by_epoch or (iteration + 1) % epoch_length == 0:
                scheduler.step()
    return rates


def unique_schedules():
    """One config for each schedule."""
    seen = {}
    for name in CONFIGS:
        cfg = load(name)
        key = str(
            (
                [
                    dict(step, type=type_name(step))
                    for step in cfg.param_scheduler
                ],
                cfg.optim_wrapper.optimizer.lr,
                cfg.auto_scale_lr.base_batch_size,
            )
        )
        seen.setdefault(key, name)
    return list(seen.values())


@pytest.mark.parametrize('name', unique_schedules())
def test_rate_never_rises_after_warmup(name, tmp_path):
    """Also with --auto-scale-lr and a batch size of 8."""
    cfg = load(name)
    rate, base = (
        cfg.optim_wrapper.optimizer.lr,
        cfg.auto_scale_lr.base_batch_size,
    )
    # The warm-up of detectors is 500 iterations long.
    length = 501 if 'coco' in name else 4
    if 'vvt-atto_1xb128' in name:
        length = 468  # Its schedule counts iterations.
    rates = learning_rates(cfg, 8, length, tmp_path)
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(rate * 8 / base)
    before, after = rates[: top + 1], rates[top:]
    assert before == sorted(before)
    warm_up = sum(
        step.end * (length if step.get('convert_to_iter_based') else 1)
        for step in cfg.param_scheduler
        if type_name(step) == 'LinearLR'
    )
    assert top <= warm_up
    assert all(b <= a * (1 + 1e-9) for a, b in zip(after, after[1:]))
    assert 0 <= rates[-1] < rates[top] / 9
    for step in cfg.param_scheduler:  # the part of the warm-up is the same
        if type_name(step) == 'LinearLR':
            assert rates[0] == pytest.approx(rates[top] * step.start_factor)


def timm_rates(rate, epochs):
    """Learning rate in each epoch of the official code, with timm 0.4.12.

    The scheduler is stepped with the number of an epoch after this epoch.
    """
    for epoch in range(epochs):
        t = max(epoch - 1, 0)
        if t < 5:
            yield 1e-6 + t * (rate - 1e-6) / 5
        else:
            cosine = (1 + math.cos(math.pi * t / epochs)) / 2
            yield 1e-5 + (rate - 1e-5) * cosine


def test_difference_from_the_schedule_of_the_official_code(tmp_path):
    """The numbers in the README of the classifiers are those of the config."""
    length = 1251
    cfg = load('classification/vvt-tiny_8xb128_in1k')
    ours = learning_rates(cfg, 1024, length, tmp_path)
    theirs = [x for x in timm_rates(1e-3, 300) for _ in range(length)]
    assert len(ours) == len(theirs)
    assert ours[0] == theirs[0] == 1e-6
    assert ours[-1] == pytest.approx(1e-5, rel=1e-4)
    difference = [abs(a - b) / 1e-3 for a, b in zip(ours, theirs)]
    during, after = difference[: 6 * length], difference[6 * length :]
    text = (ROOT / 'configs/classification/README.md').read_text()
    text = ' '.join(text.split())
    for words, value in (
        ('up to {:.0f} % of the highest', 100 * max(during)),
        ('at most {:.1f} % of it', 100 * max(after)),
        ('mean is {:.1f} % higher', 100 * (sum(ours) / sum(theirs) - 1)),
    ):
        assert words.format(value) in text, words.format(value)


# -- images of an epoch and of a run ------------------------------------------


def test_iterations_of_an_imagenet_epoch(monkeypatch):
    """1251 with 8 processes, as in the official code."""
    from mmpretrain.datasets import RepeatAugSampler

    module = importlib.import_module(RepeatAugSampler.__module__)
    monkeypatch.setattr(module, 'get_dist_info', lambda: (0, 8))
    cfg = load('classification/vvt-small_8xb128_in1k').train_dataloader
    images = range(1281167)
    loader = DataLoader(
        images,
        batch_size=cfg.batch_size,
        sampler=RepeatAugSampler(images),
        drop_last=cfg.drop_last,
    )
    assert len(loader) == len(images) // 1024 == 1251


@pytest.mark.parametrize(
    'name', [n for n in CONFIGS if n.startswith('classification')]
)
def test_classifiers_keep_the_best_checkpoint(name):
    assert load(name).default_hooks.checkpoint.save_best == 'accuracy/top1'


README = (ROOT / 'configs/segmentation/README.md').read_text()
COMMANDS = [
    command
    for block in re.findall(r'```bash\n(.*?)```', README, re.DOTALL)
    for command in re.sub(r'\\\n\s*', '', block).splitlines()
    if 'tools/train.py' in command and '--cfg-options' in command
]


@pytest.mark.parametrize('command', COMMANDS, ids=range(len(COMMANDS)))
def test_one_gpu_sees_all_images(command, monkeypatch):
    """The commands for one GPU give the images and the schedule of eight."""
    (config,) = re.findall(r'^CONFIG=(\S+)', README, re.MULTILINE)
    arguments = shlex.split(command.replace('$CONFIG', config))
    assert arguments[:2] == ['python', 'tools/train.py']
    monkeypatch.setattr(sys, 'argv', arguments[1:])
    monkeypatch.chdir(ROOT)
    train = load_tool('tools/train.py')
    args = train.parse_args()
    cfg = train.merge_arguments(train.load_config(args), args)
    source = Config.fromfile(args.config)
    base = source.auto_scale_lr.base_batch_size

    wrapper = cfg.optim_wrapper
    steps = wrapper.get('accumulative_counts', 1)
    batch = cfg.train_dataloader.batch_size
    factor = cfg.train_cfg.max_iters / source.train_cfg.max_iters
    assert batch * factor == base, 'the number of images differs'
    # The learning rate is for the images of a step of the optimizer.
    assert bool(cfg.auto_scale_lr.get('enable')) == (batch * steps != base)
    assert len(cfg.param_scheduler) == len(source.param_scheduler)
    for ours, theirs in zip(cfg.param_scheduler, source.param_scheduler):
        for key in ('begin', 'end'):
            assert ours.get(key, 0) == theirs.get(key, 0) * factor, key


def test_there_are_commands_for_one_gpu():
    accumulated = ['accumulative_counts' in command for command in COMMANDS]
    assert True in accumulated and False in accumulated


# -- test images --------------------------------------------------------------


@pytest.mark.parametrize('shape', [(75, 101), (640, 480), (512, 700)])
@pytest.mark.parametrize('tta', [False, True], ids=['single', 'tta'])
def test_semantic_fpn_rounds_sizes_up(shape, tta, tmp_path):
    """As PVT: multiples of 32 in testing. UperNet keeps the ratio."""
    pytest.importorskip('mmseg')
    import cv2
    import numpy as np
    from mmengine.dataset import Compose

    image, labels = tmp_path / 'image.png', tmp_path / 'labels.png'
    cv2.imwrite(str(image), photograph(*shape))
    cv2.imwrite(str(labels), np.ones(shape, np.uint8))
    sample = dict(
        img_path=str(image),
        seg_map_path=str(labels),
        label_map=None,
        reduce_zero_label=True,
        seg_fields=[],
    )
    found = {}
    for head in ('fpn_8xb4-40k', 'upernet_8xb2-160k'):
        cfg = load(f'segmentation/vvt-small_{head}_ade20k-512x512')
        pipeline = (
            cfg.tta_pipeline if tta else cfg.test_dataloader.dataset.pipeline
        )
        with DefaultScope.overwrite_default_scope('mmseg'):
            packed = Compose(pipeline)(copy.deepcopy(sample))
        inputs = packed['inputs'] if tta else [packed['inputs']]
        samples = packed['data_samples'] if tta else [packed['data_samples']]
        found[head] = [tuple(x.shape[1:]) for x in inputs]
        assert len(inputs) == (12 if tta else 1)
        for x, item in zip(inputs, samples):
            # The prediction is resized to the size of the file.
            assert item.ori_shape == shape
            assert item.img_shape == tuple(x.shape[1:])
            assert item.gt_sem_seg.data.shape[1:] == shape
    fpn, upernet = found.values()
    for small, large in zip(upernet, fpn):
        assert large == tuple(-(-side // 32) * 32 for side in small)
    assert fpn != upernet


# -- models and schedules of mmseg and mmdet ----------------------------------

# Settings of our configs that differ from the configs in mmseg and mmdet, as
# the README files say. Channels depend on the backbone.
STATED = {
    'segmentation/vvt-small_fpn_8xb4-40k_ade20k-512x512': (
        'mmseg',
        'poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py',
        {'train_cfg.val_interval'},
    ),
    'segmentation/vvt-small_upernet_8xb2-160k_ade20k-512x512': (
        'mmseg',
        'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_'
        'ade20k-512x512.py',
        {'train_cfg.val_interval'},
    ),
    'detection/retinanet_vvt-small_fpn_1x_coco': (
        'mmdet',
        'pvt/retinanet_pvtv2-b2_fpn_1x_coco.py',
        set(),
    ),
    'detection/mask-rcnn_vvt-small_fpn_1x_coco': (
        'mmdet',
        'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        {'param_scheduler.0.end'},
    ),
    'detection/mask-rcnn_vvt-small_fpn_ms-3x_coco': (
        'mmdet',
        'swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py',
        {'param_scheduler.0.end'},
    ),
    # Swin has no Cascade Mask R-CNN in mmdet. That of ConvNeXt has the same
    # heads, another learning rate and layer-wise decay.
    'detection/cascade-mask-rcnn_vvt-small_fpn_ms-3x_coco': (
        'mmdet',
        'convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_'
        'amp-ms-crop-3x_coco.py',
        {
            'param_scheduler.0.end',
            'optim_wrapper.optimizer.lr',
            'optim_wrapper.paramwise_cfg.custom_keys.norm.decay_mult',
            'optim_wrapper.paramwise_cfg.decay_rate',
            'optim_wrapper.paramwise_cfg.decay_type',
            'optim_wrapper.paramwise_cfg.num_layers',
        },
    ),
    'detection/dino-4scale_vvt-small_12e_coco': (
        'mmdet',
        'dino/dino-4scale_r50_8xb2-12e_coco.py',
        set(),
    ),
}
# Settings without effect, or of the backbone
IGNORED = re.compile(
    r'model\.(backbone|pretrained|neck\.start_level|num_feature_levels)\b'
    r'|in_channels|use_sigmoid$|\.begin$|betas'
    r'|optim_wrapper\.(type|loss_scale|constructor)$'
    r'|custom_keys\.(absolute_pos_embed|relative_position_bias_table)'
)


def flatten(node, where=''):
    """Leaves of a nested config; a pair of sizes is sorted."""
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, (list, tuple)) and not (
        len(node) == 2 and all(isinstance(x, int) for x in node)
    ):
        items = enumerate(node)
    else:
        pair = isinstance(node, (list, tuple))
        return {where: sorted(node) if pair else node}
    leaves = {}
    for key, child in items:
        leaves.update(flatten(child, f'{where}.{key}' if where else str(key)))
    return leaves


def recipe(cfg):
    steps = cfg.train_dataloader.dataset
    steps = steps.get('dataset', steps)  # RepeatDataset
    return flatten(
        dict(
            model=cfg.model,
            optim_wrapper=cfg.optim_wrapper,
            param_scheduler=cfg.param_scheduler,
            train_cfg=cfg.train_cfg,
            batch_size=cfg.train_dataloader.batch_size,
            filter_cfg=steps.get('filter_cfg', {}),
            train_pipeline=[
                {
                    key: value
                    for key, value in step.items()
                    if key not in ('backend_args', 'reduce_zero_label')
                }
                for step in steps.pipeline
                if step.type != 'CheckLabels'
            ],
        )
    )


@pytest.mark.parametrize('name', STATED)
def test_settings_of_the_source(name):
    """Only the stated settings differ from the config of the source."""
    package, source, stated = STATED[name]
    module = pytest.importorskip(package)
    folder = Path(module.__file__).parent / '.mim' / 'configs'
    if not (folder / source).is_file():
        pytest.skip(f'{package} was installed without its configs')
    ours = recipe(load(name))
    theirs = recipe(Config.fromfile(folder / source))
    different = {
        key
        for key in {**ours, **theirs}
        if ours.get(key, 'missing') != theirs.get(key, 'missing')
        and not IGNORED.search(key)
    }
    assert different == stated


@pytest.mark.parametrize(
    'pattern,rates',
    [
        # PVT, for all sizes
        (r'segmentation/.*_fpn_', dict.fromkeys('tsml', 0.1)),
        (r'detection/retinanet', dict.fromkeys('tsml', 0.1)),
        # Swin, for all sizes
        (r'segmentation/.*_upernet_', dict.fromkeys('tsml', 0.3)),
        # Swin-T and Swin-S for small and medium; the others as on ImageNet-1K
        (r'detection/(cascade-)?mask', dict(t=0.1, s=0.2, m=0.2, l=0.3)),
        # the official code
        (r'classification/.*_8xb128', dict(t=0.1, s=0.3, m=0.3, l=0.3)),
    ],
)
def test_drop_path_rates(pattern, rates):
    names = [name for name in CONFIGS if re.match(pattern, name)]
    assert len(names) >= 4
    for name in names:
        size = re.search(r'vvt-(\w)', name).group(1)
        assert load(name).model.backbone.drop_path_rate == rates[size], name
