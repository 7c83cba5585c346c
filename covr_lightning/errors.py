"""The one error a user can cause and mend."""


class ConfigError(ValueError):
    """A setting that cannot work.

    The message is one sentence that names the value received, the valid choices and the YAML key to change.
    The command line prints it without a traceback and exits with status 2.
    """


class NonFiniteError(Exception):
    """A reward, a loss or a gradient is NaN or infinite; the message names the step. Exit status 3."""
