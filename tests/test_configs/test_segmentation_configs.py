"""Tests of the segmentation configs: complexity, building, training."""

import re
from importlib import resources

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from conftest import ROOT, run_tool

pytest.importorskip('mmseg')
from mmseg.registry import DATASETS  # noqa: E402

CONFIGS = sorted((ROOT / 'configs' / 'segmentation').glob('*.py'))
DEMOS = sorted((ROOT / 'configs' / 'demo').glob('*_fpn_digit-scenes*.py'))
# Published embed_dims, so that necks and heads match; reduced depths
SHALLOW = dict(
    embed_dims=[96, 160, 320, 512],
    num_heads=[1, 2, 5, 8],
    mlp_ratios=[1, 1, 1, 1],
    depths=[1, 1, 1, 1],
)
SHRINK = 8

# Parameters (M) and multiply-adds (G) at 512 x 512, from the ADE20K table of
# the paper
PUBLISHED = {
    'vvt-small_fpn': (29.2, 50.9),
    'vvt-medium_fpn': (51.7, 70.8),
    'vvt-large_fpn': (65.5, 78.1),
    'vvt-small_upernet': (55.5, 240),
    'vvt-medium_upernet': (77.9, 260),
    'vvt-large_upernet': (91.9, 267),
}


def names(paths):
    return [path.stem for path in paths]


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmseg')


