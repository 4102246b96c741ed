"""Tests of the channels of images, and of images with 16 bits."""

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config

from mmvvt.datasets import GuardedPipeline
from mmvvt.errors import UserError
from mmvvt.preflight import check_training, read_config

from conftest import write_coco

ARCH = dict(
    embed_dims=[16, 24, 32, 40],
    num_heads=[1, 1, 2, 2],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
)


def write_images(root, image, suffix='.png'):
    for name in 'abc':
        (root / name).mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(root / name / f'0{suffix}'), image)


def noise(channels, bits):
    shape = (40, 44, channels) if channels > 1 else (40, 44)
    values = np.random.RandomState(0).randint(0, 2**bits, shape)
    return values.astype(np.uint16 if bits > 8 else np.uint8)


def classifier(root, channels=3, load=None, **preprocessor):
    dataset = dict(
        type='CustomDataset',
        data_root=str(root),
        extensions=('.png', '.tif', '.pgm', '.ppm'),
        pipeline=[
            dict(dict(type='LoadImageFromFile'), **(load or {})),
            dict(type='Resize', scale=(32, 32)),
            dict(type='PackInputs'),
        ],
    )
    return Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                backbone=dict(type='VVT', arch=ARCH, in_channels=channels),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=3, in_channels=40),
            ),
            data_preprocessor=dict(num_classes=3, **preprocessor),
            train_dataloader=dict(
                batch_size=3,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dataset,
            ),
            load_from=None,
        )
    )


def problems(cfg):
    try:
        found = check_training(read_config(cfg))
    except UserError as error:
        return str(error).splitlines()
    return [line for line in found if 'random weights' not in line]


UNCHANGED = dict(color_type='unchanged', to_float32=True)


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_all_bits_are_loaded(channels, suffix, tmp_path):
    """The numbers in the files reach the model, in OpenCV's order."""
    image = noise(channels, 16)
    write_images(tmp_path, image, suffix)
    cfg = classifier(
        tmp_path, channels, UNCHANGED, mean=[9.0] * channels, std=[2.0]
    )
    assert problems(cfg) == []
    path = str(tmp_path / 'a' / f'0{suffix}')
    guarded = GuardedPipeline([dict(type='LoadImageFromFile', **UNCHANGED)])
    loaded = guarded(dict(img_path=path))['img']
    assert loaded.dtype == np.float32 and np.array_equal(loaded, image)


@pytest.mark.parametrize(
    'suffix,channels', [('.png', 1), ('.png', 3), ('.tif', 3), ('.ppm', 3)]
)
def test_loading_8_of_16_bits_is_mentioned(suffix, channels, tmp_path):
    image = noise(channels, 16)
    write_images(tmp_path, image, suffix)
    path = tmp_path / 'a' / f'0{suffix}'
    # What mmcv does without a warning
    loaded = LoadImageFromFile()(dict(img_path=str(path)))['img']
    assert loaded.dtype == np.uint8
    (line,) = problems(classifier(tmp_path))
    assert line == (
        f'train_dataloader (CustomDataset): {path} has 16 bits per channel, '
        'of which LoadImageFromFile keeps 8; to keep all, use '
        "LoadImageFromFile(color_type='unchanged', to_float32=True), and "
        'mean and std for 16 bits'
    )
    # Pillow also reduces colour images when they are loaded unchanged.
    pillow = dict(UNCHANGED, imdecode_backend='pillow')
    if channels == 3 and suffix != '.ppm':
        assert 'keeps 8' in problems(classifier(tmp_path, 3, pillow))[0]


def test_8_bits_are_not_mentioned(tmp_path):
    for number, suffix in enumerate(('.png', '.tif', '.ppm')):
        write_images(tmp_path / str(number), noise(3, 8), suffix)
        assert problems(classifier(tmp_path / str(number))) == []


