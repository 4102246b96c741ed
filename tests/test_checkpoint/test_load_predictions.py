"""Predictions are read as data; a file cannot run code."""

import os
import pickle

import mmengine
import numpy as np
import pytest
import torch

from mmvvt.checkpoint import load_predictions
from mmvvt.errors import MissingFileError, UserError


def test_what_the_test_tool_writes(tmp_path):
    path = str(tmp_path / 'test.pkl')
    sample = dict(
        img_path='a.png',
        pred_label=torch.tensor([3]),
        pred_score=torch.arange(4.0)[1:],
        mask=torch.ones(2, 3, dtype=torch.bool).t(),
        half=torch.ones(2).half(),
        array=np.arange(6.0).reshape(2, 3),
        number=np.float32(0.5),
        nested=dict(rle=[dict(size=[1, 2], counts=b'02')], shape=(1, 2)),
    )
    mmengine.dump([sample], path)
    (read,) = load_predictions(path)
    assert set(read) == set(sample)
    for key in ('pred_label', 'pred_score', 'mask', 'half'):
        assert torch.equal(read[key], sample[key])
        assert read[key].dtype == sample[key].dtype
    assert (read['array'] == sample['array']).all()
    assert read['number'] == 0.5 and read['nested'] == sample['nested']


class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize('protocol', [0, 2, 4])
@pytest.mark.parametrize('function', ['system', 'exec', 'getattr'])
def test_code_is_not_run(function, protocol, tmp_path):
    canary = tmp_path / 'canary'
    attack = dict(
        system=Call(os.system, f'touch {canary}'),
        exec=Call(exec, f'open({str(canary)!r}, "w")'),
        getattr=Call(getattr, os, 'name'),
    )[function]
    path = tmp_path / 'test.pkl'
    try:
        path.write_bytes(pickle.dumps([dict(a=attack)], protocol))
    except TypeError:  # a module cannot be pickled
        path.write_bytes(b'(lp0\ncbuiltins\ngetattr\n(cos\npath\nVsep\ntRa.')
    with pytest.raises(UserError, match='which is not allowed') as caught:
        load_predictions(str(path))
    assert '\n' not in str(caught.value) and str(path) in str(caught.value)
    assert not canary.exists()


def test_functions_cannot_be_modified(tmp_path):
    path = tmp_path / 'test.pkl'
    # BUILD on an allowed function, with a state that sets an attribute
    path.write_bytes(
        b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n'
        b'N}X\x09\x00\x00\x00_functionX\x01\x00\x00\x00xs\x86b.'
    )
    with pytest.raises(UserError, match='must not modify functions'):
        load_predictions(str(path))


@pytest.mark.parametrize('content', [1, dict(a=1), [1], 'text', None])
def test_other_content(content, tmp_path):
    path = tmp_path / 'test.pkl'
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match='must contain a list of predictions'):
        load_predictions(str(path))


def test_damaged_and_missing_files(tmp_path):
    path = tmp_path / 'test.pkl'
    with pytest.raises(MissingFileError, match='no such file'):
        load_predictions(str(path))
    for data in (b'', b'no pickle', pickle.dumps([dict(a=1)])[:-3]):
        path.write_bytes(data)
        with pytest.raises(UserError, match='cannot be read as predictions'):
            load_predictions(str(path))
