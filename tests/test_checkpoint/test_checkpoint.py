"""Tests of checkpoint conversion and of safe loading."""

import argparse
import builtins
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.utils import digit_version

from mmvvt.arch import ARCH_SETTINGS, resolve_arch
from mmvvt.checkpoint import (
    CheckpointError,
    convert_official,
    convert_to_official,
    infer_arch,
    load_checkpoint_file,
    official_shapes,
    save_checkpoint_file,
)

from conftest import GOLDEN_ARCH, build_model, relative_error

SAFE_BY_DEFAULT = digit_version(torch.__version__) >= digit_version('2.6')


def official_state(arch='tiny', num_classes=10):
    """State dict with official keys and random tensors."""
    shapes = official_shapes(resolve_arch(arch), num_classes)
    return {key: torch.randn(shape) for key, shape in shapes.items()}


@pytest.fixture(scope='module')
def state():
    return official_state()


@pytest.mark.parametrize('name', ARCH_SETTINGS)
def test_tells_the_architecture(name):
    shapes = official_shapes(resolve_arch(name), 1000)
    tensors = {k: torch.empty(s, device='meta') for k, s in shapes.items()}
    assert convert_official(tensors)['meta'] == dict(arch=name)


def test_converted_tensors(state):
    converted = convert_official(state)['state_dict']
    assert len(converted) == len(state)
    for key, tensor in state.items():
        ours = (
            f'head.fc.{key[5:]}'
            if key.startswith('head.')
            else f'backbone.{key}'
        )
        assert converted[ours] is tensor


@pytest.mark.parametrize('wrap', [
    lambda s: s,
    lambda s: {'model': s},
    lambda s: {f'module.{k}': t for k, t in s.items()},
    lambda s: {'model': {f'module.{k}': t for k, t in s.items()},
               'optimizer': {}, 'lr_scheduler': {}, 'epoch': 299,
               'scaler': {}, 'args': argparse.Namespace(lr=5e-4, data='d')},
])  # yapf: disable
def test_every_kind_of_official_file(state, wrap, tmp_path):
    path = tmp_path / 'official.pth'
    torch.save(wrap(state), path)
    converted = convert_official(load_checkpoint_file(str(path)))
    back = convert_to_official(converted)['model']
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_golden_network_keeps_its_numbers(golden):
    """A converted checkpoint gives the recorded outputs in mmpretrain."""
    file = golden['backbone']
    official = {
        k[len('weight/') :]: torch.from_numpy(file[k])
        for k in file.files
        if k.startswith('weight/')
    }
    model = build_model(
        dict(
            type='ImageClassifier',
            backbone=dict(type='VVT', arch=GOLDEN_ARCH),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=48),
        )
    )
    model.load_state_dict(
        convert_official(official, GOLDEN_ARCH)['state_dict']
    )
    for image in ('square', 'wide', 'odd'):
        logits = model(torch.from_numpy(file[f'{image}/input']))
        assert relative_error(logits, file[f'{image}/logits']) < 1e-5


def test_state_with_se_and_spatial_reduction():
    arch = {**GOLDEN_ARCH, 'sr_ratios': [4, 2, 1, 1]}
    shapes = official_shapes(resolve_arch(arch), 5, in_channels=1, se_ratio=2)
    tensors = {k: torch.zeros(s) for k, s in shapes.items()}
    found = infer_arch(tensors)
    assert found['sr_ratios'] == [4, 2, 1, 1]
    assert found['embed_dims'] == GOLDEN_ARCH['embed_dims']
    assert convert_official(tensors, arch)['meta'] == dict(arch='custom')


def drop(state, *prefixes):
    return {k: t for k, t in state.items() if not k.startswith(prefixes)}


