"""The command line of an algorithm, in this process or in one of its own."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(script, *words):
    """(exit code, stdout, stderr) of `python algorithms/<script>.py <words>`, in this process.

    That spares the seconds in which a process imports JAX.
    """
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [f"algorithms/{script}.py", *map(str, words)])
        with contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / f"algorithms/{script}.py"), run_name="__main__")
                code = 0
            except SystemExit as end:  # as Python ends a process by it
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
                code = 1 if isinstance(end.code, str) else end.code or 0
    return code, out.getvalue(), err.getvalue()


def start(*words, cwd, script=ROOT / "algorithms", home=None, **pipes):
    """Popen of `python <script>/<words>`, or of `python <words>` without a script's folder.

    home: a folder for a user's caches; then JAX is told nothing of what conftest.py tells it.
    """
    environment = dict(os.environ)
    if home:
        told = {x for x in environment if x.startswith(("XLA_", "JAX_"))}
        environment = {k: v for k, v in environment.items() if k not in told}
        environment["XDG_CACHE_HOME"] = str(home)
    words = [str(script / words[0]), *words[1:]] if script else words
    line = [sys.executable, *map(str, words)]
    return subprocess.Popen(line, cwd=cwd, env=environment, text=True, **pipes)


def command(*words, **how):
    """(exit code, stdout, stderr) of `start`'s process."""
    process = start(*words, **how, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    return process.returncode, out, err
