"""Processors that take the place of diffusers', where hooks on the attention are not enough."""

from typing import Any


def _of_original(name: str) -> Any:
    """An attribute that is the original's, also when it is set."""
    return property(lambda self: getattr(self.original, name), lambda self, value: setattr(self.original, name, value))


class StandIn:
    """A processor with one of diffusers' inside, which is put back when the patch is removed.

    It says that it is of the original's class, because diffusers looks processors up by `__class__`: guidance by hooks
    in a registry, others by `isinstance`.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    @property  # type: ignore[misc]  # read-only, as nobody sets it
    def __class__(self) -> Any:
        return type(self.original)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.original,)  # copying and pickling go by `__class__`

    _attention_backend = _of_original("_attention_backend")  # what set_attention_backend and
    _parallel_config = _of_original("_parallel_config")  # enable_parallelism set
