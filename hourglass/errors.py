class InputError(ValueError):
    """
    Something that the caller gave is wrong, and the message says in one line what, what was given and what is taken.

    The command line prints the message alone and exits with code 2.
    """


def reason(error: BaseException) -> str:
    """What an error of other code says, in one line: its kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
