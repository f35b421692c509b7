"""What `up` shows of the cluster that it starts."""

from pathlib import Path

from twostroke.cli.up import _Listener


def test_the_last_line_is_known_also_after_it_was_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"of an earlier one\n")
    with _Listener(log) as told:
        assert (told.news(), told.last) == ([], "")
        with log.open("ab") as out:
            out.write(b"it loads\n\ntwostroke: no such file\nno e")
        assert told.news() == ["it loads", "twostroke: no such file"]
        assert (told.news(), told.last) == ([], "twostroke: no such file")
        with log.open("ab") as out:
            out.write(b"nd\n")
        assert (told.news(), told.last) == (["no end"], "no end")
