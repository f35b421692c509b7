"""Triton's interpreter without the work that it does again at every call of one jitted function by another.

There it patches all of `triton.language` as at a launch, which is a third of the time that tests of kernels take. Here
a launch patches what its functions see, once. Changes no number; nothing at all in a release that is built otherwise.
"""

from typing import Any


def quicken() -> None:
    """Once per process; nothing where the interpreter is not in use."""
    from triton.runtime import interpreter

    names = ("_patch_lang", "_LangPatchScope", "GridExecutor", "InterpretedFunction", "tl")
    if any(not hasattr(interpreter, name) for name in names) or hasattr(interpreter, "is_quick"):
        return
    interpreter.is_quick = True  # type: ignore[attr-defined]
    patch, executor = interpreter._patch_lang, interpreter.GridExecutor
    launch = executor.__call__
    running = False

    class Seen:
        """A function that sees both modules by which kernels and triton's own functions name the language."""

        __globals__ = {"tl": interpreter.tl, "core": interpreter.tl.core}  # noqa: RUF012

    def patch_once(fn: Any) -> Any:
        return interpreter._LangPatchScope() if running else patch(Seen)

    def launched(self: Any, *args: Any, **named: Any) -> Any:
        nonlocal running
        assert not running, "a kernel does not launch another"
        scope = patch(Seen)
        running = True
        try:
            return launch(self, *args, **named)
        finally:
            running = False
            scope.restore()

    interpreter._patch_lang = patch_once
    executor.__call__ = launched
