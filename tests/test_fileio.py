"""Files and folders are written completely or not at all."""

import json
import os
import stat
import threading

import pytest

from mmvvt.errors import UserError, WriteError
from mmvvt.fileio import atomic_write, write_json


def write(path, text):
    with atomic_write(str(path)) as temporary, open(temporary, 'w') as file:
        file.write(text)


def test_file_is_replaced(tmp_path):
    path = tmp_path / 'new' / 'file.txt'
    for text in ('first', 'second'):
        write(path, text)
        assert path.read_text() == text
    assert os.listdir(path.parent) == ['file.txt']


@pytest.mark.parametrize('umask', [0o022, 0o077])
def test_permissions_are_those_of_open(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / 'file', '')
        with atomic_write(str(tmp_path / 'folder'), is_dir=True):
            pass
    finally:
        os.umask(before)
    for name, mode in (('file', 0o666), ('folder', 0o777)):
        found = stat.S_IMODE(os.stat(tmp_path / name).st_mode)
        assert found == mode & ~umask, name


@pytest.mark.parametrize('is_dir', [False, True])
@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError, OSError])
def test_nothing_is_left_after_an_error(tmp_path, is_dir, error):
    expected = WriteError if error is OSError else error
    with pytest.raises(expected):
        with atomic_write(str(tmp_path / 'x'), is_dir):
            raise error('stop')
    assert os.listdir(tmp_path) == []


def test_an_error_keeps_the_old_file(tmp_path):
    path = tmp_path / 'file.json'
    write_json(str(path), dict(value=1))
    with pytest.raises(ValueError):
        write_json(str(path), dict(value=float('nan')))
    assert json.loads(path.read_text()) == dict(value=1)
    assert os.listdir(tmp_path) == ['file.json']


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'folder' / 'inside').mkdir(parents=True)
    (tmp_path / 'file').touch()
    for target in (tmp_path / 'folder', tmp_path / 'file' / 'below'):
        with pytest.raises(UserError, match=f'cannot write {target}: '):
            write(target, 'x')
    with pytest.raises(WriteError, match='cannot write .*/file: '):
        with atomic_write(str(tmp_path / 'file'), is_dir=True):
            pass
    with pytest.raises(WriteError, match='disk full'):
        with atomic_write(str(tmp_path / 'new')):
            raise OSError('disk full')
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder']


def test_several_writers_of_a_folder(tmp_path):
    """Concurrent writers succeed, and the folder is complete."""
    barrier = threading.Barrier(8)
    errors = []

    def make(number):
        try:
            with atomic_write(str(tmp_path / 'x'), is_dir=True) as folder:
                for name in ('a', 'b'):
                    with open(os.path.join(folder, name), 'w') as file:
                        file.write(str(number))
                barrier.wait()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=make, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == ['x']
    contents = {(tmp_path / 'x' / name).read_text() for name in 'ab'}
    assert len(contents) == 1
