class InputError(ValueError):
    """
    Something that the caller gave is wrong, and the message says in one line what, what was given and what is taken.

    The command line prints the message alone and exits with code 2.
    """
