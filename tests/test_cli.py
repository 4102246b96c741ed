"""Tests of exit codes and error messages of the tools."""

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from mmvvt import errors
from mmvvt.cli import run

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.UserError)
]


@pytest.mark.parametrize('kind', KINDS)
def test_user_errors_are_one_line(kind, capsys):
    def main():
        raise kind('no such file: a.py')

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 'error: no such file: a.py'


def test_the_process_group_is_destroyed(tmp_path):
    """Otherwise, its threads may abort the process when it exits."""

    def main():
        dist.init_process_group(
            'gloo', init_method=f'file://{tmp_path}/a', rank=0, world_size=1
        )

    run(main)
    assert not dist.is_initialized()


def test_all_kinds_are_caught_as_their_standard_errors():
    assert all(issubclass(kind, ValueError) for kind in KINDS)
    assert issubclass(errors.MissingFileError, FileNotFoundError)
    assert issubclass(errors.WriteError, OSError)
    assert issubclass(errors.BackendError, RuntimeError)
    assert str(errors.WriteError('cannot write x')) == 'cannot write x'


def test_other_errors_keep_their_traceback():
    def main():
        raise KeyError('a bug')

    with pytest.raises(KeyError, match='a bug'):
        run(main)


class Faulty(Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise self.kind('a.png: label values [7] are out of range')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('num_workers', [0, 1])
def test_an_error_in_a_worker_process_is_one_line(kind, num_workers):
    loader = DataLoader(Faulty(kind), num_workers=num_workers)
    with pytest.raises(SystemExit) as caught:
        run(lambda: list(loader))
    assert caught.value.code == (
        'error: a.png: label values [7] are out of range'
    )
