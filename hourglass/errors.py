class InputError(ValueError):
    """
    An error in what the caller gave. The message says in one line what is wrong, what was given and what is accepted.

    The command line prints only the message and exits with code 2.
    """


def reason(error: BaseException) -> str:
    """An error of other code in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
