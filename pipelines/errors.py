"""The two ways a stage refuses: ValueError (bad argument, config, input; status 2) and StageError (status 1)."""


class StageError(RuntimeError):
    """The stage could not finish (disk full, no usable sample, too many failures); one line, with the fix."""