@pytest.mark.parametrize(
    'change,message',
    [
        (
            lambda s: drop(s, 'block3.1.'),
            r'do not match a published architecture: .*depths '
            r'\[2, 2, 1, 2\].*truncated',
        ),
        (
            lambda s: drop(s, 'norm4.'),
            'do not match arch tiny: missing norm4.bias, norm4.weight',
        ),
        (lambda s: drop(s, 'head.'), 'head.weight is missing'),
        (
            lambda s: {**s, 'head.weight': torch.tensor(1.0)},
            'head.weight is not the weight of a layer',
        ),
        (lambda s: {**s, 'head.weight': 'x'}, 'head.weight is not the weight'),
        (
            lambda s: {**s, 'patch_embed1.proj.weight': torch.zeros(96)},
            'patch_embed1.proj.weight is not the weight',
        ),
        (
            lambda s: drop(s, 'patch_embed1'),
            'not a VVT classifier: patch_embed1.proj.weight is missing',
        ),
        (lambda s: {'fc.weight': torch.zeros(2, 2)}, 'not a VVT classifier'),
        (lambda s: {**s, 'pos_embed': torch.zeros(1)}, 'unknown pos_embed'),
        (
            lambda s: {**s, 'norm2.bias': torch.zeros(3)},
            r'norm2.bias has shape '
            r'\(3,\), arch tiny needs \(160,\)',
        ),
        (
            lambda s: {**s, 'norm2.bias': 'x'},
            'norm2.bias is not a floating-point',
        ),
        (
            lambda s: {**s, 'norm2.bias': torch.zeros(160).long()},
            'norm2.bias is not a floating-point',
        ),
        (lambda s: {'model': {}}, "'model' contains no tensors"),
        (lambda s: {1: 2}, 'keys of the tensors are not strings'),
    ],
)
def test_unusable_states(state, change, message):
    with pytest.raises(CheckpointError, match=message):
        convert_official(change(dict(state)))


def test_mismatched_architecture(state):
    with pytest.raises(
        CheckpointError,
        match=r'do not match arch small: depths '
        r'\[2, 2, 2, 2\] instead of \[3, 3, 9, 3\]',
    ):
        convert_official(state, 'small')


def test_reverse_refuses_foreign_keys(state):
    converted = convert_official(state)
    converted['state_dict']['decode_head.weight'] = torch.zeros(1)
    with pytest.raises(
        CheckpointError, match='decode_head.weight is not a key'
    ):
        convert_to_official(converted)


