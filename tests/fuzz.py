"""Damaged and hostile files for everything that reads files: ``make fuzz``.

Each case writes a random file and reads it. The reader must accept the file
or raise a ``UserError`` whose message is one line. Any other error, a process
that crashes, hangs or runs out of memory, and code that runs from the file
are failures. A case is a function of the seed and its number, and can be
repeated alone:

    python tests/fuzz.py --cases 10000
    python tests/fuzz.py --case 4711
"""

import argparse
import builtins
import collections
import contextlib
import copy
import functools
import importlib
import io
import json
import operator
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim.scheduler import OneCycleParamScheduler

from mmvvt.arch import resolve_arch
from mmvvt.checkpoint import (
    check_resumable,
    convert_official,
    convert_to_official,
    load_checkpoint_file,
    load_predictions,
    official_shapes,
)
from mmvvt.datasets import GuardedPipeline
from mmvvt.errors import MAX_LENGTH, UserError
from mmvvt.preflight.coco import find_coco_problems
from mmvvt.preflight.sources import Source

SECONDS = 60  # limit of a case
MEMORY = 4 * 2**30  # limit of what a case may allocate, in bytes
ARCH = dict(
    embed_dims=[8] * 4, num_heads=[1] * 4, mlp_ratios=[1] * 4, depths=[1] * 4
)
CLASSES = ('person', 'car', 'dog')


class Canary:
    """A file that exists if and only if code of a file was executed."""

    path = ''


# -- random values ------------------------------------------------------------


def any_of(rng, *makers):
    return rng.choice(makers)()


def number(rng):
    return rng.choice(
        [0, 1, -1, 2, 3, 255, 256, 65535, 2**31 - 1, 2**31, -(2**31), 2**32]
        + [2**63 - 1, 2**63, -(2**63), 10**30, 0.5, -1.5, 1e300, True, False]
        + [float('nan'), float('inf'), float('-inf'), rng.randrange(10**6)]
    )


def text(rng):
    return rng.choice(
        ['', 'a', '..', '/', '/etc/passwd', 'O', 'V8', 'M8', 'f8', 'U9999999']
        + ['__class__', '__dict__', '__setstate__', 'mean', 'state_dict']
        + [
            'model',
            'person',
            'a\nb',
            'a\r\x1b[2Jb',
            '\u2028',
            '\x00',
            '\ud800',
        ]
        + ['x' * 5000, '1e5', 'None', '%s%s', '{0}', 'utf-8', 'head.weight']
        + [f'touch {Canary.path}', f'open({Canary.path!r}, "w")']
    )


def nested(rng, depth):
    node = any_of(rng, list, dict, tuple)
    for _ in range(depth):
        node = {'a': node} if rng.random() < 0.5 else [node]
    return node


def plain(rng, depth=3):
    """A random value of the types that JSON has."""
    kind = rng.randrange(8 if depth else 5)
    if kind < 2:
        return number(rng)
    if kind < 4:
        return text(rng)
    if kind == 4:
        return None
    if kind == 5:
        return {text(rng): plain(rng, depth - 1) for _ in range(3)}
    return [plain(rng, depth - 1) for _ in range(rng.randrange(4))]


