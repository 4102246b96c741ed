"""Tests of the checks before a run: reported and accepted configs."""

import copy

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend, register_backend

from mmvvt.errors import PreflightError, UserError
from mmvvt.preflight import (
    build_model,
    check_testing,
    check_training,
    explain_error,
    read_config,
)

ARCH = dict(
    embed_dims=[16, 24, 32, 40],
    num_heads=[1, 1, 2, 2],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
)
BACKBONE = dict(type='VVT', arch=ARCH)


def problems(cfg, checkpoint=None):
    """Return all lines that the checks report."""
    cfg = read_config(cfg)
    try:
        if checkpoint is None:
            check_training(cfg)
        else:
            check_testing(cfg, str(checkpoint))
    except PreflightError as error:
        lines = str(error).splitlines()
        assert len(lines) > 1
        return lines
    except UserError as error:
        assert '\n' not in str(error)
        return [str(error)]
    return []


def loader(dataset, **settings):
    return dict(
        dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dataset,
        ),
        **settings,
    )


# -- classification -----------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """Folder with images of three classes and a list of their labels."""
    lines = []
    for label, name in enumerate('abc'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for number in range(3):
            path = tmp_path / 'images' / name / f'{number}.png'
            cv2.imwrite(str(path), np.full((40, 40, 3), label, np.uint8))
            lines.append(f'{name}/{number}.png {label}')
    (tmp_path / 'list.txt').write_text('\n'.join(lines))
    return tmp_path


def classifier(root, num_classes=3, **changes):
    dataset = dict(
        type='CustomDataset',
        data_root=str(root),
        data_prefix='images',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(32, 32)),
            dict(type='PackInputs'),
        ],
    )
    cfg = dict(
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier',
            backbone=dict(BACKBONE),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead', num_classes=num_classes, in_channels=40
            ),
        ),
        data_preprocessor=dict(num_classes=num_classes),
        train_dataloader=loader(dict(dataset)),
        val_dataloader=loader(dict(dataset)),
        val_evaluator=dict(type='Accuracy', topk=(1,)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook')),
    )
    cfg['test_dataloader'] = cfg['val_dataloader']
    cfg['test_evaluator'] = cfg['val_evaluator']
    cfg = Config(cfg)
    cfg.merge_from_dict(changes)
    return cfg


def test_a_good_run_has_no_problems(images):
    assert problems(classifier(images)) == []
    listed = {
        'train_dataloader.dataset.ann_file': 'list.txt',
        'val_evaluator': [dict(type='Accuracy', topk=1)],
        'default_hooks.checkpoint.save_best': 'accuracy/top1',
    }
    assert problems(classifier(images, **listed)) == []


@pytest.mark.parametrize('number', [2, 5])
def test_head_and_dataset_have_different_classes(images, number):
    found = problems(classifier(images, number))
    assert (
        f'model.head.num_classes is {number}, but train_dataloader '
        '(CustomDataset) has 3 classes; they must be equal'
    ) in found
    assert (
        f'data_preprocessor.num_classes is {number}, but train_dataloader '
        '(CustomDataset) has 3 classes; they must be equal'
    ) in found


def test_a_classifier_is_tested_on_some_of_its_classes(images):
    weights = images / 'weights.pth'

    def test(num_classes):
        cfg = classifier(images, num_classes)
        torch.save(build_model(read_config(cfg)).state_dict(), weights)
        return problems(cfg, weights)

    assert test(5) == []
    assert 'has label 2, but model.head.num_classes is 2' in test(2)[0]


@pytest.mark.parametrize('labels', [(0, 5), (-1, 1)])
def test_labels_outside_the_head(images, labels):
    text = '\n'.join(
        f'{"abc"[i % 3]}/0.png {label}' for i, label in enumerate(labels)
    )
    (images / 'list.txt').write_text(text)
    (line,) = problems(
        classifier(
            images,
            **{'train_dataloader.dataset.ann_file': 'list.txt'},
            **{'val_dataloader.dataset.ann_file': 'list.txt'},
        ).copy()
    )[:1]
    wrong = max(labels, key=abs) if max(labels) > 2 else min(labels)
    assert f'has label {wrong}, but model.head.num_classes is 3' in line
    assert str(images / 'images') in line and 'allowed are 0 to 2' in line


