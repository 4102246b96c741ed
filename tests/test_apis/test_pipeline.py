"""The predictor prepares images as the test data loader does."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope
from mmengine.runner import Runner

from mmvvt.apis import Predictor
from mmvvt.apis.pipeline import TestPipeline
from mmvvt.errors import UserError
from mmvvt.preflight import build_model, innermost_datasets, read_config

from conftest import ROOT

SHIPPED = sorted((ROOT / 'configs').glob('[!_]*/*.py'))
ARCH = dict(
    embed_dims=[16, 24, 32, 40],
    num_heads=[1, 1, 2, 2],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
)


@pytest.fixture(scope='module')
def photograph(tmp_path_factory):
    """Path of a PNG photograph ``(75, 101)`` with a label map of zeros."""
    from sklearn.datasets import load_sample_image

    folder = tmp_path_factory.mktemp('photograph')
    image = load_sample_image('flower.jpg')[100:400:4, 100:504:4, ::-1]
    cv2.imwrite(str(folder / 'image.png'), image)
    cv2.imwrite(str(folder / 'labels.png'), np.zeros_like(image[..., 0]))
    return folder


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs(path, photograph):
    """Inputs and metadata equal those of the pipeline of the dataset."""
    pytest.importorskip('mmdet')
    cfg = read_config(str(path))
    dataset = next(innermost_datasets(cfg.test_dataloader.dataset))
    image = str(photograph / 'image.png')
    if 'CIFAR' in str(dataset.type) or 'Fashion' in str(dataset.type):
        # The dataset yields an RGB or grayscale array.
        flag = cv2.IMREAD_COLOR if 'CIFAR' in dataset.type else 0
        if 'atto' in path.stem:
            # It pads images of the size of the dataset, and crops others at
            # random.
            small = cv2.imread(image)[:28, :28]
            image = str(photograph / 'small.png')
            cv2.imwrite(image, small)
        array = cv2.imread(image, flag)
        sample = dict(img=array[..., ::-1] if array.ndim == 3 else array)
        sample['img_shape'] = sample['ori_shape'] = array.shape[:2]
    else:
        sample = dict(
            img_path=image,
            img_id=0,
            sample_idx=0,
            gt_label=0,
            instances=[],
            height=75,
            width=101,
            seg_map_path=str(photograph / 'labels.png'),
            seg_fields=[],
            reduce_zero_label=dataset.get('type') == 'ADE20KDataset',
            label_map=None,
        )
    expected = Compose(dataset.pipeline)(sample)
    batch, shown = TestPipeline(cfg)(image)
    assert torch.equal(batch['inputs'][0], expected['inputs'])
    (ours,) = batch['data_samples']
    theirs = expected['data_samples']
    assert {k: ours.get(k) for k in ours.metainfo_keys() if k != 'img_path'}
    for key in theirs.metainfo_keys():
        if key not in ('seg_map_path', 'reduce_zero_label'):
            assert np.all(ours.get(key) == theirs.get(key)), key
    assert shown.dtype == np.uint8 and shown.shape[2] == 3
    if 'gray' not in str(dataset.pipeline) and shown.shape == (75, 101, 3):
        if 'Fashion' not in str(dataset.type):
            assert (shown == cv2.imread(image)[..., ::-1]).all()


# -- custom pipelines, against the test loop ----------------------------------


def classifier(pipeline, channels, dataset=None, **preprocessor):
    """Config of a small classifier of three classes."""
    dataset = dataset or dict(type='CustomDataset', data_root='ROOT')
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
            test_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=dict(type='default_collate'),
                dataset=dict(dataset, pipeline=pipeline, test_mode=True),
            ),
        )
    )


def predict_both(cfg, folder, tmp_path):
    """Return the scores of each image from the test loop and predictor."""
    cfg.test_dataloader.dataset.data_root = str(folder)
    torch.manual_seed(0)
    cfg = read_config(cfg)
    model = build_model(cfg)
    model.init_weights()
    # Make the output depend on the input.
    for name, parameter in model.named_parameters():
        if name.endswith('weight') and parameter.dim() > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    checkpoint = str(tmp_path / 'random.pth')
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    model.eval()
    expected = {}
    with torch.no_grad():
        for batch in Runner.build_dataloader(cfg.test_dataloader):
            for sample in model.test_step(batch):
                expected[sample.img_path] = sample.pred_score
    predictor = Predictor(cfg, checkpoint, device='cpu')
    assert len(expected) == 6
    actual = {}
    for path in expected:
        result = predictor(path)
        scores = torch.zeros(3)
        scores[result['labels']] = torch.tensor(result['scores'])
        actual[path] = scores
    first, *others = expected.values()
    assert any((first - other).abs().max() > 1e-3 for other in others)
    for path, scores in expected.items():
        assert torch.allclose(scores, actual[path], atol=2e-6), path
    return predictor


def write_images(root, image, suffix='.png'):
    """Write six images to the folders of three classes."""
    for number in range(6):
        folder = root / 'images' / 'abc'[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        part = np.ascontiguousarray(image[number : number + 60])
        if number % 2:
            part = part[::-1]
        assert cv2.imwrite(str(folder / f'{number}{suffix}'), part)
    return root / 'images'


@pytest.fixture
def colours(photograph):
    return cv2.imread(str(photograph / 'image.png'))


RESIZE = [dict(type='Resize', scale=(64, 48)), dict(type='PackInputs')]


def test_16_bit_grayscale(colours, tmp_path):
    deep = colours[..., 0].astype(np.uint16) * 150 + 7
    root = write_images(tmp_path, deep)
    load = dict(type='LoadImageFromFile', color_type='unchanged')
    cfg = classifier([load, *RESIZE], 1, mean=[15000.0], std=[9000.0])
    predictor = predict_both(cfg, root, tmp_path)
    _, shown = predictor.pipeline(str(root / 'a' / '0.png'))
    assert shown.shape == (60, 101, 3) and shown.max() == 255


@pytest.mark.parametrize('backend', ['cv2', 'tifffile'])
def test_4_channels(colours, tmp_path, backend):
    if backend == 'tifffile':
        tifffile = pytest.importorskip('tifffile')
    four = np.dstack([colours, colours[..., 1] // 2])
    root = write_images(tmp_path, four, '.tiff')
    if backend == 'tifffile':
        for path in root.rglob('*.tiff'):
            tifffile.imwrite(path, cv2.imread(str(path), -1))
    load = dict(
        type='LoadImageFromFile',
        color_type='unchanged',
        imdecode_backend=backend,
    )
    dataset = dict(
        type='CustomDataset', data_root='ROOT', extensions=('.tiff',)
    )
    cfg = classifier(
        [load, *RESIZE], 4, dataset, mean=[100.0] * 4, std=[50.0] * 4
    )
    predict_both(cfg, root, tmp_path)


@pytest.mark.parametrize('color_type', ['color', 'grayscale', 'unchanged'])
@pytest.mark.parametrize('to_rgb', [True, False])
@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_8_bit_loaders(colours, tmp_path, color_type, to_rgb, backend):
    root = write_images(tmp_path, colours)
    load = dict(
        type='LoadImageFromFile',
        color_type=color_type,
        imdecode_backend=backend,
        to_float32=to_rgb,
    )
    channels = 1 if color_type == 'grayscale' else 3
    cfg = classifier(
        [load, *RESIZE],
        channels,
        mean=[120.0, 100.0, 80.0][:channels],
        std=[50.0, 60.0, 70.0][:channels],
        to_rgb=to_rgb and channels == 3,
    )
    predictor = predict_both(cfg, root, tmp_path)
    if color_type == 'color' and backend == 'cv2':
        path = str(root / 'a' / '0.png')
        assert predictor(cv2.imread(path)) == predictor(path)


@DATASETS.register_module()
class ArrayDataset:
    """Dataset that yields arrays, as mmpretrain's CIFAR does."""

    def __init__(self, data_root, pipeline, flag, rgb, test_mode=True):
        self.paths = sorted(map(str, Path(data_root).rglob('*.png')))
        self.flag, self.rgb = flag, rgb
        self.pipeline = Compose(pipeline)
        self.metainfo = dict(classes=('x', 'y', 'z'))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = cv2.imread(self.paths[index], self.flag)
        image = image[..., ::-1].copy() if self.rgb else image
        shape = image.shape[:2]
        return self.pipeline(
            dict(
                img=image,
                img_path=self.paths[index],
                img_shape=shape,
                ori_shape=shape,
            )
        )


