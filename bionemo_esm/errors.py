"""Errors that a user can fix. Commands print them in one line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """An input that cannot work. The message says what is wrong, where (file, record, key) and what to do.

    `code` identifies the kind of error independently of the wording: programs and tests compare it, people read the
    message. A class has a default code; `code=` at the raise statement is more specific.
    """

    code = "user-error"

    def __init__(self, *args: object, code: str | None = None) -> None:
        super().__init__(*args)
        if code is not None:
            self.code = code


class ConfigError(UserError):
    """A configuration that cannot work. The message names the key and what to change."""

    code = "config"