def test_boxes_on_images_with_16_bits(tmp_path):
    """The folder is read, and not the whole annotation file once more."""
    pytest.importorskip('mmdet')
    write_coco(tmp_path / 'coco', ('cat', 'dog', 'bird'))
    dataset = dict(
        type='mmdet.CocoDataset',
        data_root=str(tmp_path / 'coco'),
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017'),
        metainfo=dict(classes=('cat', 'dog', 'bird')),
        pipeline=[dict(type='LoadImageFromFile')],
    )
    cfg = Config(
        dict(
            default_scope='mmdet',
            model=dict(type='VVT', arch=ARCH),
            train_dataloader=dict(batch_size=2, dataset=dataset),
        )
    )
    assert problems(cfg) == []
    path = tmp_path / 'coco/train2017/000000000000.jpg'
    assert cv2.imwrite(str(path.with_suffix('.png')), noise(3, 16))
    path.with_suffix('.png').rename(path)  # the content decides
    assert f'{path} has 16 bits per channel' in problems(cfg)[0]


@pytest.mark.parametrize('name', ['mean', 'std'])
def test_values_of_the_data_preprocessor(name, tmp_path):
    write_images(tmp_path, noise(4, 8))
    values = dict(mean=[1.0] * 4, std=[1.0] * 4)
    assert problems(classifier(tmp_path, 4, UNCHANGED, **values)) == []
    values[name] = [1.0] * 3
    (line,) = problems(classifier(tmp_path, 4, UNCHANGED, **values))
    assert line == (
        f'{name} of the data_preprocessor has 3 values, but in_channels of '
        'the backbone is 4: give one value for each channel, or one for all'
    )


@pytest.mark.parametrize(
    'channels,load,found,flag',
    [
        (4, {}, 3, 'unchanged'),
        (1, {}, 3, 'grayscale'),
        (3, UNCHANGED, 4, 'unchanged'),
    ],
)
def test_channels_of_images(channels, load, found, flag, tmp_path):
    write_images(tmp_path, noise(4, 8))
    (line,) = problems(classifier(tmp_path, channels, load))
    assert line == (
        f'train_dataloader (CustomDataset): images have {found} channels '
        f'after the pipeline, but in_channels of the backbone is {channels}; '
        f"see LoadImageFromFile(color_type='{flag}')"
    )
    grey = dict(color_type='grayscale')
    assert problems(classifier(tmp_path, 1, grey)) == []


def test_six_channels(tmp_path):
    """mmcv reads them with tifffile; other layouts are reported."""
    tifffile = pytest.importorskip('tifffile')
    image = noise(6, 16)
    load = dict(imdecode_backend='tifffile', to_float32=True)
    for name in 'abc':
        (tmp_path / name).mkdir()
        tifffile.imwrite(
            tmp_path / name / '0.tif',
            image,
            photometric='minisblack',
            planarconfig='contig',
        )
    assert problems(classifier(tmp_path, 6, load)) == []
    loaded = LoadImageFromFile(**load)(
        dict(img_path=str(tmp_path / 'a' / '0.tif'))
    )['img']
    assert np.array_equal(loaded, image)
    # One plane after the other: (C, H, W)
    for name in 'abc':
        tifffile.imwrite(
            tmp_path / name / '0.tif',
            image.transpose(2, 0, 1),
            photometric='minisblack',
            planarconfig='separate',
        )
    assert 'images have ' in problems(classifier(tmp_path, 6, load))[0]


def test_mmdet_normalises_more_than_three_channels_in_the_pipeline(tmp_path):
    pytest.importorskip('mmdet')
    values = dict(mean=[1.0] * 4, std=[2.0] * 4)
    cfg = classifier(tmp_path, 4)
    cfg.model.data_preprocessor = dict(type='mmdet.DetDataPreprocessor')
    cfg.model.data_preprocessor.update(values)
    cfg.pop('train_dataloader')
    lines = problems(cfg)
    assert lines[0].startswith(
        'mean of DetDataPreprocessor has 4 values, but mmdet takes 1 or 3: '
        'leave out mean and std, and add Normalize('
    )
    from mmengine.registry import TRANSFORMS

    normalise = TRANSFORMS.build(
        dict(type='mmcv.Normalize', to_rgb=False, **values)
        if 'mmcv' in TRANSFORMS.children
        else dict(type='Normalize', to_rgb=False, **values)
    )
    image = noise(4, 16)
    result = normalise(dict(img=image.astype(np.float32)))['img']
    np.testing.assert_allclose(result, (image - 1.0) / 2.0, rtol=1e-6)
    assert torch.from_numpy(result).shape == (40, 44, 4)
