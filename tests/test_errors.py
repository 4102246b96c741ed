"""Messages of errors that a user can correct."""

import pytest
from torch.utils.data import DataLoader, Dataset

from mmvvt.errors import (
    MAX_LENGTH,
    MissingFileError,
    PreflightError,
    UserError,
)


@pytest.mark.parametrize(
    'given,shown',
    [
        ('plain text, Größe 3', 'plain text, Größe 3'),
        ('several\n  lines\n', 'several lines '),
        ('a\rb\x1b[2Jc\x00\ud800', r'a\rb\x1b[2Jc\x00\ud800'),
    ],
)
@pytest.mark.parametrize('kind', [UserError, MissingFileError])
def test_a_message_is_one_printable_line(kind, given, shown):
    assert str(kind(given)) == shown


def test_long_messages_are_shortened():
    text = str(UserError('start ' + 'x' * 10**6 + ' end'))
    assert text.startswith('start xx') and text.endswith('xx end')
    assert len(text) <= MAX_LENGTH
    assert len(str(UserError('\x00' * MAX_LENGTH))) <= MAX_LENGTH


def test_several_problems_keep_their_lines():
    error = PreflightError('first\nsecond \x1b')
    assert str(error) == 'first\nsecond \\x1b'


class Faulty(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UserError('a\nb.png: damaged')


@pytest.mark.parametrize('num_workers', [0, 1])
def test_the_traceback_of_a_worker_is_not_part_of_it(num_workers):
    with pytest.raises(UserError) as caught:
        list(DataLoader(Faulty(), num_workers=num_workers))
    assert str(caught.value) == 'a b.png: damaged'
