"""Build command that adds the configs, the tools and the model index.

The packages of OpenMMLab contain these files in the folder ``.mim``, where mim
and mmengine look for them. All settings are in setup.cfg and pyproject.toml.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NAMES = ('configs', 'tools', 'model-index.yml')
SUFFIXES = ('.py', '.sh', '.yml', '.md')
PACKAGE = Path('mmvvt')


class BuildPyWithMim(build_py):
    """Add ``mmvvt/.mim``: copies in a wheel, links in a develop install.

    Source distributions contain what :meth:`get_source_files` returns, so
    that wheels can be built from them.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            link_into(PACKAGE / '.mim')
            return
        # A previous build may have left files that have been removed since.
        shutil.rmtree(self._mim_folder(), ignore_errors=True)
        for target, source in self._mim_files().items():
            self.mkpath(os.path.dirname(target))
            self.copy_file(source, target)

    def get_source_files(self):
        return [*super().get_source_files(), *self._mim_files().values()]

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        return list(dict.fromkeys([*outputs, *self._mim_files()]))

    def get_output_mapping(self):
        return {**super().get_output_mapping(), **self._mim_files()}

    def _mim_folder(self):
        return Path(self.build_lib, PACKAGE, '.mim')

    def _mim_files(self):
        """Return the path of each file in the package and in the project."""
        sources = [
            path
            for name in NAMES
            for path in (Path(name), *sorted(Path(name).rglob('*')))
            if path.is_file() and path.suffix in SUFFIXES
        ]
        return {str(self._mim_folder() / path): str(path) for path in sources}


def link_into(folder):
    """Link the files into a folder of the sources, so that edits take effect.

    Where links cannot be created, as on Windows without the developer mode,
    the files are copied, and must be copied again after edits.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in NAMES:
        try:
            (folder / name).symlink_to(
                Path('..', '..', name), target_is_directory=Path(name).is_dir()
            )
        except OSError as error:
            print(f'copying {name} into {folder}, not linking it: {error}')
            copy = shutil.copytree if Path(name).is_dir() else shutil.copy
            copy(name, folder / name)


setup(cmdclass={'build_py': BuildPyWithMim})
