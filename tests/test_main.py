"""Tests of ``python -m mmvvt``."""

import sys

import pytest

from mmvvt import __main__ as commands
from mmvvt.errors import UserError

from conftest import ROOT, run_tool


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['mmvvt', *arguments])
    commands.main()


def test_every_tool_is_a_command():
    tools = {
        path.relative_to(ROOT / 'tools').as_posix()
        for path in (ROOT / 'tools').rglob('*.py')
    }
    assert set(commands.COMMANDS.values()) == tools


@pytest.mark.parametrize('arguments', [[], ['--help'], ['-h'], ['help']])
def test_list_of_commands(arguments, monkeypatch, capsys):
    call(monkeypatch, *arguments)
    lines = capsys.readouterr().out.splitlines()
    for command in commands.COMMANDS:
        (line,) = (x for x in lines if x.startswith(f'  {command} '))
        assert line.endswith('.') and len(line.split()) > 4


@pytest.mark.parametrize('command', commands.COMMANDS)
def test_help_of_a_command(command, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, command, '--help')
    assert not caught.value.code
    out = capsys.readouterr().out
    assert out.startswith(f'usage: python -m mmvvt {command} [-h]')


@pytest.mark.parametrize(
    'command,similar',
    [('trian', 'train'), ('benchmrak', 'benchmark'), ('/etc', None)],
)
def test_unknown_command(command, similar, monkeypatch):
    with pytest.raises(UserError) as caught:
        call(monkeypatch, command, '--help')
    message = str(caught.value)
    assert message.startswith(f'no such command: {command}; ')
    assert ('similar commands: ' in message) == (similar is not None)
    assert similar is None or f': {similar}' in message


@pytest.mark.parametrize(
    'arguments,code,message',
    [
        (['list', 'vvt-tiny_8xb128_cifar100'], 0, 'vvt-tiny_8xb128_cifar100'),
        (['train', 'no.py'], 1, 'error: no such config file: no.py'),
        (['test'], 2, 'python -m mmvvt test: error: the following'),
        (['trian'], 1, 'error: no such command: trian; similar'),
    ],
)
def test_exit_codes(arguments, code, message, tmp_path):
    done = run_tool(
        *('-m', 'mmvvt', *arguments),
        cwd=tmp_path,
        env={'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == code, done.stdout
    assert done.stdout.splitlines()[-1].startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_list(monkeypatch, capsys):
    pytest.importorskip('mmpretrain')
    call(monkeypatch, 'list', 'vvt-tiny', '--task', 'segmentation')
    assert capsys.readouterr().out.split() == [
        'vvt-tiny_fpn_8xb4-40k_ade20k-512x512',
        'vvt-tiny_upernet_8xb2-160k_ade20k-512x512',
    ]
    with pytest.raises(UserError, match='no model matches vit-tiny; '):
        call(monkeypatch, 'list', 'vit-tiny')
    with pytest.raises(UserError, match="unknown task 'segment'"):
        call(monkeypatch, 'list', '--task', 'segment')
