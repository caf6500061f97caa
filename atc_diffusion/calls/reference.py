"""References that keep nothing alive."""

import weakref
from typing import Any


class Reference:
    """A weak reference to an object, or to its copy if both are copied together.

    Args:
        target: None, or of a kind that allows no weak references: refers to nothing.
    """

    def __init__(self, target: object) -> None:
        try:
            self._target: Any = weakref.ref(target)
        except TypeError:
            self._target = lambda: None

    def __call__(self) -> Any:
        return self._target()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Reference":
        return Reference(memo.get(id(self()), self()))

    def __reduce__(self) -> tuple[Any, ...]:
        """What is read from a file refers to nothing."""
        return Reference, (None,)
