"""`kinema STAGE --config configs/x.yaml key=value ...`: parsing, exit status and the JSON line.

Exit status: 0 done; 1 failed; 2 bad arguments or config; 3 finished, but too many inputs were quarantined.
Logs and progress go to stderr; stdout carries the summary only.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import kinema
from kinema.configs import STAGES, PageConfig, load_stage
from kinema.configs.describe import describe, key_names
from kinema.configs.models.row import resolve
from kinema.configs.models.table import MODELS
from kinema.configs.required import COMMON, REQUIRED, check_required
from kinema.pipelines import stages
from kinema.pipelines.errors import StageError
from kinema.pipelines.progress import never_silent
from kinema.pipelines.summary import print_summary

PURPOSE = {
    **{name: stage.purpose for name, stage in stages.STAGES.items()},
    "run": stages.WORKFLOW.purpose,
    "submit": "any of the above as a Ray job on a cluster, logs followed",
    "flow": "flow between two pictures, or of a film, as file, picture or film",
    "features": "features of a picture, as picture or array",
    "models": "the table of models: parameters, licence, published numbers, whether weights are at hand",
    "completion": "a script that completes commands and keys in your shell",
    "status": "how far an artifact, a run or a cluster's jobs are: shards done and failed, rate, time left, cost",
    "verify": "re-hash an artifact and report every difference",
    "inspect": "a page with figures and pictures of an artifact or run",
    "demo": "flowfeat: the whole path on your videos or on rendered scenes; fpt: a page to poke images on",
}
DONE, FAILED, USAGE = 0, 1, 2
_WRONG_PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    try:
        args = _parse(list(sys.argv[1:] if argv is None else argv))
    except ValueError as error:  # models of other packages that cannot be loaded
        return _refuse("", error, USAGE)
    # Threads that wait by spinning make a shared machine many times slower; read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _stdout_for_summary() as stdout:
        try:
            return _dispatch(args, stdout)
        except ValueError as error:
            return _refuse(args.command, error, USAGE)
        except StageError as error:
            return _refuse(args.command, error, FAILED)
        except BrokenPipeError:
            return _refuse(args.command, "whoever read the output went away before its end", FAILED)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                fix = "free some space or set out= to another disk"
                return _refuse(args.command, f"disk full while writing {error.filename or 'output'}; {fix}", FAILED)
            if error.errno in _WRONG_PATH and error.filename:
                fix = "check the path and its permissions"
                return _refuse(args.command, f"{error.filename}: {error.strerror}; {fix}", USAGE)
            return _unexpected(args.command, error)
        except KeyboardInterrupt:
            return _refuse(args.command, "stopped by the user; run the same command again to go on", FAILED)
        except Exception as error:  # noqa: BLE001 - the last line of defence: one line, details in a file
            return _unexpected(args.command, error)


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(USAGE, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def make_parser(with_keys: bool = False) -> _Parser:
    """The parser of every command. Args: with_keys, whether settings are listed as choices, for shell completion."""
    parser = _Parser(
        prog="kinema",
        description="Raw videos in, motion models out.",
        epilog="`kinema STAGE --help` lists the keys of a stage; settings are written key=value.",
    )
    parser.add_argument("--version", action="version", version=f"kinema {kinema.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, purpose in PURPOSE.items():
        sub = commands.add_parser(
            name,
            help=purpose,
            description=purpose,
            epilog=_keys_of(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "completion":
            sub.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")
            continue
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
        if name == "submit":
            sub.add_argument("--address", default=None, help="http://HEAD:8265; default: RAY_ADDRESS")
            sub.add_argument("--no-wait", action="store_true", help="return after submission")
            sub.add_argument("stage", choices=sorted(STAGES), help="the stage to submit")
            sub.add_argument("rest", nargs=argparse.REMAINDER, help="its arguments")
        elif name in ("verify", "inspect"):
            sub.add_argument("target", help="folder or URL of an artifact" + (" or run" if name == "inspect" else ""))
            if name == "inspect":
                sub.add_argument("others", nargs="*", help="further flow of the same clips: teachers side by side")
                sub.add_argument("--truth", default="", help="true motion: a flow artifact, or the rendered videos")
                sub.add_argument("--out", default="", help="where the page goes; default: beside the target")
                sub.add_argument("--pictures", default="", help="folder for its pictures and films as files")
        elif name == "status":
            sub.add_argument("target", help="folder or URL of an artifact, folder of a run, or http://HEAD:8265")
            sub.add_argument(
                "--config", default=None, help="workflow file; its section `prices` gives a cluster's cost"
            )
            sub.add_argument(
                "--node-price", type=float, default=None, help="dollars for a node and hour: adds the cost"
            )
            sub.add_argument("--nodes", type=int, default=1, help="nodes at work")
        elif name in ("flow", "features"):
            sub.add_argument("inputs", nargs="+", metavar="FILE or key=value", help="pictures or a film, and settings")
        elif name != "models":
            if name == "demo":
                sub.add_argument("model", choices=MODELS.demos(), help="which model")
            sub.add_argument("--config", default=None, help="workflow file; its section for this stage is read")
            keys = [f"{key}=" for key in key_names(STAGES[name])] if with_keys and name in STAGES else None
            sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings, dotted keys", choices=keys)
    return parser


def _keys_of(name: str) -> str | None:
    if name in STAGES:
        return f"keys (key=value):\n{describe(STAGES[name], REQUIRED[name], COMMON.get(name, ()))}"
    if name == "demo":
        return f"keys of fpt (key=value; those of flowfeat are `kinema run`'s):\n{describe(PageConfig)}"
    if name in ("flow", "features"):
        from kinema.pipelines import single

        return f"keys (key=value):\n{describe(single.FlowRequest if name == 'flow' else single.FeaturesRequest)}"
    return None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    if not argv:
        parser.print_help()
        parser.exit(DONE)
    if not argv[0].startswith("-") and argv[0] not in PURPOSE:
        near = difflib.get_close_matches(argv[0], PURPOSE, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(PURPOSE)}"
        parser.error(f"invalid choice: there is no command {argv[0]!r}; {hint}")
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "overrides"):
        args.overrides = None
    # argparse gives up on `a=1 --json b=2`; settings behind a flag are settings all the same.
    wrong = [text for text in rest if text.startswith("-") or args.overrides is None]
    if wrong:
        parser.error(
            f"{args.command}: unrecognized arguments: {' '.join(wrong)}{_as_settings(args.command, argv, wrong)}"
        )
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _as_settings(command: str, argv: list[str], wrong: list[str]) -> str:
    """`--videos X` as it is written here, where the stage has that key."""
    if command not in STAGES:
        return ""
    keys, hints = key_names(STAGES[command]), []
    for text in wrong:
        name, sign, value = text.lstrip("-").replace("-", "_").partition("=")
        near = name if name in keys else next(iter(difflib.get_close_matches(name, keys, n=1, cutoff=0.8)), "")
        if near:
            after = argv[argv.index(text) + 1 : argv.index(text) + 2]
            follows = after[0] if after and "=" not in after[0] and not after[0].startswith("-") else "VALUE"
            hints.append(f"{near}={text.partition('=')[2] if sign else follows}")
    return f"; settings have no dashes, write {' '.join(hints)}" if hints else ""


def _dispatch(args: argparse.Namespace, stdout: TextIO) -> int:
    if args.command == "verify":
        return _verify(args, stdout)
    if args.command == "completion":
        import shtab

        stdout.write(shtab.complete(make_parser(with_keys=True), args.shell))
        return DONE
    if args.command == "models":
        from kinema.pipelines.single import write_models

        return write_models(args.json, stdout)
    if args.command == "submit":
        from kinema.pipelines.submit import submit

        wait = not args.no_wait
        return submit(args.stage, args.rest, address=args.address, wait=wait, stdout=stdout, as_json=args.json)
    if args.command == "inspect":
        summary: Any = _inspect(args)
    elif args.command == "status":
        summary = _status(args)
    elif args.command in ("flow", "features"):
        from kinema.pipelines import single

        summary = (single.flow_command if args.command == "flow" else single.features_command)(args.inputs)
    elif args.command == "demo":
        _sigterm_interrupts()
        summary = resolve(MODELS[args.model].demo)(args.config, args.overrides)
        if not args.json and getattr(summary, "is_for_programs", False):
            return int(summary.exit_status)  # the page said on stderr how it ended
    else:
        config = load_stage(args.command, args.config, args.overrides)
        check_required(args.command, config)
        _sigterm_interrupts()
        with never_silent(args.command):
            summary = stages.run_stage(args.command, config)
    print_summary(summary, args.json, stdout)
    return int(getattr(summary, "exit_status", DONE))


def _status(args: argparse.Namespace) -> dict[str, Any]:
    if args.target.startswith(("http://", "https://")):
        from kinema.pipelines.cluster_status import cluster_status

        return cluster_status(args.target, load_stage("run", args.config).prices)
    from kinema.pipelines.status import Cost, status

    return status(args.target, None if args.node_price is None else Cost(args.node_price, args.nodes))


def _inspect(args: argparse.Namespace) -> Any:
    from kinema.pipelines.report.inspect import inspect, inspect_teachers

    out, pictures = args.out or None, args.pictures or None
    if args.others:
        return inspect_teachers([args.target, *args.others], out, pictures, args.truth or None)
    if args.truth:
        raise ValueError(f"--truth {args.truth}: errors are shown where teachers are compared; give two flow artifacts")
    return inspect(args.target, out, pictures)


def _verify(args: argparse.Namespace, stdout: TextIO) -> int:
    from kinema.pipelines.artifacts import Artifact

    problems = Artifact.read(args.target).verify()
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    print_summary({"artifact": args.target, "problems": len(problems)}, args.json, stdout)
    return FAILED if problems else DONE


def _refuse(command: str, reason: object, status: int) -> int:
    sys.stderr.write(f"{f'kinema {command}'.strip()}: {' '.join(str(reason).split())}\n")
    return status


def _unexpected(command: str, error: BaseException) -> int:
    """A failure nobody foresaw: one line for the user, the traceback in a file (or shown by KINEMA_DEBUG=1)."""
    if os.environ.get("KINEMA_DEBUG") == "1":
        traceback.print_exception(error)
        return FAILED
    with tempfile.NamedTemporaryFile("w", prefix="kinema-", suffix=".log", delete=False) as log:
        traceback.print_exception(error, file=log)
    line = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return _refuse(command, f"{line} (details in {log.name}; KINEMA_DEBUG=1 shows them here)", FAILED)


def _sigterm_interrupts() -> None:
    """A job that is stopped gets SIGTERM: stages then end as on Ctrl-C. Training installs its own handler."""

    def interrupt(_signum: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@contextlib.contextmanager
def _stdout_for_summary() -> Iterator[TextIO]:
    """Keep stdout for the summary: whatever else is printed, by workers too, goes to stderr."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:
        yield sys.stdout
        return
    os.dup2(2, 1)
    stream = os.fdopen(saved, "w", encoding="utf-8", closefd=False)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield stream
    finally:
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def entry() -> None:
    """Console script."""
    # The repository root must not shadow other packages named `models` or `kernels`.
    root = str(Path(__file__).resolve().parents[1])
    sys.path[:] = [p for p in sys.path if p not in ("", root)]
    sys.exit(main())


if __name__ == "__main__":
    entry()
