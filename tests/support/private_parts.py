"""Which private parts of other packages a package uses: found in its source and in its classes.

Private is a name with one underscore before it. It is another package's part

- where it is read or written of anything but `self`, or named to `getattr`,
- where it is used of `super()`, and no class of the package has it,
- where a class of the package uses or overrides what a foreign base class has,
- where nothing in the package defines it,
- where a method has it that nothing in the package calls, so that somebody else does.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from jobsync_core.worker.parts import Part, missing

__all__ = ['foreign_names', 'names_in']

_PRIVATE = re.compile(r'_[A-Za-z]\w*')
#: Of the standard library, and documented there; and JobSync's own marks on what is not its own.
_OURS = re.compile(r'_exit|_jobsync\w*')


def foreign_names(package: str) -> dict[str, str]:
    """The private names of others that a package uses, each with a place where it does.

    Args:
        package: Its name; it is imported, with all of its modules.
    """
    found: dict[str, str] = {}
    doubtful: dict[str, str] = {}
    methods: dict[str, str] = {}
    own: set[str] = set()
    for module in _modules(package):
        tree = _tree(module)
        own |= set(_defined(tree))
        for name, line, certain in _used(tree):
            (found if certain else doubtful).setdefault(name, f'{module.__name__}:{line}')
        methods |= {name: f'{module.__name__}:{line}' for name, line in _methods(tree)}
        found |= _inherited(module, package)
    found |= {name: where for name, where in doubtful.items() if name not in own}
    found |= {name: where for name, where in methods.items() if name not in doubtful}
    return {name: where for name, where in found.items() if not _OURS.fullmatch(name)}


def names_in(package: str) -> set[str]:
    """Every name that stands in a package's source: attributes, definitions, imports and texts."""
    found: set[str] = set()
    for module in _modules(package):
        for node in ast.walk(_tree(module)):
            match node:
                case ast.Attribute():
                    found.add(node.attr)
                case ast.FunctionDef() | ast.alias():
                    found.add(node.name)
                case ast.Name():
                    found.add(node.id)
                case ast.keyword(arg=str(name)) | ast.Constant(value=str(name)):
                    found.add(name)
    return found


def _modules(package: str) -> Iterator[ModuleType]:
    root = importlib.import_module(package)
    yield root
    for found in pkgutil.walk_packages(root.__path__, f'{package}.'):
        # The inventory itself names everything.
        if found.name != f'{package}.parts':
            yield importlib.import_module(found.name)


def _tree(module: ModuleType) -> ast.Module:
    assert module.__file__
    return ast.parse(Path(module.__file__).read_text(encoding='utf-8'))


def _used(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Private names with their lines, and whether each is certainly another's."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute() if _PRIVATE.fullmatch(node.attr):
                yield node.attr, node.lineno, not _is_own(node.value)
            case ast.ImportFrom() if not node.level:
                for part in (node.module or '').split('.') + [alias.name for alias in node.names]:
                    if _PRIVATE.fullmatch(part) and not part.startswith('__'):
                        yield part, node.lineno, True
            case ast.Call(
                func=ast.Name(id='getattr' | 'hasattr' | 'setattr' | 'delattr'),
                args=[_, ast.Constant(value=str(name)), *_],
            ) if _PRIVATE.fullmatch(name):
                yield name, node.lineno, True


def _is_own(value: ast.expr) -> bool:
    match value:
        case ast.Name(id='self' | 'cls') | ast.Call(func=ast.Name(id='super')):
            return True
    return False


def _defined(tree: ast.Module) -> Iterator[str]:
    """What the source itself makes: functions, classes, variables, and attributes of `self`."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.Attribute(ctx=ast.Store(), value=ast.Name(id='self')):
                yield node.attr


def _methods(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and _PRIVATE.fullmatch(part.name):
                    yield part.name, part.lineno


def _inherited(module: ModuleType, package: str) -> dict[str, str]:
    """Private names that classes of a module have, or want to have, of foreign base classes."""
    found: dict[str, str] = {}
    for node in ast.walk(_tree(module)):
        cls = vars(module).get(node.name) if isinstance(node, ast.ClassDef) else None
        if not isinstance(cls, type):
            continue
        body = ast.Module([node], [])  # type: ignore[list-item]  # a ClassDef, as cls is none else
        ours = [base for base in cls.__mro__[1:] if base.__module__.split('.')[0] == package]
        others = [base for base in cls.__mro__[1:] if base not in ours and base is not object]
        names = {name for name, _, _ in _used(body)} | set(_defined(body))
        wanted = {
            part.attr
            for part in ast.walk(node)
            if isinstance(part, ast.Attribute)
            and isinstance(part.value, ast.Call)
            and _is_own(part.value)
            and not any(part.attr in vars(base) for base in ours)
        }
        found |= {
            name: f'{module.__name__}:{cls.__name__}'
            for name in names
            if _PRIVATE.fullmatch(name)
            and (name in wanted or any(_has(base, name) for base in others))
        }
    return found


def _has(base: type, name: str) -> bool:
    return '<locals>' not in base.__qualname__ and not missing(
        [Part('', f'{base.__module__}:{base.__qualname__}', (name,))]
    )
