"""Settings that are texts: environment variables."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Set

from .errors import ConfigurationError
from .logs import get_logger

__all__ = ['ADAPTER_VARIABLES', 'PREFIX', 'check_variables', 'from_text']

#: What the names of all variables begin with.
PREFIX = 'JOBSYNC_'
#: What the adapters and the test kit read from the environment, besides the settings of a cluster.
ADAPTER_VARIABLES = frozenset(
    {
        'affinity',
        'application',
        'clear_existing_locks',
        'coordinate',
        'http',
        'max_hops',
        'node_name',
        'on_unclaimed',
        'park_sec',
        'pin_slots',
        'required',
        'resume',
        'route_producers',
        'wait_for_database_sec',
        'wait_on_enter',
        'wait_on_exit',
        'weight',
    }
)
#: What is said of a setting that no variable gives.
_ELSEWHERE = {
    'connection_options': (
        'is ignored: connection_options cannot be given by the environment; write them into the '
        'database URL, as in ?sslmode=require'
    )
}
#: Kubernetes makes such variables for a service that is called jobsync.
_SERVICE = re.compile(r'SERVICE_(HOST|PORT.*)|PORT_\d+_.*')
#: How alike two names are if one is probably the other misspelt.
_ALIKE = 0.8
_unknown: set[str] = set()

logger = get_logger(__name__)


def check_variables(environ: Mapping[str, str], names: Set[str]) -> None:
    """Refuse a variable that is a setting misspelt; say once that one is unknown.

    Args:
        environ: Where to look.
        names: The settings of a cluster that a variable may give, in lower case.

    Raises:
        ConfigurationError: A variable's name is nearly that of a setting.
    """
    known = names | ADAPTER_VARIABLES
    for variable in environ:
        name = variable.removeprefix(PREFIX)
        if (
            name == variable
            or name.lower() in known
            or name.startswith('TEST_')
            or _SERVICE.fullmatch(name)
        ):
            continue
        near = difflib.get_close_matches(name.lower(), sorted(known), 1, _ALIKE)
        if near:
            raise ConfigurationError(
                f'the environment variable {variable!r} is no setting: did you mean '
                f'{PREFIX}{near[0].upper()}? Rename it, or remove it'
            )
        if variable not in _unknown:
            _unknown.add(variable)
            problem = _ELSEWHERE.get(name.lower(), 'is no setting of JobSync and is ignored')
            logger.warning('the environment variable %r %s', variable, problem)


def from_text(variable: str, raw: str, default: object, *, whole: bool = False) -> object:
    """The value of a setting that was given as a text.

    Args:
        variable: The environment variable, for the message.
        raw: The text.
        default: The setting's default, which says what kind of value it takes.
        whole: Whether a setting whose default is a whole number takes no other.

    Raises:
        ConfigurationError: It is none of that kind.
    """
    if isinstance(default, bool):
        if raw.lower() in ('1', 'true', 'yes', 'on', '0', 'false', 'no', 'off'):
            return raw.lower() in ('1', 'true', 'yes', 'on')
        raise ConfigurationError(f'{variable}={raw!r}: give true or false')
    if not isinstance(default, (int, float)):
        return raw
    for kind in (int, float) if isinstance(default, int) else (float,):
        try:
            return kind(raw)
        except ValueError:
            if whole:
                break
    raise ConfigurationError(f'{variable}={raw!r}: give a number')
