"""The command-line tools of the package: ``python -m mmvvt COMMAND``.

The commands are the files of ``tools/``, which are installed with the package.
"""

import ast
import difflib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .cli import run
from .errors import UserError
from .shipped import shipped_folder

COMMANDS = {
    'train': 'train.py',
    'test': 'test.py',
    'infer': 'infer.py',
    'export': 'export.py',
    'convert': 'model_converters/official_to_mmvvt.py',
    'inflate-input': 'model_converters/inflate_input.py',
    'list': 'list_models.py',
    'get-flops': 'analysis_tools/get_flops.py',
    'ablation': 'analysis_tools/ablation.py',
    'benchmark': 'analysis_tools/benchmark.py',
    'plot-benchmark': 'analysis_tools/plot_benchmark.py',
    'training-step': 'analysis_tools/training_step.py',
    'check-gpu': 'analysis_tools/check_gpu.py',
    'kernel-table': 'analysis_tools/kernel_table.py',
    'vis-attention': 'analysis_tools/vis_attention.py',
    'vis-cam': 'analysis_tools/vis_cam.py',
    'report-classification': 'analysis_tools/report_classification.py',
    'report-segmentation': 'analysis_tools/report_segmentation.py',
    'report-detection': 'analysis_tools/report_detection.py',
}
USAGE = """\
usage: python -m mmvvt COMMAND [ARGUMENTS]

commands:
{commands}

python -m mmvvt COMMAND --help describes the arguments of a command. A config
is the path of a file, a name printed by the command list, or mmvvt::PATH, such
as mmvvt::classification/vvt-tiny_8xb128_in1k.py."""


def tool_path(command: str) -> Path:
    """Return the path of the file of a command."""
    return shipped_folder() / 'tools' / COMMANDS[command]


def usage() -> str:
    """Return the list of commands and the first lines of their docstrings."""
    width = max(map(len, COMMANDS))
    lines = []
    for command in COMMANDS:
        source = tool_path(command).read_text(encoding='utf-8')
        summary = (ast.get_docstring(ast.parse(source)) or '').split('\n')[0]
        lines.append(f'  {command:{width}}  {summary}')
    return USAGE.format(commands='\n'.join(lines))


def load_tool(command: str) -> ModuleType:
    """Import the file of a command."""
    name = f'mmvvt_{command.replace("-", "_")}'
    spec = importlib.util.spec_from_file_location(name, tool_path(command))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    command, *arguments = sys.argv[1:] or ['--help']
    if command in ('-h', '--help', 'help'):
        print(usage())
        return
    if command not in COMMANDS:
        similar = difflib.get_close_matches(command, COMMANDS)
        hint = f'similar commands: {", ".join(similar)}; ' if similar else ''
        raise UserError(
            f'no such command: {command}; {hint}python -m mmvvt --help lists '
            'all commands'
        )
    sys.argv = [f'python -m mmvvt {command}', *arguments]
    load_tool(command).main()


if __name__ == '__main__':
    run(main)