def mutate(rng, tree, make):
    """Replace, remove, repeat or rename random parts of a nested value."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = rng.choice(list(keys))
            child = node[key]
            if isinstance(child, (dict, list)) and rng.random() < 0.8:
                node = child
                continue
            action = rng.randrange(6)
            if action < 3:
                node[key] = make()
            elif action == 3:
                del node[key]
            elif isinstance(node, list):
                node.append(copy.deepcopy(child))
            else:
                new = make()
                try:
                    node[new] = node.pop(key)
                except TypeError:
                    node[str(new)] = child
            break
    return tree


def truncate(rng, data):
    return data[: rng.randrange(len(data))]


def flip(rng, data):
    data = bytearray(data)
    # Many formats have their structure at the start and at the end.
    end = rng.choice([len(data), len(data), min(len(data), 200)])
    for _ in range(rng.choice([1, 2, 8, 32])):
        place = rng.randrange(end)
        if rng.random() < 0.1:
            place = len(data) - 1 - place
        data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def splice(rng, data):
    """Overwrite, insert, repeat or remove a part."""
    start, length = rng.randrange(len(data)), rng.choice([1, 4, 16, 256])
    part = rng.choice(
        [b'', bytes(length), b'\xff' * length, rng.randbytes(length)]
        + [data[start : start + length] * 2]
    )
    return data[:start] + part + data[start + rng.choice([0, length]) :]


def junk(rng, data):
    return rng.choice(
        [b'', b'\0', b'\x80', b'{}', b'[]', b'null', b'\xff\xfe', bytes(5000)]
        + [b'404: Not Found\n', b'version https://git-lfs.github.com/spec/v1']
        + [rng.randbytes(rng.randrange(1, 3000)), b'PK\x03\x04', b'[' * 10**5]
        + [b'\x80\x02' + b'(' * 50000, b'\x80\x02]' + b']a' * 50000 + b'.']
    )


DAMAGES = [truncate, flip, flip, flip, splice, splice, junk]


def damage(rng, data):
    kind = rng.choice(DAMAGES)
    return kind.__name__, kind(rng, data)


# -- checkpoints --------------------------------------------------------------


class Call:
    """Pickled as a call of a function with any arguments and any state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced

    def __hash__(self):
        return 0


def hostile_functions():
    """What attacks call; none of them may run."""
    path = Canary.path
    return [
        (os.system, f'touch {path}'),
        (os.popen, f'touch {path}'),
        (os.mkdir, path),
        (os.makedirs, path),
        (subprocess.Popen, ['touch', path]),
        (subprocess.check_output, ['touch', path]),
        (builtins.eval, f'open({path!r}, "w")'),
        (builtins.exec, f'open({path!r}, "w")'),
        (builtins.open, path, 'w'),
        (builtins.__import__, 'os'),
        (importlib.import_module, 'antigravity'),
        (pathlib.Path.touch, pathlib.PurePosixPath(path)),
        (shutil.copy, sys.executable, path),
        (functools.partial, os.system, f'touch {path}'),
        (operator.methodcaller, 'touch'),
        (operator.attrgetter, '__class__.__base__.__subclasses__'),
        (pickle.loads, pickle.dumps(Call(os.mkdir, (path,)))),
        (torch.load, path),
        (torch.save, [1], path),
        (np.save, path, [1]),
        (np.load, path),
        (np.ndarray.tofile, np.zeros(1), path),
        (builtins.setattr, HistoryBuffer, 'mean', os.system),
        (builtins.getattr, HistoryBuffer, '__init__'),
        (builtins.getattr, builtins.eval, '__self__'),
        (exit, 3),
        (os._exit, 3),
        (os.abort,),
    ]


# Also allowed ones, called with wrong arguments.
FUNCTIONS = [
    collections.OrderedDict,
    collections.Counter,
    collections.defaultdict,
    argparse.Namespace,
    pathlib.PurePosixPath,
    ConfigDict,
    HistoryBuffer,
    OneCycleParamScheduler,
    builtins.getattr,
    builtins.list,
    builtins.dict,
    builtins.set,
    builtins.frozenset,
    builtins.int,
    builtins.complex,
    builtins.bytearray,
    np.dtype,
    np.ndarray,
    np.zeros(1).__reduce__()[0],
    np.float64(1).__reduce__()[0],
    np.dtypes.Float64DType,
    torch.Size,
    torch.Tensor,
    torch.device,
    torch.nn.Parameter,
    torch.FloatStorage,
    torch.serialization._get_layout,
    torch._utils._rebuild_tensor,
    torch._utils._rebuild_tensor_v2,
    torch._utils._rebuild_parameter,
    torch._utils._rebuild_sparse_tensor,
    torch._utils._rebuild_meta_tensor_no_storage,
    torch._tensor._rebuild_from_type_v2,
]


