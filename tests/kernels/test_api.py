"""The interface between Python and C++ is declared once, in `kernels/cpu/api.h`, and `library.py` mirrors it.

Names and their order are parsed from the header. The compiler checks sizes, offsets and types, by a
generated file of static assertions.
"""

import ctypes
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from twostroke.kernels.cpu import build
from twostroke.kernels.cpu import library as native
from twostroke.kernels.cpu.build import NativeUnavailable

FOLDER = Path(build.__file__).parent
SOURCES = {
    path.relative_to(FOLDER).as_posix(): re.sub(r"//.*", "", path.read_text())
    for path in sorted(FOLDER.rglob("*"))
    if path.suffix in (".h", ".cpp")
}
API = SOURCES["api.h"]
STRUCTS = dict(re.findall(r"^struct (\w+) \{(.*?)^\};", API, re.M | re.S))
# A type, an exported name, parameters without parentheses, and ";" of a declaration or "{" of a definition.
FUNCTION = re.compile(
    r'^\s*(?:extern "C" )?(?!return\b)(?:const )?\w+[\s*&]+(twostroke_\w+)\s*\([^()]*\)\s*([;{])', re.M
)
MIRRORS = {
    name: mirror
    for name, mirror in vars(native).items()
    if isinstance(mirror, type) and issubclass(mirror, ctypes.Structure) and mirror.__module__ == native.__name__
}
SCALARS = {
    ctypes.c_int32: "int32_t", ctypes.c_int64: "int64_t", ctypes.c_uint64: "uint64_t", ctypes.c_float: "float",
}  # fmt: skip
PRELUDE = """
#include <cstddef>
#include <tuple>
#include <type_traits>
#include "api.h"
#include "simd.h"
template <class F> struct Function;
template <class R, class... A> struct Function<R (*)(A...)> { using Result = R; using Arguments = std::tuple<A...>; };
template <class F, std::size_t I> using Argument = std::tuple_element_t<I, typename Function<F>::Arguments>;
template <class T> using Pointee = std::remove_cv_t<std::remove_pointer_t<T>>;
"""


def declared(kind: str, text: str) -> list[str]:
    """Names of the functions that `text` declares (";") or defines ("{")."""
    return [name for name, end in FUNCTION.findall(text) if end == kind]


def field_names(body: str) -> list[str]:
    """Names of a struct's fields, in order: the last word of each declarator."""
    return [re.findall(r"\w+", re.sub(r"\[.*?\]", "", part))[-1] for part in re.split("[;,]", body) if part.strip()]


def condition(mirror: Any, kind: str) -> str:
    """The C++ condition that type `kind` is what the ctypes type stands for."""
    if mirror is None:
        return f"std::is_void_v<{kind}>"
    if mirror in SCALARS:
        return f"std::is_same_v<{kind}, {SCALARS[mirror]}>"
    if mirror is ctypes.c_void_p:
        return f"std::is_pointer_v<{kind}>"
    if mirror is ctypes.c_char_p:
        return f"std::is_same_v<{kind}, const char*>"
    if issubclass(mirror, ctypes.Array):
        element = condition(mirror._type_, f"std::remove_extent_t<{kind}>")
        return f"std::extent_v<{kind}> == {mirror._length_} && {element}"
    if issubclass(mirror, ctypes._Pointer):
        return f"std::is_pointer_v<{kind}> && std::is_same_v<Pointee<{kind}>, {mirror._type_.__name__}>"
    return f"std::is_same_v<{kind}, {mirror.__name__}>"


def assertions() -> Iterator[str]:
    for name, mirror in MIRRORS.items():
        yield f'static_assert(sizeof({name}) == {ctypes.sizeof(mirror)}, "{name}");'
        for field, kind in mirror._fields_:
            offset, where = getattr(mirror, field).offset, f"{name}, {field}"
            yield f'static_assert(offsetof({where}) == {offset}, "{where}: its offset");'
            yield f'static_assert({condition(kind, f"decltype({name}::{field})")}, "{where}: its type");'
    for name, (result, arguments) in native._SIGNATURES.items():
        function = f"decltype(&twostroke_{name})"
        size = f"std::tuple_size_v<Function<{function}>::Arguments>"
        yield f'static_assert({condition(result, f"Function<{function}>::Result")}, "{name}: its result");'
        yield f'static_assert({size} == {len(arguments)}, "{name}: the number of its arguments");'
        for i, kind in enumerate(arguments):
            yield f'static_assert({condition(kind, f"Argument<{function}, {i}>")}, "{name}: argument {i}");'
    for name in re.findall(r"(\w+) = -?\d+", API):
        yield f'static_assert({name} == {getattr(native, name)}, "{name}");'
    yield f'static_assert(simd::LANES == {native.LANES}, "LANES");'


def test_every_exported_function_is_declared_once_and_defined_once() -> None:
    names = declared(";", API)
    assert sorted(names) == sorted(f"twostroke_{name}" for name in native._SIGNATURES)
    assert sorted(name for text in SOURCES.values() for name in declared("{", text)) == sorted(names)
    assert not {file: found for file, text in SOURCES.items() if file != "api.h" and (found := declared(";", text))}


def test_the_library_exports_what_is_declared_and_nothing_else() -> None:
    try:
        library = build.built_library()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    exported = {name.decode() for name in re.findall(rb"\0(twostroke_\w+)(?=\0)", library.read_bytes())}
    assert exported == set(declared(";", API))


def test_every_source_includes_the_header_so_that_a_changed_signature_does_not_compile() -> None:
    assert {name for name in SOURCES if name.endswith(".cpp")} == set(build.SOURCES)
    assert not [name for name in build.SOURCES if '#include "api.h"' not in SOURCES[name]]


def test_structs_that_cross_are_defined_in_the_header_alone_and_have_the_fields_of_python_in_order() -> None:
    assert {name: field_names(body) for name, body in STRUCTS.items()} == {
        name: [field for field, _ in mirror._fields_] for name, mirror in MIRRORS.items()
    }
    again = re.compile(rf"\b(?:struct|class) ({'|'.join(STRUCTS)})\b")
    assert not {file: found for file, text in SOURCES.items() if file != "api.h" and (found := again.findall(text))}


def test_sizes_offsets_types_and_constants_of_python_are_those_of_the_compiler(tmp_path: Path) -> None:
    try:
        compiler = build.find_compiler()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    checks = list(assertions())
    assert len(checks) > 2 * len(native._SIGNATURES) + 2 * len(MIRRORS)
    source = tmp_path / "mirror.cpp"
    source.write_text(PRELUDE + "\n".join(checks))
    command = [compiler, "-std=c++17", "-fsyntax-only", "-w", f"-I{FOLDER}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