def test_topk_and_best_metric(images):
    found = problems(
        classifier(
            images,
            **{
                'val_evaluator.topk': (1, 5),
                'default_hooks.checkpoint.save_best': 'accuracy/top3',
            },
        )
    )
    assert found == [
        'val_evaluator (Accuracy) has topk=(1, 5), but model.head.num_classes '
        'is 3: topk must not exceed it; set val_evaluator.topk=1',
        "default_hooks.checkpoint.save_best is 'accuracy/top3', but "
        'val_evaluator computes accuracy/top1, accuracy/top5',
    ]
    (line,) = problems(
        classifier(images, **{'default_hooks.checkpoint.save_best': 'quality'})
    )
    assert line.startswith('default_hooks.checkpoint: Cannot infer the rule')


def test_all_problems_are_reported_at_once(images, tmp_path):
    cfg = classifier(images, 4)
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint='none.pth', prefix='backbone'
    )
    cfg.val_dataloader.dataset.data_prefix = 'missing'
    cfg.val_evaluator.topk = 9
    text = '\n'.join(problems(cfg))
    for part in (
        'no such pretrained checkpoint: none.pth',
        f'does not exist: {images}/missing',
        'model.head.num_classes is 4',
        'has topk=9',
    ):
        assert part in text


def test_a_test_set_without_labels(images):
    cfg = classifier(images)
    cfg.test_dataloader.dataset.with_label = False
    weights = images / 'weights.pth'
    torch.save(build_model(read_config(cfg)).state_dict(), weights)
    assert problems(cfg, weights) == []


# -- learning rate ------------------------------------------------------------


def scaled(root, scheduler, batch_size=2, launcher='none', enable=True):
    """A run whose learning rate is 1e-3 for a batch size of 1000."""
    return classifier(
        root,
        train_dataloader=dict(batch_size=batch_size),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        param_scheduler=scheduler,
        auto_scale_lr=dict(enable=enable, base_batch_size=1000),
        launcher=launcher,
    )


COSINE = dict(type='CosineAnnealingLR', eta_min=1e-5, end=3)


def test_scaled_rate_below_the_end_of_its_schedule(images):
    linear = dict(type='LinearLR', start_factor=0.1, end=1)
    assert problems(scaled(images, [linear, COSINE])) == [
        'param_scheduler[1].eta_min is 1e-05, but the learning rate scaled to '
        'the batch size 2 is 2e-06, so that it would rise: set '
        'eta_min_ratio=0.01 in place of eta_min'
    ]
    (found,) = problems(
        scaled(images, dict(type='mmengine.PolyLR', eta_min=1e-3))
    )
    assert found.endswith('so that it would rise: set a lower eta_min')


@pytest.mark.parametrize(
    'options',
    [
        dict(scheduler=COSINE, enable=False),
        dict(scheduler=COSINE, batch_size=10),
        dict(scheduler=[dict(COSINE, eta_min=0.0)]),
        dict(
            scheduler=dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, end=3)
        ),
        # An intended warm-up, and a schedule of another value
        dict(scheduler=dict(COSINE, eta_min=1e-2)),
        dict(scheduler=dict(COSINE, type='CosineAnnealingMomentum')),
    ],
    ids=str,
)
def test_scaled_rates_that_do_not_rise(options, images):
    assert problems(scaled(images, **options)) == []


@pytest.mark.parametrize(
    'launcher,name',
    [
        ('pytorch', 'WORLD_SIZE'),
        ('slurm', 'SLURM_NTASKS'),
        ('mpi', 'OMPI_COMM_WORLD_SIZE'),
    ],
)
def test_the_batch_of_all_processes_counts(
    launcher, name, images, monkeypatch
):
    cfg = scaled(images, COSINE, launcher=launcher)
    monkeypatch.setenv(name, '4')
    (found,) = problems(cfg)
    assert 'batch size 8 is 8e-06' in found
    monkeypatch.setenv(name, '5')
    assert problems(cfg) == []


