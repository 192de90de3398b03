"""The base of every error that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Something given to us cannot work. The message says what, where (file, record, key) and what to do.

    Commands print it in one line, without a traceback; any other exception is a bug of ours and keeps its traceback.
    """


class ConfigError(UserError):
    """A configuration that cannot work; the message names the key and what to change."""
