"""Text that must not be shown by accident."""

from __future__ import annotations

__all__ = ['SECRET_OPTIONS', 'Secret', 'hide']

#: libpq parameters that are secrets.
SECRET_OPTIONS = frozenset(
    {'password', 'sslpassword', 'oauth_client_secret', 'scram_client_key', 'scram_server_key'}
)
_HIDDEN = "'***'"


class Secret(str):
    """A string whose `repr` is `'***'`.

    Tracebacks with local variables, `repr` of what holds it (dicts and dataclasses too) and `%r` in
    logs show no more than that. Whoever formats it with `str` or `%s` wants the text itself, to
    build a URL for example, and gets it.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return _HIDDEN


def hide(value: object) -> object:
    """The value, as a Secret if it is text."""
    return Secret(value) if isinstance(value, str) else value