@pytest.mark.parametrize(
    'changes,processes,expected',
    [
        (dict(batch_size=9), 1, None),
        (dict(batch_size=10), 1, '9 images and train_dataloader.batch_size'),
        (dict(batch_size=5), 2, None),  # 10 of 9 images, in two processes
        (dict(batch_size=6), 2, 'a process has 5 images'),
        (
            dict(batch_size=10, sampler=dict(type='RepeatAugSampler')),
            1,
            'set drop_last=False or a smaller batch_size',
        ),
        (
            dict(batch_size=10, sampler=dict(type='InfiniteSampler')),
            1,
            None,
        ),
        (dict(batch_size=10, drop_last=False), 1, None),
    ],
    ids=str,
)
def test_drop_last_leaves_a_batch(
    changes, processes, expected, images, monkeypatch
):
    if processes > 1:
        monkeypatch.setenv('WORLD_SIZE', str(processes))
    cfg = classifier(
        images,
        train_dataloader=dict(dict(drop_last=True), **changes),
        launcher='none' if processes == 1 else 'pytorch',
    )
    found = problems(cfg)
    assert len(found) == (expected is not None)
    if expected:
        assert expected in found[0]


# -- paths and names are resolved as during the run ---------------------------


def test_home_folder(images, monkeypatch):
    monkeypatch.setenv('HOME', str(images))
    cfg = classifier(
        '', **{'train_dataloader.dataset.data_prefix': '~/images'}
    )
    cfg.val_dataloader = cfg.train_dataloader
    weights = images / 'weights.pth'
    torch.save(build_model(read_config(cfg)).state_dict(), weights)
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint='~/weights.pth', prefix='backbone'
    )
    assert problems(cfg) == []
    cfg.test_dataloader = cfg.train_dataloader
    assert problems(cfg, '~/weights.pth') == []


@pytest.mark.parametrize('prefix', ['backbone', 'backbone.', None])
def test_prefix_of_pretrained_weights(images, prefix):
    cfg = classifier(images)
    model = build_model(read_config(cfg))
    path = images / 'weights.pth'
    state = model.state_dict() if prefix else model.backbone.state_dict()
    if prefix is None:  # as saved from a distributed model
        state = {f'module.{key}': value for key, value in state.items()}
    torch.save(dict(state_dict=state), path)
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=str(path), prefix=prefix
    )
    assert problems(cfg) == []
    cfg.model.backbone.init_cfg.prefix = 'neck'
    (line,) = problems(cfg)
    assert 'does not match the architecture' in line


@register_backend('mmvvt_test_mapped', prefixes='mapped')
class MappedBackend(LocalBackend):
    """File backend that maps its paths to local paths."""

    root = ''

    def __init__(self, path_mapping=None):
        self.path_mapping = path_mapping or {}

    def _map(self, path):
        path = str(path).replace('mapped://', self.root + '/')
        for old, new in self.path_mapping.items():
            path = path.replace(old, new)
        return path

    def get(self, path):
        return super().get(self._map(path))

    def get_text(self, path, encoding='utf-8'):
        return super().get_text(self._map(path), encoding)

    def isdir(self, path):
        return super().isdir(self._map(path))

    def isfile(self, path):
        return super().isfile(self._map(path))

    def exists(self, path):
        return super().exists(self._map(path))

    def list_dir_or_file(self, path, *arguments, **keywords):
        return super().list_dir_or_file(
            self._map(path), *arguments, **keywords
        )


def test_url_of_a_file_backend(images, monkeypatch):
    monkeypatch.setattr(MappedBackend, 'root', str(images))
    cfg = classifier(
        'mapped://',
        **{
            'train_dataloader.dataset.data_prefix': 'images',
            'train_dataloader.dataset.ann_file': 'list.txt',
            'val_dataloader.dataset.ann_file': 'list.txt',
        },
    )
    assert problems(cfg) == []
    cfg.train_dataloader.dataset.data_prefix = 'none'
    (line,) = problems(cfg)
    assert 'the data folder does not exist: mapped://' in line


