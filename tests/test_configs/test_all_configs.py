"""Every config can be built, and its metafile is correct."""

import re

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmvvt import preflight
from mmvvt.analysis.complexity import count
from mmvvt.arch import resolve_arch
from mmvvt.preflight import type_name

from conftest import ROOT, build_model

CONFIGS = sorted(
    p.relative_to(ROOT)
    for p in (ROOT / 'configs').rglob('*.py')
    if '_base_' not in p.parts
)
CLASSIFIERS = [p for p in CONFIGS if p.parts[1] == 'classification']
# Keys of MMCV 1.x, which the runner ignores
OLD_KEYS = {
    'lr_config',
    'optimizer',
    'optimizer_config',
    'runner',
    'data',
    'evaluation',
    'checkpoint_config',
    'log_config',
    'workflow',
    'total_epochs',
}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config(path):
    cfg = Config.fromfile(ROOT / path)
    assert not OLD_KEYS & set(cfg), 'keys of the MMCV 1 generation'
    assert cfg.auto_scale_lr.base_batch_size > 0
    assert 'EpochSeedHook' in [type_name(hook) for hook in cfg.custom_hooks]
    if cfg.default_scope is None:  # a pure Python config
        model = preflight.build_model(preflight.read_config(str(ROOT / path)))
    else:
        assert cfg.custom_imports.imports[0] == 'mmvvt'
        if cfg.model.backbone.type == 'LoRAModel':
            # It loads the pretrained weights when it is built.
            cfg.model.backbone.module.init_cfg = None
        model = build_model(cfg.model, cfg.default_scope)
    channels = cfg.model.backbone.get('in_channels', 3)
    model.eval()
    with torch.no_grad():
        features = model.backbone(torch.randn(1, channels, 64, 64))
    assert all(f.isfinite().all() for f in features)
    # The learning rate is for the number of GPUs and batch size in the name.
    named = re.search(r'_(\d+)xb(\d+)', path.stem)
    if named:
        gpus, batch = map(int, named.groups())
        assert cfg.train_dataloader.batch_size == batch
        assert cfg.auto_scale_lr.base_batch_size == gpus * batch


@pytest.mark.parametrize('path', CLASSIFIERS, ids=lambda p: p.stem)
def test_classifier_recipe(path):
    cfg = Config.fromfile(ROOT / path)
    if 'in1k' in path.stem or 'cifar100' in path.stem:
        tiny = 'tiny' in path.stem
        assert cfg.model.backbone.arch == path.stem.split('_')[0][4:]
        assert cfg.model.backbone.drop_path_rate == (0.1 if tiny else 0.3)
        clip = cfg.optim_wrapper.get('clip_grad')
        assert clip == (None if tiny else dict(max_norm=1.0))
        assert cfg.optim_wrapper.type == 'AutoAmpOptimWrapper'
        assert cfg.train_dataloader.sampler.type == 'RepeatAugSampler'
        classes = 100 if 'cifar100' in path.stem else 1000
        assert cfg.model.head.num_classes == classes
        assert cfg.data_preprocessor.num_classes == classes
        epochs = 30 if '384px' in path.stem else 300
        assert cfg.train_cfg.max_epochs == epochs
        assert cfg.param_scheduler[-1].end == epochs
    assert cfg.train_dataloader.persistent_workers is False
    assert cfg.train_dataloader.worker_init_fn.type == 'seed_worker'


@pytest.mark.parametrize(
    'path', [p for p in CLASSIFIERS if 'in1k' in p.stem], ids=lambda p: p.stem
)
def test_classifier_pipelines_run(path, tmp_path):
    """Pipelines accept images that are larger or smaller than the crop."""
    import cv2
    import numpy as np
    from mmengine.dataset import Compose

    size = 384 if '384px' in path.stem else 224
    cfg = Config.fromfile(ROOT / path)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        for pipeline in (
            cfg.train_dataloader.dataset.pipeline,
            cfg.test_dataloader.dataset.pipeline,
        ):
            for shape in ((500, 420, 3), (90, 120, 3)):
                file = tmp_path / 'image.png'
                cv2.imwrite(str(file), np.full(shape, 99, np.uint8))
                packed = Compose(pipeline)(
                    dict(img_path=str(file), gt_label=1)
                )
                assert packed['inputs'].shape == (3, size, size)


def test_metafiles_list_every_recipe_and_count_right():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    listed = {}
    for name in index['Import']:
        for model in yaml.safe_load((ROOT / name).read_text())['Models']:
            listed[model['Config']] = model
    # Templates for the data of users are no models.
    recipes = {str(p) for p in CONFIGS if p.parts[1] != 'finetune'}
    assert set(listed) == recipes
    for path, model in listed.items():
        counted = ('classification', 'cifar100', 'mnist', 'vvt-nano_digits')
        if not any(name in path for name in counted):
            continue
        cfg = Config.fromfile(ROOT / path)
        small = 'nano' in path or 'atto' in path
        size = 384 if '384px' in path else 32 if small else 224
        channels = cfg.model.backbone.get('in_channels', 3)
        if 'medium' in path or 'large' in path:
            continue  # same code path as small, but slower
        found = count(build_model(cfg.model), (1, channels, size, size))
        assert model['Metadata']['Parameters'] == found.parameters, path
        assert model['Metadata']['FLOPs'] == pytest.approx(
            found.multiply_adds, rel=5e-3
        ), path


@pytest.mark.parametrize(
    'name,options',
    [
        ('softmax', dict(attn_cfg=dict(attention='softmax'))),
        ('no-locality', dict(attn_cfg=dict(locality='none'))),
        ('1d-locality', dict(attn_cfg=dict(locality='1d'))),
        ('fr1', dict(arch=dict(resolve_arch('tiny'), fr_ratios=[1] * 4))),
        ('fr4', dict(arch=dict(resolve_arch('tiny'), fr_ratios=[4] * 4))),
        ('fr8', dict(arch=dict(resolve_arch('tiny'), fr_ratios=[8] * 4))),
    ],
)
def test_ablation_configs_differ_in_one_setting(name, options):
    folder = ROOT / 'configs'
    base = Config.fromfile(
        folder / 'classification' / 'vvt-tiny_8xb128_cifar100.py'
    ).to_dict()
    found = Config.fromfile(
        folder / 'ablation' / f'vvt-tiny-{name}_8xb128_cifar100.py'
    ).to_dict()
    backbone = found['model']['backbone']
    if 'arch' in options:
        backbone['arch'] = resolve_arch(backbone['arch'])
    base['model']['backbone'].update(options)
    assert found == base


@pytest.mark.parametrize(
    'name,gmacs',
    [('tiny', 3.0), ('small', 5.6), ('medium', 9.4), ('large', 10.8)],
)
def test_published_multiply_adds(name, gmacs):
    """Counts match the table of the paper, rounded to one decimal."""
    cfg = Config.fromfile(
        ROOT / f'configs/classification/vvt-{name}_8xb128_in1k.py'
    )
    found = count(build_model(cfg.model), (1, 3, 224, 224))
    assert found.multiply_adds / 1e9 == pytest.approx(gmacs, abs=0.06)
