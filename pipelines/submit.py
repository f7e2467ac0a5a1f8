"""`kinema submit`: the same command as a Ray job on a cluster, with its logs followed.

The submitted package itself travels with the job (real files, links resolved), so that every node runs this code.
"""

from __future__ import annotations

import asyncio
import os
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
from kinema.pipelines.errors import StageError

FORWARDED = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "AWS_ENDPOINT_URL")


def submit(stage: str, rest: Sequence[str], *, address: str | None, wait: bool, stdout: TextIO) -> int:
    """Submit `kinema STAGE rest...`; returns the job's exit status (0 or 1), or 0 at once without `wait`.

    Args: address, the job server (http://HEAD:8265); None: RAY_ADDRESS.
    Raises: ValueError for arguments that the stage would refuse, before anything is sent; StageError if no job
        server answers.
    """
    address = address or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"job server address {address!r} is not http(s)://HOST:PORT; use --address http://HEAD:8265")
    arguments, config_path = _check_arguments(stage, rest)
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise StageError(f"no Ray job server answers at {address}: {' '.join(str(error).split())[:200]}") from None
    with tempfile.TemporaryDirectory(prefix="kinema-submit-") as folder:
        stage_package(Path(folder), config_path)
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "kinema.pipelines.cli", stage, *arguments]),
            runtime_env={"working_dir": folder, "env_vars": _environment()},
        )
    sys.stderr.write(f"submitted {job} to {address}\n")
    if not wait:
        stdout.write(job + "\n")
        return 0
    asyncio.run(_follow(client, job))
    while (status := client.get_job_status(job)) not in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
        time.sleep(0.5)
    message = client.get_job_info(job).message or ""
    sys.stderr.write(f"{job}: {status.value} {' '.join(message.split())[:300]}\n")
    return 0 if status == JobStatus.SUCCEEDED else 1


def stage_package(folder: Path, config_path: Path | None = None) -> None:
    """Copy the running `kinema` package into `folder/kinema`, links resolved, with the config file beside it."""
    package = Path(kinema.__file__).resolve().parent
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(package, folder / "kinema", symlinks=False, ignore=ignore)
    if config_path:
        shutil.copyfile(config_path, folder / config_path.name)


def _check_arguments(stage: str, rest: Sequence[str]) -> tuple[list[str], Path | None]:
    """Refuse here what the stage would refuse there; the config file is sent along under its bare name."""
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
    load_stage(stage, config_path, overrides)
    return arguments, config_path


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in FORWARDED if name in os.environ}


async def _follow(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        sys.stderr.write(lines)
        sys.stderr.flush()