LAYER_DECAY = {
    'optim_wrapper': dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=8e-4),
        constructor='MergedOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.5),
    ),
}
WARM_UP = dict(type='LinearLR', start_factor=0.1, end=1)


@pytest.mark.parametrize(
    'changes,expected',
    [
        ({}, None),
        ({'param_scheduler': dict(type='PolyLR', eta_min=0.0)}, None),
        (
            {
                'param_scheduler': [
                    WARM_UP,
                    dict(type='CosineAnnealingLR', T_max=9, eta_min_ratio=0.1),
                ]
            },
            None,
        ),
        # 8e-4 * 0.5 ** 5 is above the minimum
        ({'param_scheduler': dict(type='PolyLR', eta_min=2e-5)}, None),
        (
            {
                'param_scheduler': [
                    WARM_UP,
                    dict(type='CosineAnnealingLR', T_max=9, eta_min=1e-4),
                ]
            },
            'param_scheduler[1] (CosineAnnealingLR) has eta_min=0.0001, but '
            'the first layers start at a learning rate of 2.5e-05 with '
            'layer_decay_rate=0.5, which would rise: set eta_min_ratio '
            'instead, or eta_min=0',
        ),
        (
            {'param_scheduler': dict(type='OneCycleLR', eta_max=1e-3)},
            'param_scheduler[0] (OneCycleLR) gives all layers the same '
            'learning rate, whatever layer_decay_rate is: use another '
            'scheduler',
        ),
        (
            {'optim_wrapper.constructor': 'DefaultOptimWrapperConstructor'},
            'optim_wrapper.paramwise_cfg.layer_decay_rate has no effect with '
            "mmengine's DefaultOptimWrapperConstructor: set "
            "optim_wrapper.constructor='MergedOptimWrapperConstructor'",
        ),
        (
            {
                'model.backbone': dict(
                    _delete_=True, type='LeNet5', num_classes=-1
                ),
            },
            'layer_decay_rate needs a backbone with the method '
            'get_layer_depth, which LeNet5 does not support',
        ),
        (
            {'optim_wrapper.paramwise_cfg.layer_decay_rate': 2},
            'paramwise_cfg.layer_decay_rate must be greater than 0 and at '
            'most 1, got 2',
        ),
    ],
)
def test_layer_decay(images, changes, expected):
    options = copy.deepcopy({**LAYER_DECAY, **changes})
    found = problems(classifier(images, **options))
    assert found == ([] if expected is None else [expected])


def test_layer_decay_without_a_constructor(images):
    options = copy.deepcopy(LAYER_DECAY)
    del options['optim_wrapper']['constructor']
    (line,) = problems(classifier(images, **options))
    assert "no effect with mmengine's DefaultOptimWrapper" in line
    # the same schedule is refused with the constructor of mmpretrain
    options['optim_wrapper']['constructor'] = (
        'LearningRateDecayOptimWrapperConstructor'
    )
    options['param_scheduler'] = [dict(type='PolyLR', eta_min=1e-4)]
    (line,) = problems(classifier(images, **options))
    assert 'param_scheduler[0] (PolyLR) has eta_min=0.0001' in line


# -- segmentation -------------------------------------------------------------


def label_maps(root, values, shape=(40, 40), dtype=np.uint8, split='train'):
    """Write three images, and label maps with stripes of the values."""
    for kind in ('images', 'labels'):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    stripes = np.resize(np.asarray(values, dtype), shape)
    for number in range(3):
        image = np.full((40, 40, 3), number, np.uint8)
        name = f'{split}/{number}.png'
        cv2.imwrite(str(root / 'images' / name), image)
        cv2.imwrite(str(root / 'labels' / name), stripes)


