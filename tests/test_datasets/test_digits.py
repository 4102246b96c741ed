"""Tests of the dataset of handwritten digits."""

import os

import mmcv
import numpy as np
import pytest
from sklearn.datasets import load_digits

from mmvvt.datasets import Digits, write_digits


def test_split_is_whole_fixed_and_stratified(digits_root):
    numbers = {}
    for split, size in (('train', 1437), ('val', 360)):
        dataset = Digits(str(digits_root), split)
        assert len(dataset) == size
        labels = [dataset.get_data_info(i)['gt_label'] for i in range(size)]
        counts = np.bincount(labels, minlength=10)
        assert counts.max() - counts.min() <= 9 * size / 1797 + 1
        numbers[split] = {
            int(os.path.basename(dataset.get_data_info(i)['img_path'])[:4])
            for i in range(size)
        }
    assert not numbers['train'] & numbers['val']
    assert numbers['train'] | numbers['val'] == set(range(1797))


def test_images_are_the_scans(digits_root):
    digits = load_digits()
    dataset = Digits(str(digits_root), 'val')
    for i in range(0, len(dataset), 37):
        info = dataset.get_data_info(i)
        number = int(os.path.basename(info['img_path'])[:4])
        image = mmcv.imread(info['img_path'], flag='grayscale')
        assert info['gt_label'] == digits.target[number]
        assert np.array_equal(np.rint(image / 255 * 16), digits.images[number])


def test_written_twice_the_same(digits_root, tmp_path):
    write_digits(str(tmp_path / 'again'))
    first = sorted(
        p.relative_to(digits_root) for p in digits_root.rglob('*.png')
    )
    again = sorted(
        p.relative_to(tmp_path / 'again')
        for p in (tmp_path / 'again').rglob('*.png')
    )
    assert first == again and len(first) == 1797
    assert (digits_root / first[5]).read_bytes() == (
        tmp_path / 'again' / first[5]
    ).read_bytes()


def test_makes_its_files_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(image, path):
        raise OSError('disk full')

    with monkeypatch.context() as patch:
        patch.setattr(mmcv, 'imwrite', fail)
        with pytest.raises(OSError, match='disk full'):
            Digits(str(tmp_path / 'digits'), 'train')
    assert os.listdir(tmp_path) == []
    assert len(Digits(str(tmp_path / 'digits'), 'train')) == 1437
    assert os.listdir(tmp_path) == ['digits']


def test_another_process_was_faster(digits_root, tmp_path, monkeypatch):
    root = tmp_path / 'digits'
    write_digits(str(root))
    write_digits(str(root))
    assert sorted(os.listdir(tmp_path)) == ['digits']
    assert sorted(os.listdir(root)) == ['train', 'val']


def test_an_empty_folder_is_filled(tmp_path):
    assert len(Digits(str(tmp_path), 'val')) == 360


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="split must be one of .*'test'"):
        Digits(str(tmp_path), 'test')
    (tmp_path / 'train').mkdir()
    with pytest.raises(FileNotFoundError, match='no images of class 0'):
        Digits(str(tmp_path), 'train')
    with pytest.raises(FileNotFoundError, match='no images of class 0'):
        Digits(str(tmp_path / 'none'), 'train', download=False)
