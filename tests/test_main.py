"""Tests of ``python -m mmvvt``."""

import sys

import pytest

from mmvvt import __main__ as commands
from mmvvt.cli import run
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
    [('traim', 'train'), ('benchmrak', 'benchmark'), ('/etc', None)],
)
def test_unknown_command(command, similar, monkeypatch):
    with pytest.raises(UserError) as caught:
        call(monkeypatch, command, '--help')
    message = str(caught.value)
    assert message.startswith(f'no such command: {command}; ')
    assert ('similar commands: ' in message) == (similar is not None)
    assert similar is None or f': {similar}' in message


@pytest.mark.parametrize(
    'arguments,code',
    [
        (['train', 'no.py'], 'error: no such config file: no.py'),
        (['traim'], 'error: no such command: traim; similar commands: train;'),
        (['test'], 2),
        (['infer', '--no-such-option'], 2),
    ],
)
def test_exit_codes_of_tools_are_passed_on(arguments, code, monkeypatch):
    """``sys.exit`` prints a text to stderr and turns it into exit code 1."""
    with pytest.raises(SystemExit) as caught:
        run(lambda: call(monkeypatch, *arguments))
    if isinstance(code, str):
        assert str(caught.value.code).startswith(code)
    else:
        assert caught.value.code == code


def test_as_a_module(tmp_path):
    done = run_tool(
        *('-m', 'mmvvt', 'get-flops', 'vvt-tiny_8xb128'),
        cwd=tmp_path,
        env={'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith(
        'error: no such config file: vvt-tiny_8xb128; similar names: vvt-tiny_'
    )
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