def photograph(height, width):
    """Real photograph, RGB."""
    path = resources.files('sklearn') / 'datasets' / 'images' / 'china.jpg'
    return cv2.resize(cv2.imread(str(path)), (width, height))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Datasets like ADE20K and Cityscapes with two images per split."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)

    def write(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    ade = root / 'ade' / 'ADEChallengeData2016'
    for split in ('training', 'validation'):
        for number in (1, 2):
            name = f'ADE_{split[:5]}_{number:08d}'
            write(ade / 'images' / split / f'{name}.jpg', photograph(75, 101))
            labels = rng.integers(0, 151, (5, 7), dtype=np.uint8)
            labels = cv2.resize(
                labels, (101, 75), interpolation=cv2.INTER_NEAREST
            )
            write(ade / 'annotations' / split / f'{name}.png', labels)

    cityscapes = root / 'cityscapes'
    for split, city in (('train', 'aachen'), ('val', 'munster')):
        for number in (1, 2):
            name = f'{city}_{number:06d}_000019'
            write(
                cityscapes
                / 'leftImg8bit'
                / split
                / city
                / f'{name}_leftImg8bit.png',
                photograph(128, 256),
            )
            labels = rng.choice([*range(19), 255], (4, 8)).astype(np.uint8)
            labels = cv2.resize(
                labels, (256, 128), interpolation=cv2.INTER_NEAREST
            )
            write(
                cityscapes
                / 'gtFine'
                / split
                / city
                / f'{name}_gtFine_labelTrainIds.png',
                labels,
            )
    return dict(ADE20KDataset=ade, CityscapesDataset=cityscapes)


def shrink_sizes(node):
    """Divide all image sizes in a nested config by SHRINK."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ('scale', 'size', 'crop_size', 'stride'):
                node[key] = tuple(side // SHRINK for side in value)
            else:
                shrink_sizes(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            shrink_sizes(value)


def small_run(path, data, work_dir):
    """Return the config with reduced image sizes and a short schedule."""
    cfg = Config.fromfile(path)
    for key in (
        'train_dataloader',
        'val_dataloader',
        'test_dataloader',
        'tta_pipeline',
    ):
        shrink_sizes(cfg[key])
    for loader in (
        cfg.train_dataloader,
        cfg.val_dataloader,
        cfg.test_dataloader,
    ):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data[loader.dataset.type])
    cfg.val_dataloader.dataset.indices = 1
    shrink_sizes(cfg.model.data_preprocessor)
    shrink_sizes(cfg.model.test_cfg)
    cfg.model.backbone.update(arch=SHALLOW, init_cfg=None)
    # With one image, batch norm gets a single value after pooling to 1 x 1.
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg.update(max_iters=1, val_interval=1)
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint.interval = 1
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'{path.stem}-{work_dir.name}'
    return cfg


def test_there_are_ten():
    assert len(CONFIGS) == 10 and len(DEMOS) >= 1


@pytest.mark.parametrize('path', CONFIGS + DEMOS, ids=names(CONFIGS + DEMOS))
def test_builds_whole(path):
    cfg = Config.fromfile(path)
    assert cfg.default_scope == 'mmseg'
    for old in ('optimizer', 'lr_config', 'runner', 'data', 'total_iters'):
        assert old not in cfg
    model = MODELS.build(cfg.model)

    init_cfg = cfg.model.backbone.init_cfg
    assert (init_cfg.type, init_cfg.prefix) == ('Pretrained', 'backbone.')
    dataset = DATASETS.get(cfg.train_dataloader.dataset.type)
    classes = len(dataset.METAINFO['classes'])
    assert model.decode_head.num_classes == classes
    if model.with_auxiliary_head:
        assert model.auxiliary_head.num_classes == classes
    checks = [
        step.num_classes
        for step in cfg.train_dataloader.dataset.pipeline
        if step.type == 'CheckLabels'
    ]
    assert checks == [classes]
    assert MODELS.build(dict(cfg.tta_model, module=cfg.model)) is not None


@pytest.mark.parametrize('path', CONFIGS, ids=names(CONFIGS))
def test_name_says_the_recipe(path):
    cfg = Config.fromfile(path)
    arch, head, gpus, batch, thousands, size = re.fullmatch(
        r'vvt-(\w+)_(fpn|upernet)_(\d)xb(\d)-(\d+)k_\w+-(\d+)x\6', path.stem
    ).groups()
    assert cfg.model.backbone.arch == arch
    assert cfg.model.backbone.init_cfg.checkpoint.endswith(
        f'vvt-{arch}_in1k.pth'
    )
    assert (
        cfg.model.decode_head.type
        == dict(fpn='FPNHead', upernet='UPerHead')[head]
    )
    assert cfg.train_dataloader.batch_size == int(batch)
    assert cfg.auto_scale_lr.base_batch_size == int(gpus) * int(batch)
    assert cfg.train_cfg.max_iters == int(thousands) * 1000
    assert cfg.param_scheduler[-1].end == int(thousands) * 1000
    assert tuple(cfg.model.data_preprocessor.size) == (int(size), int(size))
    assert cfg.optim_wrapper.type == 'AutoAmpOptimWrapper'


def test_parameters_and_multiply_adds_of_the_paper():
    """The table printed by get_flops.py matches that of the paper."""
    paths = [
        p
        for p in CONFIGS
        if p.stem.rsplit('_', 2)[0] in PUBLISHED and 'ade20k' in p.stem
    ]
    assert len(paths) == len(PUBLISHED)
    done = run_tool(
        'tools/analysis_tools/get_flops.py', *paths, '--shape', 512
    )
    assert done.returncode == 0, done.stdout
    found = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if line.startswith('vvt-') and len(words) == 4:
            found[words[0].rsplit('_', 2)[0]] = (
                float(words[2]),
                float(words[3]),
            )
    assert set(found) == set(PUBLISHED)
    for name, (parameters, multiply_adds) in PUBLISHED.items():
        assert found[name][0] == pytest.approx(parameters, abs=0.15), name
        assert found[name][1] == pytest.approx(multiply_adds, rel=0.01), name


@pytest.mark.parametrize('path', CONFIGS, ids=names(CONFIGS))
def test_one_step_on_the_true_layout(path, data, tmp_path):
    cfg = small_run(path, data, tmp_path)
    # The warm-up of UPerNet starts at 1e-6 times the learning rate.
    for scheduler in cfg.param_scheduler:
        scheduler.pop('start_factor', None)
    runner = Runner.from_cfg(cfg)
    model = runner.model
    model.init_weights()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}

    runner.train()
    assert runner.iter == 1
    assert (tmp_path / 'iter_1.pth').is_file()
    moved = [
        k for k, p in model.named_parameters() if not torch.equal(p, before[k])
    ]
    for part in ('backbone.block1', 'backbone.block4', 'decode_head'):
        assert any(key.startswith(part) for key in moved), part
    assert all(p.isfinite().all() for p in model.parameters())

    groups = runner.optim_wrapper.optimizer.param_groups
    decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    projection = model.backbone.patch_embed1.proj
    if 'upernet' in path.stem:
        assert decay[id(model.backbone.norm1.weight)] == 0
        assert decay[id(projection.bias)] == 0.01
        assert decay[id(projection.weight)] == 0.01
    else:
        assert set(decay.values()) == {1e-4}


@pytest.mark.parametrize('shape', [(128, 128), (64, 128)], ids=str)
@pytest.mark.parametrize(
    'name,size',
    [('vvt-nano_fpn_digit-scenes', 24), ('vvt-nano_fpn_digit-scenes-3x', 48)],
)
def test_scenes_labels_are_those_in_the_middle(name, size, shape, tmp_path):
    """Resized labels are sampled at pixel centres, without a shift."""
    from mmengine.dataset import Compose

    labels = np.random.default_rng(0).integers(0, 11, shape, np.uint8)
    files = [str(tmp_path / file) for file in ('image.png', 'labels.png')]
    for file in files:
        cv2.imwrite(file, labels)
    cfg = Config.fromfile(ROOT / 'configs' / 'demo' / f'{name}.py')
    packed = Compose(cfg.train_dataloader.dataset.pipeline)(
        dict(
            img_path=files[0],
            seg_map_path=files[1],
            label_map=None,
            reduce_zero_label=False,
            seg_fields=[],
        )
    )
    # The centre of every third label is between two pixels.
    rows, cols = (
        np.delete(np.arange(n * size // 128), np.s_[1::3]) for n in shape
    )
    expected = labels[
        np.ix_(*(((i + 0.5) * 128 / size).astype(int) for i in (rows, cols)))
    ]
    found = packed['data_samples'].gt_sem_seg.data[0].numpy()
    assert found.shape == tuple(n * size // 128 for n in shape)
    assert np.array_equal(found[np.ix_(rows, cols)], expected)
    assert packed['inputs'].shape == (3, *(n * 96 // 128 for n in shape))
