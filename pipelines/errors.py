"""The two ways a stage refuses: ValueError (bad argument, config, input; status 2) and StageError (status 1)."""


class StageError(RuntimeError):
    """The stage could not finish (disk full, no usable sample, too many failures); one line, with the fix."""


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of at most 2000 characters."""
    return " ".join(str(error).split())[:2000] or type(error).__name__
