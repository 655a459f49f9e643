"""The private names of other libraries that the project uses: each with the files where it may stand, and a canary.

`relies_on` makes a test of a statement about such names. When it fails, its message says what breaks without them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

SUPPORT = {"transformers": "transformers_support", "torch": "torch_support", "peft": "support.peft_support"}


@dataclass(frozen=True)
class PrivateName:
    """A name, whose it is, and where it may stand."""

    name: str
    library: str
    files: tuple[str, ...]


LISTED: dict[str, PrivateName] = {}


def relies_on(library: str, *names: str, files: tuple[str, ...] = (), breaks: str) -> Callable:
    """List private names, and let a failure of the decorated test say what does not work without them.

    Args:
        library: whose names they are.
        names: the private ones; none for a statement about an undocumented name.
        files: modules of the package where they may stand; that of the library by default.
        breaks: what does not work without them.
    """
    for name in names:
        assert name not in LISTED, name
        LISTED[name] = PrivateName(name, library, files or (SUPPORT[library],))

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def canary(*args: object, **kwargs: object) -> None:
            try:
                test(*args, **kwargs)
            except Exception as error:
                what = ", ".join(names) or test.__name__.removeprefix("test_")
                raise AssertionError(
                    f"{library} {version(library)}: {what} is not what the package relies on. {breaks} "
                    f"({type(error).__name__}: {error})"
                ) from error

        return canary

    return decorate
