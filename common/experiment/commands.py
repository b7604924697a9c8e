"""Commands that a run prints: how to resume it, what to do with it when it is finished."""

import os
import shlex
from contextlib import suppress

from common.experiment import folders
from common.experiment.runtime import PROJECT


def short(path):
    """The path, or the path from the working directory if that is shorter."""
    with suppress(OSError):  # the working directory is gone
        return min(str(path), os.path.relpath(path), key=len)
    return str(path)


def resume(cfg, folder):
    """The command that resumes the run in `folder`. cfg: its config."""
    script = shlex.quote(short(folders.script(cfg)))
    return f"python {script} --resume {shlex.quote(short(folder))}"


def after(cfg, folder, dataset):
    """A sentence with the command that films or scores a finished run on a Dataset."""
    if folders.script(cfg).parent not in (PROJECT, PROJECT / "algorithms"):
        return f"To score it again, keep the algorithm's file in {PROJECT}."
    words = f"python -m common.evaluation {shlex.quote(short(folder))}"
    if own := getattr(cfg, "env_module", ""):
        words += f" --env-module {shlex.quote(own)}"
    if not dataset.env_id:
        return f"Score: {words} --env-id ID --episodes 10"
    if dataset.provenance.get("is_drawn"):
        return f"Video: {words} --video run.mp4"
    return f"Score: {words}"
