"""Tests of the detection configs: settings, building and training."""

import copy
import re

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from conftest import ROOT, write_coco

pytest.importorskip('mmdet')
from mmdet.registry import DATASETS  # noqa: E402

CONFIGS = sorted((ROOT / 'configs' / 'detection').glob('*.py'))
# Published embed_dims, so that necks and heads match; reduced depths
SHALLOW = dict(
    embed_dims=[96, 160, 320, 512],
    num_heads=[1, 2, 5, 8],
    mlp_ratios=[1, 1, 1, 1],
    depths=[1, 1, 1, 1],
)
SHRINK = 8
DETECTORS = {
    'retinanet': 'RetinaNet',
    'mask-rcnn': 'MaskRCNN',
    'cascade-mask-rcnn': 'CascadeRCNN',
    'dino-4scale': 'DINO',
}
ARCHS = ('tiny', 'small', 'medium', 'large')


def names(paths):
    return [path.stem for path in paths]


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmdet')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Dataset with an image with objects and an empty one per split."""
    root = tmp_path_factory.mktemp('data') / 'coco'
    classes = DATASETS.get('CocoDataset').METAINFO['classes']
    write_coco(root, classes)
    return root


def shrink_sizes(node):
    """Divide all image sizes in a nested config by SHRINK."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ('scale', 'crop_size'):
                node[key] = tuple(side // SHRINK for side in value)
            elif key == 'scales':
                node[key] = [
                    tuple(side // SHRINK for side in scale) for scale in value
                ]
            else:
                shrink_sizes(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            shrink_sizes(value)


def few_regions(model):
    """Reduce the number of boxes and remove the score threshold."""
    if model.type == 'DINO':
        model.update(num_queries=30)
        model.dn_cfg.group_cfg.num_dn_queries = 5
    elif model.type == 'RetinaNet':
        model.test_cfg.update(score_thr=0.0, max_per_img=5)
    else:
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 16
        model.train_cfg.rpn_proposal.max_per_img = 30
        model.test_cfg.rpn.max_per_img = 10
        model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)


def small_run(path, data, work_dir):
    """Return the config with reduced image sizes and a short schedule."""
    cfg = Config.fromfile(path)
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        shrink_sizes(cfg[key])
        cfg[key].update(num_workers=0, persistent_workers=False)
        cfg[key].dataset.data_root = str(data)
    for key in ('val_evaluator', 'test_evaluator'):
        cfg[key].ann_file = str(
            data / 'annotations' / 'instances_val2017.json'
        )
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=False)
    cfg.model.backbone.update(arch=SHALLOW, init_cfg=None)
    few_regions(cfg.model)
    cfg.train_cfg.update(max_epochs=1)
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint = None
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'{path.stem}-{work_dir.name}'
    return cfg


def test_all_are_there():
    expected = (
        {
            f'{head}_vvt-{arch}_fpn_1x_coco'
            for head in ('retinanet', 'mask-rcnn')
            for arch in ARCHS
        }
        | {
            f'{head}_vvt-{arch}_fpn_ms-3x_coco'
            for head in ('mask-rcnn', 'cascade-mask-rcnn')
            for arch in ('small', 'medium')
        }
        | {'dino-4scale_vvt-small_12e_coco'}
    )
    assert set(names(CONFIGS)) == expected


@pytest.mark.parametrize('path', CONFIGS, ids=names(CONFIGS))
def test_name_says_the_recipe(path):
    cfg = Config.fromfile(path)
    detector, arch, schedule = re.fullmatch(
        r'([\w-]+)_vvt-([a-z]+)(?:_fpn)?_([\w-]+)_coco', path.stem
    ).groups()
    assert cfg.model.type == DETECTORS[detector]
    backbone = cfg.model.backbone
    assert backbone.arch == arch
    assert backbone.frozen_stages == -1
    assert backbone.get('with_cp', False) == (arch == 'large')
    assert backbone.init_cfg == dict(
        type='Pretrained',
        checkpoint=f'pretrained/vvt-{arch}_in1k.pth',
        prefix='backbone.',
    )

    epochs, milestones = {
        '1x': (12, [8, 11]),
        'ms-3x': (36, [27, 33]),
        '12e': (12, [11]),
    }[schedule]
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[-1].end == epochs
    assert cfg.param_scheduler[-1].milestones == milestones
    if schedule != '12e':
        assert cfg.param_scheduler[0].end == 500
    wrapper = cfg.optim_wrapper
    assert wrapper.type == 'AutoAmpOptimWrapper'
    assert wrapper.optimizer.type == 'AdamW'
    assert wrapper.optimizer.lr == 1e-4
    assert wrapper.get('clip_grad') == (
        dict(max_norm=0.1, norm_type=2) if detector == 'dino-4scale' else None
    )

    loader = cfg.train_dataloader
    assert loader.batch_size == 2 and cfg.auto_scale_lr.base_batch_size == 16
    assert loader.persistent_workers is False
    assert loader.worker_init_fn.type == 'seed_worker'
    steps = [step.type for step in loader.dataset.pipeline]
    assert ('RandomChoice' in steps) == (schedule != '1x')
    test_steps = cfg.test_dataloader.dataset.pipeline
    for step in [
        s
        for s in (*loader.dataset.pipeline, *test_steps)
        if s.type == 'Resize'
    ]:
        assert step.scale == (1333, 800)
    masks = 'mask' in detector
    for pipeline in (loader.dataset.pipeline, test_steps):
        (annotations,) = [s for s in pipeline if s.type == 'LoadAnnotations']
        assert annotations.get('with_mask', False) == masks
    assert ('segm' in cfg.test_evaluator.metric) == masks
    # mmdet cannot merge masks: tools/test.py --tta then raises an error.
    assert ('tta_model' in cfg) == ('tta_pipeline' in cfg) == (not masks)


@pytest.mark.parametrize('path', CONFIGS, ids=names(CONFIGS))
def test_one_step_on_the_true_layout(path, data, tmp_path, monkeypatch):
    """A training step with an empty image and validation succeed."""
    # Formatting the config for the log takes longer than the step.
    monkeypatch.setattr(Config, 'pretty_text', '')
    cfg = small_run(path, data, tmp_path)
    # The warm-up starts at 0.001 times the learning rate.
    for scheduler in cfg.param_scheduler:
        scheduler.pop('start_factor', None)
    runner = Runner.from_cfg(cfg)
    model = runner.model
    model.init_weights()
    # Use nonzero biases, as in a checkpoint. With zero biases, padding gives
    # tokens of zeros, for which each LayerNorm multiplies the gradient by
    # 1 / sqrt(eps). The gradient may then overflow, and clipping makes the
    # step zero.
    nn.init.normal_(model.backbone.patch_embed1.proj.bias)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}

    runner.train()
    assert runner.iter == 1 and len(runner.train_dataloader.dataset) == 2
    moved = [
        k for k, p in model.named_parameters() if not torch.equal(p, before[k])
    ]
    heads = (
        ['roi_head.bbox_head', 'rpn_head', 'roi_head.mask_head']
        if 'rcnn' in path.stem
        else ['bbox_head']
    )
    if 'dino' in path.stem:
        heads += ['encoder', 'decoder']
    for part in ('backbone.block1', 'backbone.block4', 'neck', *heads):
        assert any(key.startswith(part) for key in moved), part
    assert all(p.isfinite().all() for p in model.parameters())
    metrics = ['bbox', 'segm'] if 'mask' in path.stem else ['bbox']
    for metric in metrics:
        value = runner.message_hub.get_scalar(
            f'val/coco/{metric}_mAP'
        ).current()
        assert 0 <= value <= 1

    groups = runner.optim_wrapper.optimizer.param_groups
    decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    rate = {id(p): g['initial_lr'] for g in groups for p in g['params']}
    projection = model.backbone.patch_embed1.proj
    if 'retinanet' in path.stem:
        assert set(decay.values()) == {1e-4}
        assert set(rate.values()) == {1e-4}
    elif 'dino' in path.stem:
        assert set(decay.values()) == {1e-4}
        assert rate[id(projection.weight)] == pytest.approx(1e-5)
        assert rate[id(model.memory_trans_fc.weight)] == 1e-4
    else:
        assert decay[id(model.backbone.norm2.weight)] == 0
        assert decay[id(projection.bias)] == 0.05
        assert decay[id(projection.weight)] == 0.05
        assert decay[id(model.neck.lateral_convs[0].conv.weight)] == 0.05
        assert set(rate.values()) == {1e-4}


@pytest.mark.parametrize(
    'path',
    [p for p in CONFIGS if 'small' in p.stem],
    ids=[n for n in names(CONFIGS) if 'small' in n],
)
def test_builds_whole(path):
    cfg = Config.fromfile(path)
    model = MODELS.build(copy.deepcopy(cfg.model))  # DINO modifies the config
    classes = len(
        DATASETS.get(cfg.train_dataloader.dataset.type).METAINFO['classes']
    )
    found = {
        m.num_classes
        for name, m in model.named_modules()
        if hasattr(m, 'num_classes') and 'rpn_head' not in name
    }
    assert found == {classes}
    if 'tta_model' in cfg:
        assert MODELS.build(dict(cfg.tta_model, module=cfg.model)) is not None