@pytest.mark.parametrize(
    'flag,channels,rgb,to_rgb',
    [(1, 3, True, False), (1, 3, False, True), (0, 1, False, False)],
)
def test_datasets_of_arrays(colours, tmp_path, flag, channels, rgb, to_rgb):
    root = write_images(tmp_path, colours)
    dataset = dict(
        type='mmengine.ArrayDataset', data_root='ROOT', flag=flag, rgb=rgb
    )
    cfg = classifier(
        RESIZE,
        channels,
        dataset,
        mean=[120.0, 100.0, 80.0][:channels],
        std=[50.0, 60.0, 70.0][:channels],
        to_rgb=to_rgb,
    )
    predictor = predict_both(cfg, root, tmp_path)
    path = str(root / 'a' / '0.png')
    _, shown = predictor.pipeline(path)
    assert (
        shown == cv2.imread(path, flag).reshape(60, 101, -1)[..., ::-1]
    ).all()
    assert predictor(cv2.imread(path, flag)) == predictor(path)


@TRANSFORMS.register_module()
class LoadNumbers:
    """Load images as the difference of two channels."""

    def __call__(self, results):
        image = cv2.imread(results['img_path']).astype(np.float32)
        image = image[..., :1] - image[..., 1:2]
        shape = image.shape[:2]
        return dict(results, img=image, img_shape=shape, ori_shape=shape)