def segmentor(root, num_classes=2, **changes):
    pytest.importorskip('mmseg')
    dataset = dict(
        type='BaseSegDataset',
        data_root=str(root),
        img_suffix='.png',
        data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
        metainfo=dict(classes=[f'c{i}' for i in range(num_classes)]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    )
    cfg = dict(
        default_scope='mmseg',
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
            backbone=dict(BACKBONE, out_indices=(0, 1, 2, 3)),
            decode_head=dict(
                type='FCNHead',
                in_channels=40,
                channels=8,
                num_convs=1,
                num_classes=num_classes,
                norm_cfg=dict(type='SyncBN', requires_grad=True),
            ),
            train_cfg=dict(),
            test_cfg=dict(mode='whole'),
        ),
        train_dataloader=loader(dict(dataset)),
        val_dataloader=loader(dict(dataset)),
        val_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
    )
    cfg = Config(cfg)
    cfg.merge_from_dict(changes)
    cfg.test_dataloader = cfg.val_dataloader
    cfg.test_evaluator = cfg.val_evaluator
    return cfg


def test_good_label_maps(tmp_path):
    label_maps(tmp_path, [0, 1, 255])
    assert problems(segmentor(tmp_path)) == []


@pytest.mark.parametrize(
    'values,dtype,expected',
    [
        ([0, 255], np.uint8, 'have only the values [0, 255], of which 255'),
        ([0], np.uint8, 'have only the values [0]'),
        ([0, 1, 5], np.uint8, 'has label values [5] that are out of range'),
        ([0, 256, 300], np.uint16, 'contains values such as [256, 300]'),
        ([0, 256, 257], np.uint16, 'mmseg converts label maps to 8 bits'),
    ],
)
def test_values_of_label_maps(tmp_path, values, dtype, expected):
    label_maps(tmp_path, values, dtype=dtype)
    found = problems(segmentor(tmp_path))
    line = found[0]
    assert expected in line and f'{tmp_path}/labels/train/0.png' in line
    assert line.startswith('train_dataloader (BaseSegDataset): ')


def test_rgb_masks(tmp_path):
    label_maps(tmp_path, [0, 1], shape=(40, 40, 3))
    line = problems(segmentor(tmp_path))[0]
    assert 'has shape (40, 40, 3), but a label map has one class' in line


def test_reduced_and_mapped_labels(tmp_path):
    label_maps(tmp_path, [0, 1, 2])
    assert 'label values [2]' in problems(segmentor(tmp_path))[0]
    reduced = {
        f'{split}_dataloader.dataset.reduce_zero_label': True
        for split in ('train', 'val')
    }
    assert problems(segmentor(tmp_path, **reduced)) == []


def test_damaged_label_map(tmp_path):
    label_maps(tmp_path, [0, 1])
    (tmp_path / 'labels' / 'train' / '1.png').write_bytes(b'\x89PNG')
    line = problems(segmentor(tmp_path))[0]
    assert 'labels/train/1.png cannot be read as an image' in line


def test_classes_of_a_segmentor(tmp_path):
    label_maps(tmp_path, [0, 1])
    found = problems(
        segmentor(tmp_path, **{'model.decode_head.num_classes': 3})
    )
    assert found == [
        'model.decode_head.num_classes is 3, but train_dataloader '
        '(BaseSegDataset) has 2 classes; they must be equal'
    ]


def test_segmentation_images_without_labels(tmp_path):
    label_maps(tmp_path, [0, 1])
    cfg = segmentor(tmp_path)
    cfg.test_dataloader = Config(dict(a=cfg.val_dataloader.to_dict())).a
    cfg.test_dataloader.dataset.pipeline.pop(1)
    cfg.test_dataloader.dataset.data_prefix = dict(img_path='images/train')
    cfg.test_evaluator = dict(type='IoUMetric', format_only=True)
    weights = tmp_path / 'weights.pth'
    torch.save(build_model(read_config(cfg)).state_dict(), weights)
    assert problems(cfg, weights) == []
    cfg.test_dataloader.dataset.data_prefix = dict(
        img_path='images/train', seg_map_path='labels/none'
    )
    assert problems(cfg, weights) == []