def test_unreadable_files(state, tmp_path):
    cut = tmp_path / 'cut.pth'
    some = {key: state[key] for key in list(state)[:4]}
    for zipped in (True, False):  # zip format and legacy format
        whole = tmp_path / 'whole.pth'
        torch.save(some, whole, _use_new_zipfile_serialization=zipped)
        data = whole.read_bytes()
        for end in [*range(0, 600, 7), len(data) // 2, len(data) - 1]:
            cut.write_bytes(data[:end])
            with pytest.raises(
                CheckpointError, match='truncated or not|refused to load'
            ):
                load_checkpoint_file(str(cut))
    cut.write_text('404: Not Found\n')
    with pytest.raises(CheckpointError):
        load_checkpoint_file(str(cut))
    torch.save([1, 2], cut)
    with pytest.raises(CheckpointError, match='contains a list'):
        load_checkpoint_file(str(cut))
    with pytest.raises(CheckpointError, match='no such checkpoint file'):
        load_checkpoint_file(str(tmp_path / 'absent.pth'))


# -- malicious files ----------------------------------------------------------


class Call:
    """Pickle as a call of a function with arbitrary arguments and state."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments)
        self.state = state

    def __reduce__(self):
        return self.call if self.state is None else (*self.call, self.state)


def history_method(name):
    """Refer to a statistics method as mmengine's buffers do."""
    return Call(builtins.getattr, HistoryBuffer, name)


class Fresh:
    """Pickle as an instance of a class with an arbitrary state."""

    def __init__(self, cls, state):
        self.cls, self.state = cls, state

    def __reduce__(self):
        return self.cls, (), self.state


def array(dtype, shape, data, dtype_state=None):
    """Pickle as an array with the given dtype and data."""
    dtype = Call(np.dtype, dtype, False, True, state=dtype_state)
    empty = (np.ndarray, (0,), b'b')
    reconstruct = np.zeros(1).__reduce__()[0]
    return Call(reconstruct, *empty, state=(1, shape, dtype, False, data))


NUMBERS = np.arange(2.0)
MALICE = {
    'a shell command': None,  # created in the test
    'eval': Call(builtins.eval, '1'),
    'attribute of another class': Call(builtins.getattr, np.ndarray,
                                       'tofile'),
    'other methods of the buffer': history_method('register_statistics'),
    'a private one': history_method('__init__'),
    'statistics method as a function': Call(
        torch._tensor._rebuild_from_type_v2, history_method('current'),
        HistoryBuffer, (), {}),
    'a class in a buffer': Fresh(
        HistoryBuffer,
        dict(max_length=1, _log_history=[torch.Tensor],
             _count_history=NUMBERS)),
    'a class through a scalar': Call(
        np.float64(1).__reduce__()[0], np.dtype('O'), torch.Tensor),
    'a buffer of text': Fresh(
        HistoryBuffer,
        dict(max_length=1, _log_history='ab', _count_history='cd')),
    'a buffer of two lengths': Fresh(
        HistoryBuffer,
        dict(max_length=9, _log_history=NUMBERS,
             _count_history=np.arange(3.))),
    'objects in an array': array('O', (1, ), [torch.Tensor]),
    'bytes in an array': array('S1', (1, ), b'A'),
    'text in an array': array('U1', (1, ), b'AAAA'),
    'dtype grown after use': array('S1', (1, ), b'A', dtype_state=(
        3, '|', None, None, None, 64, 1, 0)),
    'array with no memory behind it': Call(
        np.zeros(1).__reduce__()[0], np.ndarray, (10**6, ), b'b'),
}  # yapf: disable


@pytest.mark.skipif(not SAFE_BY_DEFAULT, reason='torch < 2.6 allows all')
@pytest.mark.parametrize('kind', MALICE)
def test_smuggled_content_is_refused(kind, tmp_path):
    marker = tmp_path / 'executed'
    content = MALICE[kind]
    if kind == 'a shell command':
        content = Call(os.system, f'touch {marker}')
    HistoryBuffer()  # The first buffer registers the methods of all buffers.
    methods = dict(HistoryBuffer._statistics_methods)
    attributes = set(vars(torch.Tensor)), set(vars(HistoryBuffer))
    path = tmp_path / 'bad.pth'
    torch.save({'state_dict': {}, 'message_hub': content}, path)
    with pytest.raises(CheckpointError):
        load_checkpoint_file(str(path))
    with pytest.raises(Exception):  # noqa: B017, the type depends on torch
        torch.load(path)
    assert not marker.exists()
    assert HistoryBuffer._statistics_methods == methods
    assert (set(vars(torch.Tensor)), set(vars(HistoryBuffer))) == attributes


@pytest.mark.skipif(not SAFE_BY_DEFAULT, reason='torch < 2.6 allows all')
def test_a_file_cannot_change_the_statistics_of_others(tmp_path):
    path = tmp_path / 'bad.pth'
    torch.save(
        Fresh(
            HistoryBuffer,
            dict(
                max_length=9,
                _log_history=NUMBERS,
                _count_history=NUMBERS,
                statistics_methods={'mean': history_method('max')},
            ),
        ),
        path,
    )
    loaded = torch.load(path)
    assert HistoryBuffer([1, 3], [1, 1]).statistics('mean') == 2
    # The loaded object has mmengine's class and can be saved again.
    assert type(loaded) is HistoryBuffer
    assert loaded.statistics('max') == 1.0


def test_the_reason_names_what_was_asked_for(tmp_path):
    path = tmp_path / 'bad.pth'
    torch.save(Call(os.system, 'true'), path)
    with pytest.raises(CheckpointError, match='refused to load.*system'):
        load_checkpoint_file(str(path))
    if SAFE_BY_DEFAULT:
        torch.save(history_method('update'), path)
        with pytest.raises(
            CheckpointError, match='getattr.*update.*is not allowed'
        ):
            load_checkpoint_file(str(path))


def test_namespace_is_allowed_while_converting_alone(tmp_path):
    path = tmp_path / 'official.pth'
    torch.save({'args': argparse.Namespace(a=1)}, path)
    assert load_checkpoint_file(str(path))['args'].a == 1
    if SAFE_BY_DEFAULT:
        with pytest.raises(pickle.UnpicklingError, match='Namespace'):
            torch.load(path)


def assert_runner_checkpoint_loads(path):
    """Check that ``torch.load`` reads a runner checkpoint by default."""
    hub = MessageHub.get_instance('test_checkpoint')
    hub.update_scalar('loss', 2.5)
    hub.update_scalar('loss', 1.5)
    numbers = {
        kind: np.dtype(kind).type(1)
        for kind in ('f4', 'f8', 'i4', 'i8', 'u1', '?')
    }
    torch.save(
        {
            'message_hub': hub.state_dict(),
            'numbers': numbers,
            'array': np.arange(3),
        },
        path,
    )
    loaded = torch.load(path)
    buffer = loaded['message_hub']['log_scalars']['loss']
    assert buffer.mean() == 2.0 and buffer.statistics('min') == 1.5
    assert loaded['numbers'] == numbers
    assert loaded['array'].tolist() == [0, 1, 2]


def test_runner_checkpoints_load_with_the_safe_default(tmp_path):
    assert_runner_checkpoint_loads(tmp_path / 'epoch_1.pth')


@pytest.mark.skipif(not SAFE_BY_DEFAULT, reason='torch < 2.6 allows all')
def test_nor_does_leaving_another_allow_list_change_that(tmp_path):
    """Leaving another allow-list, as onedl-mmengine does, has no effect."""
    with torch.serialization.safe_globals(
        [
            slice,
            getattr,
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            *(type(np.dtype(kind)) for kind in ('u4', 'f8', 'i8')),
        ]
    ):
        pass
    assert_runner_checkpoint_loads(tmp_path / 'epoch_1.pth')


@pytest.mark.skipif(not SAFE_BY_DEFAULT, reason='torch < 2.6 allows all')
@pytest.mark.parametrize(
    'theirs', [(getattr,), (HistoryBuffer,), (getattr, HistoryBuffer)]
)
def test_beside_another_allow_list(theirs, tmp_path):
    """Loading works for names that are in two allow-lists."""
    before = torch.serialization.get_safe_globals()
    names = {f'{one.__module__}.{one.__qualname__}' for one in theirs}
    ours = [
        entry
        for entry in before
        if not (isinstance(entry, tuple) and entry[1] in names)
    ]
    assert len(ours) == len(before) - len(theirs)
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*ours, *theirs])
    try:
        assert_runner_checkpoint_loads(tmp_path / 'epoch_1.pth')
        assert HistoryBuffer([1, 3], [1, 1]).statistics('mean') == 2
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@pytest.mark.skipif(not SAFE_BY_DEFAULT, reason='torch < 2.6 allows all')
def test_names_of_the_other_numpy_are_known(tmp_path):
    """Names of NumPy 1 (numpy.core) and 2 (numpy._core) are allowed."""
    path, other = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save(np.arange(3.0), path)
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(other, 'w') as target,
    ):
        for item in source.namelist():
            data = source.read(item)
            if item.endswith('data.pkl'):
                swapped = data.replace(b'numpy._core.', b'numpy.core.')
                if swapped == data:
                    swapped = data.replace(b'numpy.core.', b'numpy._core.')
                assert swapped != data
                data = swapped
            target.writestr(item, data)
    assert torch.load(other).tolist() == [0, 1, 2]


def test_saves_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'out.pth'
    save_checkpoint_file({'a': 1}, str(path))
    before = path.read_bytes()

    def fail(checkpoint, file):
        file.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(CheckpointError, match='cannot write .*disk full'):
        save_checkpoint_file({'a': 2}, str(path))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['out.pth']
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match='cannot write'):
        save_checkpoint_file({}, str(tmp_path))  # a folder
    assert os.listdir(tmp_path) == ['out.pth']
    with pytest.raises(CheckpointError, match='no such folder'):
        save_checkpoint_file({}, str(tmp_path / 'none' / 'out.pth'))
