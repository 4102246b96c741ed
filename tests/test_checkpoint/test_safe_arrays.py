"""Tests of arrays, strings and functions in files of unknown origin."""

import builtins
import io
import itertools
import zipfile

import numpy as np
import pytest
import torch
from mmengine.fileio import dump
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler import OneCycleParamScheduler

from mmvvt.checkpoint import (
    READS_RUNNER_CHECKPOINTS,
    load_predictions,
    safe_load,
)

pytestmark = pytest.mark.skipif(
    not READS_RUNNER_CHECKPOINTS, reason='needs PyTorch 2.6'
)


class Call:
    """Pickle as a call of a function with arguments and a state."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments)
        self.state = state

    def __reduce__(self):
        return self.call if self.state is None else (*self.call, self.state)


def saved(content):
    file = io.BytesIO()
    torch.save(dict(content=content), file)
    return file


def load(file):
    file.seek(0)
    return torch.load(file, weights_only=True)['content']


ARRAYS = dict(
    strings=np.array([['cat', 'dög'], ['', 'elephant']]),
    no_strings=np.array([], 'U3'),
    foreign_strings=np.array(['cat'], '>U4'),
    foreign_integers=np.arange(3, dtype='>i4'),
    foreign_floats=np.arange(3, dtype='>f8'),
    columns=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    empty=np.zeros((0, 3)),
    scalar_array=np.array(2.5),
    flags=np.array([True, False]),
    complex=np.array([1 + 2j]),
    half=np.arange(3, dtype=np.float16),
)


@pytest.mark.parametrize('name', ARRAYS)
def test_arrays(name):
    array = ARRAYS[name]
    loaded = load(saved(array))
    assert loaded.tolist() == array.tolist()
    assert loaded.dtype == array.dtype.newbyteorder('=')
    assert loaded.shape == array.shape
    assert isinstance(loaded, np.ndarray) and loaded.flags.owndata
    again = saved(loaded)
    assert b'mmvvt' not in again.getvalue()
    assert load(again).tolist() == array.tolist()


@pytest.mark.parametrize('name', [n for n in ARRAYS if 'strings' not in n])
def test_arrays_beside_the_allow_list_of_onedl(name):
    """Names are in two allow-lists; it is undefined which one is used."""
    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(1).__reduce__()[0]
    theirs = [slice, getattr, reconstruct, scalar, np.ndarray, np.dtype]
    theirs += [HistoryBuffer]
    theirs += [type(np.dtype(code)) for code in ('u4', 'f8', 'i8')]
    array = ARRAYS[name]
    with torch.serialization.safe_globals(theirs):
        assert load(saved(array)).tolist() == array.tolist()
        assert load(saved(np.float32(0.5))) == 0.5


def test_buffers_hold_plain_arrays():
    loaded = load(saved(HistoryBuffer([1.0, 3.0], [1, 1])))
    assert [type(array) for array in loaded.data] == [np.ndarray] * 2
    assert load(saved(HistoryBuffer())).data[0].size == 0


def array_of(dtype, shape, data):
    reconstruct = np.zeros(1).__reduce__()[0]
    return Call(
        reconstruct,
        np.ndarray,
        (0,),
        b'b',
        state=(1, shape, dtype, False, data),
    )


def dtype_of(code, *state):
    return Call(np.dtype, code, False, True, state=state or None)


SHAPE = (np.dtype('f8'), (1000,))
MALICE = dict(
    subarray=array_of(
        dtype_of('>f8', 3, '>', SHAPE, None, None, -1, -1, 0), (1,), bytes(8)
    ),
    subarray_in_scalar=Call(
        np.float64(1).__reduce__()[0],
        dtype_of('>f8', 3, '>', SHAPE, None, None, -1, -1, 0),
        bytes(8),
    ),
    fields=array_of(
        dtype_of(
            'f8', 3, '<', None, ('a',), {'a': (np.dtype('f8'), 800)}, 8, 8, 0
        ),
        (1,),
        bytes(8),
    ),
    too_little_data=array_of(dtype_of('f8'), (1000,), bytes(8)),
    too_large_strings=array_of(dtype_of('U1000'), (1,), bytes(8)),
    invalid_characters=array_of(dtype_of('U1'), (1,), b'\xff' * 4),
    objects=array_of(dtype_of('O'), (1,), [1]),
    records=array_of(dtype_of('V8'), (1,), bytes(8)),
    memory_that_is_not_set=Call(np.ndarray, (1000,), np.dtype('f8')),
    call_of_a_scheduler=Call(OneCycleParamScheduler, 1, 2),
    attribute_of_a_scheduler=Call(
        builtins.getattr, OneCycleParamScheduler, '__init__'
    ),
    function_of_a_function=Call(
        builtins.getattr,
        Call(builtins.getattr, OneCycleParamScheduler, '_annealing_cos'),
        '__globals__',
    ),
    state_of_a_function=Call(
        builtins.getattr,
        OneCycleParamScheduler,
        '_annealing_cos',
        state={'__code__': 1},
    ),
)


@pytest.mark.parametrize('kind', MALICE)
def test_hostile_files_are_refused(kind):
    with pytest.raises(Exception):  # noqa: B017, the type depends on torch
        load(saved(MALICE[kind]))


def pickled(*items):
    """A file whose content is a list of items, as instructions of pickle."""
    source, target = saved(1), io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w') as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith('data.pkl'):
                key = b'X\x07\x00\x00\x00content'
                data = b'\x80\x02}%b](%bes.' % (key, b''.join(items))
            new.writestr(name, data)
    return target


def text(value):
    return b'X%b%b' % (len(value).to_bytes(4, 'little'), value)


def raw(data):
    """Bytes, as protocol 2 stores them."""
    return b'c_codecs\nencode\n%b%b\x86R' % (text(data), text(b'latin1'))


def dtype(code):
    return b'cnumpy\ndtype\n%b\x85Rq\x00' % text(code)


def state(size):
    """Set the state of a dtype of strings."""
    return b'(K\x03%bNNNM%bK\x04K\x08tb' % (
        text(b'<'),
        size.to_bytes(2, 'little'),
    )


CORE = np.zeros(1).__reduce__()[0].__module__.encode()
ARRAY = b'c%b\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85%btRq\x01' % (
    CORE,
    raw(b'b'),
)
CONTENT = b'(K\x01K\x01\x85h\x00\x89%btb' % raw(b'A\0\0\0B\0\0\0')


def test_changing_a_dtype_does_not_change_arrays():
    """The size of the strings is changed after an array uses the type."""
    file = pickled(
        dtype(b'U2'), state(8), ARRAY, CONTENT, b'h\x00', state(4000)
    )
    array = load(file)[1]
    assert array.tolist() == ['AB'] and array.itemsize == 8


def test_an_array_is_set_once():
    """Otherwise, a tensor could share memory that has been released."""
    once = pickled(dtype(b'f8'), ARRAY, CONTENT)
    assert load(once)[1].shape == (1,)
    with pytest.raises(Exception, match='set only once'):
        load(pickled(dtype(b'f8'), ARRAY, CONTENT, CONTENT))


@pytest.mark.parametrize('name', ARRAYS)
def test_arrays_of_predictions(name, tmp_path):
    path = str(tmp_path / 'predictions.pkl')
    dump([dict(array=ARRAYS[name])], path)
    (loaded,) = load_predictions(path)
    assert loaded['array'].tolist() == ARRAYS[name].tolist()


@pytest.mark.parametrize(
    'taken', list(itertools.product([False, True], repeat=4)), ids=str
)
def test_every_mixture_with_another_allow_list(taken, monkeypatch):
    """torch takes each name from either list, in the order of a set."""
    from torch import _weights_only_unpickler as unpickler

    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(1).__reduce__()[0]
    ours = {
        reconstruct: safe_load._empty_array,
        scalar: safe_load._scalar,
        np.ndarray: safe_load._LoadedArray,
        np.dtype: safe_load._safe_dtype,
    }
    dtypes = [type(np.dtype(code)) for code in ('u4', 'f8', 'i8')]
    with torch.serialization.safe_globals([*ours, *dtypes]):
        allowed = unpickler._get_user_allowed_globals()
        for (theirs, own), take in zip(ours.items(), taken):
            name = f'{theirs.__module__}.{theirs.__name__}'
            assert name in allowed
            allowed[name] = theirs if take else own
        monkeypatch.setattr(
            unpickler, '_get_user_allowed_globals', lambda: allowed
        )
        assert load(saved(np.arange(3.0))).tolist() == [0, 1, 2]
        assert load(saved(np.float32(0.5))) == 0.5