def test_backend_arguments(tmp_path, monkeypatch):
    label_maps(tmp_path, [0, 7])
    mapping = dict(
        backend='mmvvt_test_mapped',
        path_mapping={'/somewhere/else': str(tmp_path)},
    )
    cfg = segmentor('/somewhere/else')
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.backend_args = mapping
    found = problems(cfg)
    assert len(found) == 2
    assert (
        '/somewhere/else/labels/train/0.png has label values [7]' in found[0]
    )


# -- combinations that are known to fail --------------------------------------


def test_batch_norm_of_one_image(tmp_path):
    label_maps(tmp_path, [0, 1])
    pooling = {
        'model.decode_head.type': 'PSPHead',
        'model.decode_head.pool_scales': (1, 2),
    }
    cfg = segmentor(tmp_path, **pooling)
    del cfg.model.decode_head['num_convs']
    (line,) = problems(cfg)  # three images in batches of two
    assert line == (
        'the last batch of an epoch has one image (3 images in batches of 2), '
        'so that the batch normalisation decode_head.psp_modules.0.1.bn gets '
        'one value per channel and cannot be trained: set '
        'train_dataloader.drop_last=True, or use more than one GPU'
    )
    cfg.train_dataloader.batch_size = 1
    (line,) = problems(cfg)
    assert line.startswith('train_dataloader.batch_size is 1, so that')
    assert 'set train_dataloader.batch_size to 2 or more' in line
    cfg.train_dataloader.batch_size = 3
    assert problems(cfg) == []
    # without global pooling, one image has many values
    assert (
        problems(segmentor(tmp_path, **{'train_dataloader.batch_size': 1}))
        == []
    )


@pytest.mark.parametrize(
    'place', ['model.pretrained', 'model.backbone.pretrained']
)
def test_pretrained_as_a_keyword(tmp_path, place):
    label_maps(tmp_path, [0, 1])
    (line,) = problems(segmentor(tmp_path, **{place: 'weights.pth'}))
    assert "VVT does not support pretrained='weights.pth'" in line
    assert "init_cfg=dict(type='Pretrained'" in line


def test_unknown_classes_and_arguments(images):
    (line,) = problems(classifier(images, **{'model.backbone.archh': 'tiny'}))
    assert "VVT has no argument 'archh'" in line
    (line,) = problems(classifier(images, **{'model.head.type': 'NoHead'}))
    assert 'NoHead is not registered in mmpretrain::model' in line


@pytest.mark.parametrize(
    'changes,text',
    [
        (
            {
                'model.backbone.out_indices': (0, 1),
                'model.decode_head.in_index': 1,
            },
            'model.backbone.out_indices is (0, 1)',
        ),
        ({'model.decode_head.in_index': 2}, 'use the outputs [2]'),
        (
            {'model.decode_head.in_index': 2, 'find_unused_parameters': True},
            None,
        ),
        ({'model.decode_head.in_index': 2, 'launcher': 'none'}, None),
        ({}, None),
    ],
)
def test_unused_stages(tmp_path, changes, text):
    label_maps(tmp_path, [0, 1])
    found = problems(segmentor(tmp_path, **{'launcher': 'pytorch', **changes}))
    if text is None:
        assert found == []
    else:
        (line,) = found
        assert text in line and 'set find_unused_parameters=True' in line


# -- errors in the first steps ------------------------------------------------


def test_error_of_a_custom_batch_norm():
    with pytest.raises(ValueError) as caught:
        torch.nn.BatchNorm1d(3)(torch.ones(1, 3))
    message = str(explain_error(caught.value))
    assert 'set train_dataloader.batch_size to 2 or more' in message
    assert explain_error(ValueError('something else')) is None


def test_error_of_parameters_without_gradient(tmp_path):
    """The error of DistributedDataParallel itself, with one process."""
    import torch.distributed as dist

    dist.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
        layers.forward = lambda x: layers[0](x)
        model = torch.nn.parallel.DistributedDataParallel(layers)
        with pytest.raises(RuntimeError) as caught:
            for _ in range(2):
                model(torch.ones(1, 2)).sum().backward()
    finally:
        dist.destroy_process_group()
    message = str(explain_error(caught.value))
    assert 'set find_unused_parameters=True' in message
