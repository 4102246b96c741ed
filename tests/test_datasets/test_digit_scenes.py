"""Tests of the digit scenes on photographs."""

import json
from importlib import resources

import cv2
import numpy as np
import pytest

from mmvvt.datasets import DigitScenes, write_digit_scenes
from mmvvt.datasets.digit_scenes import (
    BACKGROUND,
    CLASSES,
    PALETTE,
    PHOTOGRAPHS,
    SIZE,
    compose_scene,
    load_photographs,
    run_lengths,
)
from mmvvt.datasets.digits import split_digits

NUM_TRAIN, NUM_VAL = 12, 8


@pytest.fixture(scope='module')
def scenes_root(tmp_path_factory):
    root = tmp_path_factory.mktemp('scenes') / 'digit-scenes'
    write_digit_scenes(str(root), NUM_TRAIN, NUM_VAL)
    return root


def files_of(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


def coco(root, split):
    return json.loads((root / f'instances_{split}.json').read_text())


def decode(counts, shape):
    """Decode COCO's run lengths to a mask."""
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(shape, order='F')


def test_layout(scenes_root):
    names = set(files_of(scenes_root))
    expected = {
        f'{kind}/{folder}/{number:05d}.png'
        for kind in ('images', 'annotations')
        for folder, count in (('training', NUM_TRAIN), ('validation', NUM_VAL))
        for number in range(count)
    }
    assert names == expected | {
        'instances_training.json',
        'instances_validation.json',
    }


def test_same_seed_same_files_and_other_seed_others(scenes_root, tmp_path):
    write_digit_scenes(str(tmp_path / 'again'), NUM_TRAIN, NUM_VAL)
    assert files_of(tmp_path / 'again') == files_of(scenes_root)

    write_digit_scenes(str(tmp_path / 'other'), 2, 2, seed=1)
    write_digit_scenes(str(tmp_path / 'fewer'), 2, 2)
    other, fewer = files_of(tmp_path / 'other'), files_of(tmp_path / 'fewer')
    for name in fewer:
        assert other[name] != fewer[name]
        if name.endswith('.png'):
            assert fewer[name] == files_of(scenes_root)[name]


def test_splits_share_neither_scans_nor_photographs(scenes_root):
    _, _, members = split_digits()
    seen = {}
    for split, folder in (('train', 'training'), ('val', 'validation')):
        found = coco(scenes_root, folder)
        scans = {a['scan'] for a in found['annotations']}
        photographs = {i['photograph'] for i in found['images']}
        assert scans <= set(members[split].tolist())
        assert photographs <= set(PHOTOGRAPHS[split])
        seen[split] = scans, photographs
    assert not seen['train'][0] & seen['val'][0]
    assert not set(PHOTOGRAPHS['train']) & set(PHOTOGRAPHS['val'])
    assert not set(members['train']) & set(members['val'])


def test_photographs_ship_in_the_wheels():
    for paths in PHOTOGRAPHS.values():
        for path in paths:
            package, *parts = path.split('/')
            assert resources.files(package).joinpath(*parts).is_file(), path
    photographs = load_photographs('val')
    for image in photographs.values():
        assert image.dtype == np.uint8 and image.shape[2] == 3
        assert min(image.shape[:2]) >= SIZE


def test_labels_and_instances(scenes_root):
    for folder in ('training', 'validation'):
        found = coco(scenes_root, folder)
        several = 0
        for image in found['images']:
            path = scenes_root / 'annotations' / folder / image['file_name']
            labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert labels.shape == (SIZE, SIZE) and labels.dtype == np.uint8
            assert labels.max() == BACKGROUND == 10
            again = np.full_like(labels, BACKGROUND)
            mine = [
                a for a in found['annotations'] if a['image_id'] == image['id']
            ]
            several += len(mine) > 1
            for annotation in mine:
                mask = decode(
                    annotation['segmentation']['counts'], labels.shape
                )
                assert mask.sum() == annotation['area']
                left, top, width, height = annotation['bbox']
                rows, columns = np.nonzero(mask)
                assert (left, top) == (columns.min(), rows.min())
                assert (left + width, top + height) == (
                    columns.max() + 1,
                    rows.max() + 1,
                )
                # The digit is readable and mostly inside the image.
                assert height >= 16 and annotation['area'] >= 60
                assert (again[mask] == BACKGROUND).all()  # no overlap
                again[mask] = annotation['category_id']
            assert (again == labels).all()
        assert several >= 0.9 * len(found['images'])


def test_every_digit_and_overlaps_occur():
    scans, labels, members = split_digits()
    photographs = load_photographs('val')
    rng = np.random.default_rng(0)
    seen, touching = set(), 0
    for _ in range(40):
        scene = compose_scene(photographs, scans, labels, members['val'], rng)
        seen |= {instance.label for instance in scene.instances}
        grown = np.zeros((SIZE, SIZE), int)
        for instance in scene.instances:
            grown += cv2.dilate(
                instance.mask.astype(np.uint8), np.ones((3, 3), np.uint8)
            )
        touching += (grown > 1).any()
    assert seen == set(range(10))
    assert touching >= 10


@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (8, 8)])
def test_run_lengths(shape):
    rng = np.random.default_rng(0)
    for mask in (
        np.zeros(shape, bool),
        np.ones(shape, bool),
        rng.random(shape) < 0.5,
    ):
        counts = run_lengths(mask)
        assert sum(counts) == mask.size
        assert (decode(counts, shape) == mask).all()


def test_run_lengths_as_pycocotools_reads_them(scenes_root):
    masks = pytest.importorskip('pycocotools.mask')
    annotation = coco(scenes_root, 'training')['annotations'][0]
    code = annotation['segmentation']
    packed = masks.frPyObjects(code, *code['size'])
    assert int(masks.area(packed)) == annotation['area']
    assert masks.toBbox(packed).tolist() == annotation['bbox']


def test_data_set(scenes_root):
    dataset = DigitScenes(data_root=str(scenes_root), split='val', pipeline=[])
    assert len(dataset) == NUM_VAL
    assert dataset.metainfo['classes'] == CLASSES
    assert len(CLASSES) == len(PALETTE) == 11
    sample = dataset[3]
    assert sample['img_path'].endswith('images/validation/00003.png')
    assert sample['seg_map_path'].endswith('annotations/validation/00003.png')


def test_bad_arguments(scenes_root, tmp_path):
    with pytest.raises(ValueError, match="split must be one of .*'test'"):
        DigitScenes(data_root=str(scenes_root), split='test')
    with pytest.raises(FileNotFoundError, match='no scenes in'):
        DigitScenes(
            data_root=str(tmp_path / 'none'), split='val', download=False
        )