def almost_right(rng):
    """A call as in an ordinary checkpoint, with some wrong arguments."""

    def odd(value):
        if rng.random() < 0.8:
            return value
        return plain(rng, 1) if rng.random() < 0.8 else hostile(rng, 1)

    def size():
        return tuple(odd(rng.choice([0, 1, 2, 3])) for _ in range(2))

    def dtype():
        code = rng.choice(
            ['f8', 'f4', 'i8', 'u1', 'U3', 'S2', 'O', 'V4', 'M8']
        )
        order = rng.choice(['<', '>', '|'])
        state = (3, order, None, None, None, odd(-1), odd(-1), odd(0))
        return Call(np.dtype, (code, False, True), odd(state))

    def array():
        data = rng.randbytes(rng.choice([0, 8, 16, 24, 32, 48]))
        shape = rng.choice([(2,), (3,), (2, 2), size()])
        return Call(
            np.zeros(1).__reduce__()[0],
            (np.ndarray, odd((0,)), b'b'),
            (1, shape, odd(dtype()), odd(False), odd(data)),
        )

    def buffer():
        state = dict(
            _log_history=odd(np.ones(2)),
            _count_history=odd(np.ones(2)),
            _max_length=odd(10),
            max_length=odd(10),
        )
        return Call(HistoryBuffer, (), state)

    def tensor():
        storage = torch.arange(6.0).storage()
        hooks = collections.OrderedDict()
        return Call(
            torch._utils._rebuild_tensor_v2,
            (
                odd(storage),
                odd(0),
                odd(size()),
                odd(size()),
                False,
                odd(hooks),
            ),
            odd(None),
        )

    def scalar():
        data = rng.randbytes(rng.choice([0, 1, 8, 16]))
        return Call(np.float64(1).__reduce__()[0], (odd(dtype()), odd(data)))

    def method():
        names = ['mean', 'min', 'current', '_annealing_cos', '__init__']
        owner = rng.choice([HistoryBuffer, OneCycleParamScheduler, np.ndarray])
        arguments = (owner, odd(rng.choice(names)))
        return Call(builtins.getattr, arguments, odd(None))

    def container():
        kind = rng.choice([collections.OrderedDict, ConfigDict, set, list])
        return Call(kind, odd(()), odd(None))

    return any_of(
        rng, array, array, array, buffer, tensor, tensor, scalar, method,
        container,
    )  # fmt: skip


def hostile(rng, depth=3):
    """A random value that the file builds by calls."""
    if rng.random() < 0.4:
        return almost_right(rng)
    kind = rng.randrange(8 if depth else 4)
    if kind == 0:
        return plain(rng, 1)
    if kind == 1:
        return rng.choice(
            [torch.zeros(2), np.zeros(2), np.float32(1), np.str_('a')]
            + [
                np.array(['a']),
                torch.int8,
                (0,),
                (2, 3),
                (1,),
                rng.randbytes(8),
            ]
        )
    if kind == 2:
        return rng.choice(FUNCTIONS)
    if kind == 3:
        function, *arguments = rng.choice(hostile_functions())
        return Call(function, tuple(arguments))
    if kind == 4:
        return [hostile(rng, depth - 1) for _ in range(2)]
    arguments = tuple(hostile(rng, depth - 1) for _ in range(rng.randrange(5)))
    state = hostile(rng, depth - 1) if rng.random() < 0.4 else None
    if kind == 5 and isinstance(state, (list, dict)):
        return Call(rng.choice(FUNCTIONS), arguments, state, iter([1]))
    return Call(rng.choice(FUNCTIONS), arguments, state)


@functools.lru_cache(None)
def official():
    shapes = official_shapes(resolve_arch(ARCH), num_classes=3)
    generator = torch.Generator().manual_seed(0)
    return dict(
        model={
            k: torch.rand(s, generator=generator) for k, s in shapes.items()
        }
    )


