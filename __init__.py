"""The repository's root. A program beside a clone named `twostroke` imports this folder: it gets the package inside."""

from pathlib import Path

if __name__ == "twostroke":
    __file__ = str(Path(__file__).resolve().parent / "src/twostroke/__init__.py")
    __path__ = [str(Path(__file__).parent)]
    exec(compile(Path(__file__).read_text(encoding="utf-8"), __file__, "exec"))
