"""Runs Python tools in forks of a process that has imported PyTorch.

A third of the time of the tests that run tools would be spent in importing
PyTorch and mmcv. By default, mmpretrain, mmseg, mmdet and mmvvt are not
imported, so that a tool that forgets to import them fails. The output, the
exit code and the handlers at exit are those of a process of its own.

The process reads one request per line from its standard input, and answers
with the exit code: ``{"arguments": [...], "cwd": ..., "out": ..., "timeout":
...}``.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Optional

PRELOADED = ('torch', 'torchvision', 'cv2', 'mmcv.ops', 'mmengine.runner')


def exit_code(error: SystemExit) -> int:
    """Do what the interpreter does at a SystemExit."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def run_main(arguments) -> None:
    """Run a file or code as ``python TOOL ARGUMENTS`` or ``python -c``."""
    if arguments[0] == '-c':
        sys.argv = ['-c', *arguments[2:]]
        exec(arguments[1], dict(__name__='__main__'))
        return
    sys.argv = arguments
    # Python puts the folder of the script in front.
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name='__main__')


def run_forked(arguments, cwd, out) -> None:
    """Run a tool in this process; never returns."""
    with open(os.devnull) as empty, open(out, 'wb') as file:
        os.dup2(empty.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()  # what the tool starts is killed with it
    os.chdir(cwd)
    try:
        run_main(arguments)
        code = 0
    except SystemExit as error:
        code = exit_code(error)
    except BaseException:
        traceback.print_exc()
        code = 1
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without deleting all objects, which takes seconds


def wait(pid: int, timeout: float) -> Optional[int]:
    """Return the exit code, negative for a signal; None after the timeout."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def serve(modules) -> None:
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # some packages print while they are imported
    for name in modules:
        with suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        timeout = request.pop('timeout')
        pid = os.fork()
        if pid == 0:
            run_forked(**request)
        print(json.dumps(wait(pid, timeout)), file=answers, flush=True)
    os._exit(0)


class ToolServer:
    """Client of :func:`serve`. The process starts at the first request.

    Args:
        modules (Sequence[str]): Modules to import in the server, as far as
            they are installed.
        env (dict): Environment variables to set.
    """

    def __init__(self, modules=PRELOADED, **env):
        self._modules = modules
        self._env = env
        self._process = None

    def run(self, arguments, cwd, timeout) -> subprocess.CompletedProcess:
        """Run a tool; the arguments are those of ``subprocess.run``.

        The output contains stderr.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *self._modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **self._env},
            )
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / 'output'
            request = dict(
                arguments=arguments,
                cwd=str(cwd),
                out=str(out),
                timeout=timeout,
            )
            print(json.dumps(request), file=self._process.stdin, flush=True)
            code = json.loads(self._process.stdout.readline())
            output = out.read_text()
        if code is None:
            raise subprocess.TimeoutExpired(arguments, timeout, output)
        return subprocess.CompletedProcess(arguments, code, output)

    def close(self):
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()


if __name__ == '__main__':
    serve(sys.argv[1:])