def test_custom_loader(colours, tmp_path):
    root = write_images(tmp_path, colours)
    cfg = classifier(
        [dict(type='mmengine.LoadNumbers'), *RESIZE],
        1,
        mean=[0.0],
        std=[40.0],
    )
    predictor = predict_both(cfg, root, tmp_path)
    _, shown = predictor.pipeline(str(root / 'a' / '0.png'))
    assert shown.shape == (60, 101, 3) and shown.dtype == np.uint8


@TRANSFORMS.register_module()
class NeedsKey:
    def __call__(self, results):
        return dict(results, img=results['spectrum'])


def test_what_does_not_fit_is_one_line(colours, tmp_path):
    root = write_images(tmp_path, colours)
    path = str(root / 'a' / '0.png')
    load = dict(type='LoadImageFromFile')
    normalise = dict(mean=[100.0], std=[50.0])

    def message(pipeline, channels):
        cfg = read_config(classifier(pipeline, channels, **normalise))
        checkpoint = str(tmp_path / 'weights.pth')
        torch.save(build_model(cfg).state_dict(), checkpoint)
        with pytest.raises(UserError) as caught:
            Predictor(cfg, checkpoint, device='cpu')(path)
        assert '\n' not in str(caught.value)
        return str(caught.value)

    assert message([load, *RESIZE], 1) == (
        'the image has 3 channels after the test pipeline of the config, the '
        'model takes 1'
    )
    assert message([load, dict(type='mmengine.NeedsKey'), *RESIZE], 1) == (
        "NeedsKey of the test pipeline cannot process the image: 'spectrum'"
    )
    small = dict(type='Resize', scale=(16, 16))
    grey = dict(load, color_type='grayscale')
    assert message([grey, small, RESIZE[1]], 1).startswith(
        'the image must be at least 32 x 32 pixels'
    )


def test_no_pipeline(tmp_path):
    cfg = classifier([], 3)
    for change, text in (
        (lambda c: c.pop('test_dataloader'), 'has no test_dataloader'),
        (lambda c: c.test_dataloader.dataset.pop('pipeline'), 'no pipeline'),
    ):
        broken = Config(cfg.to_dict())
        change(broken)
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            with pytest.raises(UserError, match=text):
                TestPipeline(broken)
