"""`kinema submit`: the same command as a Ray job on a cluster, with its logs followed and its result handed on.

The submitted package itself travels with the job (real files, links resolved), so that every node runs this code.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import kinema
from kinema.configs import STAGES, load_stage, resolve_config_path
from kinema.configs.json_text import json_text
from kinema.configs.paths import ROOT_VARIABLE
from kinema.configs.required import check_required
from kinema.pipelines.errors import StageError
from kinema.pipelines.summary import RESULT_MARK_VARIABLE, print_summary

FORWARDED = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "AWS_ENDPOINT_URL",
    ROOT_VARIABLE,
)


def submit(
    stage: str, rest: Sequence[str], *, address: str | None, wait: bool, stdout: TextIO, as_json: bool = False
) -> int:
    """Submit `kinema STAGE rest...`; prints the stage's summary, returns its exit status (without `wait`: 0 at once).

    Args: address, the job server (http://HEAD:8265); None: RAY_ADDRESS; as_json, the summary as one JSON line, which
        `--json` among the stage's arguments asks for too.
    Raises: ValueError for arguments that the stage would refuse, relative paths among them, before anything is sent;
        StageError if no job server answers.
    """
    address = address or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"job server address {address!r} is not http(s)://HOST:PORT; use --address http://HEAD:8265")
    as_json = as_json or "--json" in rest
    arguments, config_path, out = _check_arguments(stage, [text for text in rest if text != "--json"])
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise StageError(f"no Ray job server answers at {address}: {' '.join(str(error).split())[:200]}") from None
    mark = f"kinema-result-{secrets.token_hex(8)} "
    with tempfile.TemporaryDirectory(prefix="kinema-submit-") as folder:
        stage_package(Path(folder), config_path)
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "kinema.pipelines.cli", stage, "--json", *arguments]),
            runtime_env={"working_dir": folder, "env_vars": _environment() | {RESULT_MARK_VARIABLE: mark}},
            metadata={"job_name": f"kinema {stage}", "stage": stage, "out": out, "user": _user()},
        )
    sys.stderr.write(f"submitted {job} to {address}\n")
    if not wait:
        stdout.write((json_text({"job": job, "address": address}) if as_json else job) + "\n")
        return 0
    log = _Log(mark)
    asyncio.run(_follow(client, job, log))
    return _result(client, job, log, as_json, stdout)


class _Log:
    """The job's output as it comes: shown on stderr, except the line that holds the summary."""

    def __init__(self, mark: str):
        self.mark = mark
        self.summary: dict[str, Any] | None = None
        self._rest = ""

    def take(self, text: str, show: bool = True) -> None:
        """Some more of it; a line may come in pieces."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line + "\n", show)

    def end(self, show: bool = True) -> None:
        """What came after the last line break."""
        if self._rest:
            self._line(self._rest, show)
        self._rest = ""
        sys.stderr.flush()

    def _line(self, line: str, show: bool) -> None:
        if self.mark in line:
            before, _, text = line.partition(self.mark)
            self.summary, line = json.loads(text), before
        if show and line:
            sys.stderr.write(line)


def _result(client: Any, job: str, log: _Log, as_json: bool, stdout: TextIO) -> int:
    """Wait for the end; the summary on stdout, the stage's exit status back."""
    from ray.job_submission import JobStatus

    while (status := client.get_job_status(job)) not in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
        time.sleep(0.5)
    info = client.get_job_info(job)
    if log.summary is None:  # following can break off; the whole log is there
        log.take(client.get_job_logs(job), show=False)
        log.end(show=False)
    if log.summary is not None:
        print_summary(log.summary, as_json, stdout)
    sys.stderr.write(f"{job}: {status.value} {' '.join((info.message or '').split())[:300]}\n")
    if status == JobStatus.SUCCEEDED:
        return 0
    code = info.driver_exit_code
    return code if status == JobStatus.FAILED and code in (1, 2, 3) else 1


def stage_package(folder: Path, config_path: Path | None = None) -> None:
    """Copy the running `kinema` package into `folder/kinema`, links resolved, with the config file beside it."""
    package = Path(kinema.__file__).resolve().parent
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(package, folder / "kinema", symlinks=False, ignore=ignore)
    if config_path:
        shutil.copyfile(config_path, folder / config_path.name)


def _check_arguments(stage: str, rest: Sequence[str]) -> tuple[list[str], Path | None, str]:
    """Refuse here what the stage would refuse there; the config file is sent along under its bare name.

    Returns: the arguments to send, the config file, and where the stage writes.
    """
    arguments, overrides = [], []
    config_path: Path | None = None
    items = iter([text for text in rest if text != "--"])
    for text in items:
        if text == "--config" or text.startswith("--config="):
            config_path = resolve_config_path(text.partition("=")[2] or next(items, ""))
            arguments += ["--config", config_path.name]
            continue
        arguments.append(text)
        if not text.startswith("--"):
            overrides.append(text)
    assert stage in STAGES
    config = load_stage(stage, config_path, overrides, away=True)
    check_required(stage, config)
    return arguments, config_path, getattr(config, "workspace" if stage == "run" else "out", "")


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in FORWARDED if name in os.environ}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


async def _follow(client: Any, job: str, log: _Log) -> None:
    async for text in client.tail_job_logs(job):
        log.take(text)
        sys.stderr.flush()
    log.end()
