"""The Job: what a user holds while this process is a node of the cluster."""
from __future__ import annotations

import datetime
import logging
import os
import threading
import uuid
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import clock
from .agent import Agent
from .callbacks import Callbacks
from .claims import Claims
from .config import CoordinationConfig
from .errors import ClaimLost, ConfigurationError, DatabaseUnavailable, JobSyncError, NotEntered
from .hashing import HASH_FUNCTIONS, check_task_id, task_key
from .ledger import Ledger, set_current_ledger
from .once import once
from .patterns import check_patterns
from .process import is_known_dead, this_process
from .protocol import Phase, Protocol, Settings
from .store import locks, status, tasks
from .store.connection import Sessions
from .store.control import Control
from .store.schema import Tables, create_schema
from .task import Task, task_id_of
from .tokens import TokenSet

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from .ledger import Execution

__all__ = ['Job']

logger = logging.getLogger(__name__)

_NAME_LENGTH = 200