@functools.lru_cache(None)
def of_runner():
    hub = MessageHub('fuzz')
    hub.update_scalar('train/loss', 1.0)
    state = convert_official(official(), ARCH)['state_dict']
    return dict(
        meta=dict(
            epoch=1, iter=10, seed=0, dataset_meta=dict(classes=CLASSES)
        ),
        state_dict=state,
        message_hub=hub.state_dict(),
        optimizer=dict(
            state={0: dict(step=torch.tensor(1.0), exp_avg=torch.zeros(3))},
            param_groups=[dict(lr=0.1, betas=(0.9, 0.99), params=[0, 1])],
        ),
        param_schedulers=[dict(base_values=[0.1], last_step=3)],
    )


def saved(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@functools.lru_cache(None)
def intact(runner, zipped):
    return saved(of_runner() if runner else official(), zipped)


def change_pickle(data, change):
    """Rewrite a checkpoint with other instructions and intact checksums."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(buffer, 'w') as new,
    ):
        for entry in old.infolist():
            content = old.read(entry.filename)
            if entry.filename.endswith('data.pkl'):
                content = change(content)
            new.writestr(entry.filename, content)
    return buffer.getvalue()


def checkpoint_damaged(rng, folder):
    name, data = damage(
        rng, intact(rng.random() < 0.5, zipped=rng.random() < 0.7)
    )
    return name, data


def checkpoint_instructions(rng, folder):
    """Changed pickle instructions in an intact archive."""
    change = rng.choice([truncate, flip, splice, flip])
    data = intact(rng.random() < 0.5, True)
    return 'instructions', change_pickle(data, lambda old: change(rng, old))


def checkpoint_structure(rng, folder):
    tree = rng.choice([official, of_runner])()
    tree = mutate(
        rng,
        tree,
        lambda: any_of(
            rng,
            lambda: plain(rng),
            lambda: plain(rng),
            lambda: torch.zeros(rng.choice([(), (0,), (3,), (2, 3)])),
            lambda: torch.zeros(3, dtype=rng.choice([torch.bool, torch.int8])),
            lambda: torch.zeros(3).to_sparse(),
            lambda: np.zeros(2),
            lambda: nested(rng, rng.choice([2, 50, 300])),
        ),
    )
    return 'structure', saved(tree)


def checkpoint_hostile(rng, folder):
    payload = hostile(rng)
    content = rng.choice(
        [
            payload,
            dict(model=payload),
            dict(state_dict={}, message_hub=payload),
            {'state_dict': official()['model'], 'meta': payload},
        ]
    )
    protocol = rng.choice([2, 2, 2, 3, 4])
    buffer = io.BytesIO()
    try:
        torch.save(
            content,
            buffer,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=rng.random() < 0.7,
        )
        return 'hostile', buffer.getvalue()
    except Exception:  # not every random value can be pickled
        return checkpoint_hostile(rng, folder)


def use(node, depth=20):
    """Read the memory of all tensors and arrays: crashes if it is wrong."""
    if isinstance(node, (torch.Tensor, np.ndarray)):
        with contextlib.suppress(Exception):
            np.asarray(node).tolist()
        with contextlib.suppress(Exception):
            node.sum()
    elif isinstance(node, HistoryBuffer):
        with contextlib.suppress(Exception):
            node.mean(), node.max(), node.current()
    elif isinstance(node, (dict, list, tuple, set)) and depth:
        children = list(node.values()) if isinstance(node, dict) else node
        for child in list(children)[:100]:
            use(child, depth - 1)


def read_hostile(rng, path):
    use(load_checkpoint_file(path))


def read_checkpoints(rng, path):
    content = load_checkpoint_file(path)
    use(content)
    outcomes = []
    for read in (
        lambda: convert_official(content, rng.choice([None, ARCH])),
        lambda: convert_to_official(content, rng.choice([None, ARCH])),
        lambda: check_resumable(path),
    ):
        try:
            read()
        except UserError as error:
            outcomes.append(error)
    if len(outcomes) == 3:
        # All refuse it: check each message.
        for error in outcomes[1:]:
            check_message(error)
        raise outcomes[0]


# -- predictions --------------------------------------------------------------


@functools.lru_cache(None)
def predictions():
    return [
        dict(
            img_path=f'{index}.png',
            ori_shape=(4, 5),
            scale_factor=(np.float64(1), np.float64(0.5)),
            pred_label=torch.tensor([index]),
            pred_score=torch.arange(3.0),
            pred_sem_seg=dict(data=torch.zeros(1, 4, 5, dtype=torch.long)),
            pred_instances=dict(
                bboxes=torch.arange(8.0).reshape(2, 4),
                masks=[dict(size=[4, 5], counts=b'PP15')],
            ),
            gt=np.zeros((2, 2), np.uint8),
        )
        for index in range(2)
    ]


def predictions_damaged(rng, folder):
    data = pickle.dumps(predictions(), rng.choice([2, 4, 5]))
    return damage(rng, data)


def predictions_hostile(rng, folder):
    payload = hostile(rng)
    content = rng.choice([payload, [payload], [dict(pred_label=payload)]])
    try:
        return 'hostile', pickle.dumps(content, rng.choice([0, 2, 4, 5]))
    except Exception:  # not every random value can be pickled
        return predictions_hostile(rng, folder)


def read_predictions(rng, path):
    use(load_predictions(path))


# -- annotation files in COCO's format ----------------------------------------


MASKS = [
    *[[[1, 2, 11, 2, 11, 22, 1, 22]]] * 3,
    dict(counts=[10, 20, 2370], size=[40, 60]),
    dict(counts='Z1d0d000000000000000000Vm1', size=[40, 60]),
]


@functools.lru_cache(None)
def coco():
    return dict(
        info=dict(year=2017),
        images=[
            dict(id=i, file_name=f'{i}.jpg', height=40, width=60)
            for i in range(3)
        ],
        annotations=[
            dict(
                id=i,
                image_id=i % 3,
                category_id=1 + i % 3,
                bbox=[1, 2, 10, 20],
                area=200,
                iscrowd=int(i == 3),
                segmentation=MASKS[i],
            )
            for i in range(5)
        ],
        categories=[
            dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)
        ],
    )


def coco_damaged(rng, folder):
    return damage(rng, json.dumps(coco()).encode())


def coco_structure(rng, folder):
    def make():
        return any_of(
            rng,
            lambda: plain(rng),
            lambda: plain(rng, 1),
            lambda: nested(rng, rng.choice([2, 400])),
        )

    tree = mutate(rng, coco(), make) if rng.random() < 0.95 else plain(rng)
    if rng.random() < 0.3:
        tree = copy.deepcopy(coco())
        mask = rng.choice(tree['annotations'])
        mask['segmentation'] = mutate(rng, mask['segmentation'], make)
        if rng.random() < 0.3:
            text = ''.join(rng.choices('0123Z`adfzVm1~', k=rng.randrange(30)))
            mask['segmentation'] = dict(counts=text, size=[40, 60])
    content = json.dumps(tree)
    if rng.random() < 0.1:  # deeper than Python's recursion limit
        deep = rng.choice(['[', '{"a":']) * 20000
        content = content.replace(rng.choice(['200', '"1.jpg"']), deep)
    if rng.random() < 0.05:
        content = content.replace('200', '9' * rng.choice([400, 5000]))
    codec = rng.choice(['utf-8', 'utf-8', 'utf-8', 'utf-16', 'utf-8-sig'])
    return 'structure', content.encode(codec, 'surrogatepass')


def read_coco(rng, path):
    folder = os.path.join(os.path.dirname(path), 'images')
    if not os.path.isdir(folder):
        os.mkdir(folder)
        for image in coco()['images']:
            pathlib.Path(folder, image['file_name']).touch()
    settings = dict(
        ann_file=path,
        data_prefix=dict(img=folder),
        metainfo=dict(classes=CLASSES),
        filter_cfg=dict(filter_empty_gt=True, min_size=rng.choice([0, 32])),
    )
    masks = rng.random() < 0.5
    steps = [dict(type='LoadAnnotations', with_bbox=True, with_mask=masks)]
    source = Source(
        'train_dataloader',
        dict(type='CocoDataset', pipeline=steps),
        False,
        SimpleNamespace(backend_args=None, test_mode=False, **settings),
    )
    problems = list(find_coco_problems(source, []))
    for problem in problems[1:]:
        check_message(problem)
    if problems:
        raise problems[0]
    load_as_mmdet(settings, masks)


def load_as_mmdet(settings, masks):
    """Load with mmdet what the check has accepted."""
    try:
        from mmdet.datasets import CocoDataset
        from mmdet.datasets.transforms import LoadAnnotations
    except ImportError:
        return
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = CocoDataset(pipeline=[], **settings)
        loader = GuardedPipeline(
            [LoadAnnotations(with_bbox=True, with_mask=masks)]
        )
        for index in range(len(dataset)):
            sample = dataset.get_data_info(index)
            sample['ori_shape'] = 40, 60  # of the image
            loader(sample)


# -- images and label maps ----------------------------------------------------


@functools.lru_cache(None)
def encoded(extension, grey):
    shape = (24, 32) if grey else (24, 32, 3)
    noise = np.random.default_rng(0).integers(0, 3, shape, np.uint8)
    done, data = cv2.imencode(extension, noise)
    assert done
    return data.tobytes()


EXTENSIONS = ['.png', '.png', '.jpg', '.bmp', '.tiff', '.webp', '.pnm']


def image_damaged(rng, folder):
    return damage(rng, encoded(rng.choice(EXTENSIONS), rng.random() < 0.7))


def _png(width, height, depth, kind, rows):
    def chunk(name, content):
        crc = struct.pack('>I', zlib.crc32(name + content))
        return struct.pack('>I', len(content)) + name + content + crc

    header = struct.pack('>IIBBBBB', width, height, depth, kind, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    )


def image_header(rng, folder):
    """Absurd dimensions, with a valid checksum where there is one."""
    sides = [0, 1, 24, 32, 65500, 2**16, 2**20, 2**30, 2**31 - 1, 2**32 - 1]
    width, height = rng.choice(sides), rng.choice(sides)
    kind = rng.randrange(4)
    if kind == 0:
        depth, colour = rng.choice([1, 8, 16, 7]), rng.choice([0, 2, 3, 6, 9])
        rows = bytes(rng.choice([0, 100, 10**6]))
        return 'header', _png(width, height, depth, colour, rows)
    extension, place, code = [
        ('.bmp', 18, '<II'),
        ('.jpg', None, '>HH'),
        ('.pnm', None, ''),
    ][kind - 1]
    data = bytearray(encoded(extension, True))
    if extension == '.jpg':
        place = data.index(b'\xff\xc0') + 5
        width, height = width & 0xFFFF, height & 0xFFFF
    elif extension == '.pnm':
        header = b'P5\n%d %d\n255\n' % (width, height)
        return 'header', header + bytes(100)
    struct.pack_into(code, data, place, width, height)
    return 'header', bytes(data)


def image_other(rng, folder):
    """Another shape, type or format than the loaders expect."""
    shape = rng.choice([(1, 1), (24, 32, 3), (24, 32, 4), (32, 24), (24, 33)])
    dtype = rng.choice([np.uint8, np.uint16, np.float32])
    values = np.random.default_rng(rng.randrange(99)).integers(0, 4, shape)
    values = values.astype(dtype) * rng.choice([1, 90])
    extension = (
        '.tiff' if dtype == np.float32 else rng.choice(['.png', '.tiff'])
    )
    done, data = cv2.imencode(extension, values)
    assert done
    return 'other', data.tobytes()


def read_image(rng, path):
    folder = os.path.dirname(path)
    good = os.path.join(folder, 'good.png')
    if not os.path.isfile(good):
        pathlib.Path(good).write_bytes(encoded('.png', True))
    paths = [path, good]
    if rng.random() < 0.5:
        paths.reverse()
    loaders = [
        dict(
            type='mmcv.LoadImageFromFile',
            imdecode_backend=rng.choice(['cv2', 'cv2', 'pillow', 'tifffile']),
            color_type=rng.choice(
                ['color', 'color', 'unchanged', 'grayscale']
            ),
        ),
        annotation_loader(rng),
        dict(type='mmengine.CheckLabels', num_classes=3),
    ]
    skip = rng.random() < 0.3
    pipeline = GuardedPipeline(loaders, skip=skip)
    sample = dict(
        img_path=paths[0],
        seg_map_path=paths[1],
        reduce_zero_label=False,
        seg_fields=[],
        instances=[],
    )
    result = pipeline(sample)
    if result is None:
        assert skip, 'only skipped samples are None'


def annotation_loader(rng):
    try:
        from mmseg.datasets.transforms import LoadAnnotations
    except ImportError:
        return dict(
            type='mmcv.LoadAnnotations',
            with_bbox=False,
            with_label=False,
            with_seg=True,
        )
    return dict(
        type=LoadAnnotations,
        imdecode_backend=rng.choice(['pillow', 'pillow', 'cv2', 'tifffile']),
    )


# -- running cases ------------------------------------------------------------

# Maker and reader, and how many of 20 cases
GROUPS = [
    ('checkpoint', checkpoint_damaged, read_checkpoints, 3),
    ('checkpoint', checkpoint_instructions, read_checkpoints, 2),
    ('checkpoint', checkpoint_structure, read_checkpoints, 2),
    ('checkpoint', checkpoint_hostile, read_hostile, 3),
    ('predictions', predictions_damaged, read_predictions, 1),
    ('predictions', predictions_hostile, read_predictions, 1),
    ('COCO file', coco_damaged, read_coco, 1),
    ('COCO file', coco_structure, read_coco, 3),
    ('image or label map', image_damaged, read_image, 2),
    ('image or label map', image_header, read_image, 1),
    ('image or label map', image_other, read_image, 1),
]
ORDER = [group for group in GROUPS for _ in range(group[3])]


def check_message(error):
    message = str(error)
    assert len(message.splitlines()) == 1, f'not one line: {message!r}'
    assert len(message) <= MAX_LENGTH, f'{len(message)} characters: {error}'
    assert message.isprintable(), f'control characters: {message!r}'


def guarded_state():
    """What no file may change."""
    return (
        dict(HistoryBuffer._statistics_methods),
        *(
            set(vars(c))
            for c in (HistoryBuffer, torch.Tensor, torch.nn.Module)
        ),
        set(vars(builtins)),
        torch.get_default_dtype(),
        os.getcwd(),
    )


def run_case(seed, index, folder):
    """Run a case; returns its kind, its outcome and a detail."""
    group, make, read, _ = ORDER[index % len(ORDER)]
    rng = random.Random(f'{seed} {index}')
    Canary.path = os.path.join(folder, 'canary')
    name, data = make(rng, folder)
    path = os.path.join(folder, f'{group.split()[0]}.bin')
    pathlib.Path(path).write_bytes(data)
    kind = f'{group}: {name}'
    before = guarded_state()
    try:
        read(rng, path)
        outcome, detail = 'accepted', ''
    except UserError as error:
        outcome, detail = type(error).__name__, str(error)
        try:
            check_message(error)
        except AssertionError as fault:
            outcome, detail = 'failed', str(fault)
    except BaseException:
        outcome, detail = 'failed', traceback.format_exc()
    if os.path.lexists(Canary.path):
        outcome, detail = 'failed', 'the file has executed code'
        shutil.rmtree(Canary.path, ignore_errors=True)
        pathlib.Path(Canary.path).unlink(missing_ok=True)
    if guarded_state() != before:
        outcome, detail = 'failed', 'the file has changed a class'
    return kind, outcome, detail


def work(seed, indices):
    """Run cases in this process; print a line before and after each."""
    HistoryBuffer()  # The first one registers the methods of all.
    torch.set_num_threads(1)
    report = os.fdopen(os.dup(1), 'w', buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # decoders and torch print warnings
        os.dup2(null, stream)
    with open('/proc/self/statm') as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        for index in indices:
            print(json.dumps([index]), file=report)
            signal.alarm(SECONDS)  # ends the process
            result = run_case(seed, index, folder)
            signal.alarm(0)
            print(json.dumps([index, *result]), file=report)


def _run_part(seed, indices, results):
    """Run cases in another process, and start it again if it dies."""
    while indices:
        process = subprocess.Popen(
            [sys.executable, __file__, '--seed', str(seed), '--work']
            + [f'{indices.start}:{indices.stop}:{indices.step}'],
            stdout=subprocess.PIPE,
            env=dict(os.environ, OMP_NUM_THREADS='1'),
            text=True,
        )
        current = None
        for line in process.stdout:
            index, *result = json.loads(line)
            current = index
            if result:
                results[index] = result
                current = None
        code = process.wait()
        if current is None:
            if code == 0:
                return
            raise RuntimeError(f'a worker ended with code {code}')
        kind = ORDER[current % len(ORDER)][0]
        fault = 'hangs' if code == -signal.SIGALRM else f'ended with {code}'
        results[current] = [f'{kind}: ?', 'failed', f'the process {fault}']
        indices = range(current + indices.step, indices.stop, indices.step)


def run_cases(seed, cases, workers=2):
    """Run cases in several processes.

    Args:
        seed (int): Seed of the run.
        cases (int): Number of cases.
        workers (int): Number of processes. Defaults to 2.

    Returns:
        dict[int, list[str]]: Kind, outcome and detail of each case.
    """
    results = {}
    threads = [
        threading.Thread(
            target=_run_part, args=(seed, range(k, cases, workers), results)
        )
        for k in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def table(results):
    """Return a table of the outcomes, one line per kind of file."""
    counts = collections.Counter((r[0], r[1]) for r in results.values())
    kinds = sorted({kind for kind, _ in counts})
    outcomes = sorted({outcome for _, outcome in counts} - {'failed'})
    columns = [*outcomes, 'failed']
    lines = ['| file | cases | ' + ' | '.join(columns) + ' |']
    lines.append('|---' * (len(columns) + 2) + '|')
    for kind in [*kinds, 'all']:
        row = [
            sum(
                n
                for (k, o), n in counts.items()
                if kind in (k, 'all') and o == outcome
            )
            for outcome in columns
        ]
        cells = [kind, sum(row), *row]
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', type=int, default=10000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--case', type=int, help='run a single case')
    parser.add_argument('--work', help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.stdout.reconfigure(errors='backslashreplace')
    if args.work:
        work(args.seed, range(*map(int, args.work.split(':'))))
        return
    if args.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(*run_case(args.seed, args.case, folder), sep='\n')
        return
    start = time.time()
    results = run_cases(args.seed, args.cases)
    print(table(results))
    print(f'{len(results)} cases in {time.time() - start:.0f} seconds')
    failed = {i: r for i, r in sorted(results.items()) if r[1] == 'failed'}
    for index, (kind, _, detail) in list(failed.items())[:40]:
        print(f'\ncase {index} of seed {args.seed} ({kind}): {detail}')
    sys.exit(1 if failed or len(results) != args.cases else 0)


if __name__ == '__main__':
    main()
