import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gi_segmentation import files
from gi_segmentation.errors import InputError
from gi_segmentation.files import find_files, write_json, write_text, writing_file, writing_folder, writing_to
from tests.support.processes import ROOT

# Writes a file or a folder again and again, and kills the process one step later each time: before it opens, renames,
# changes or removes something. After each death it prints what is there, and what is there after the next write.
KILLED = """
import os, signal, sys
from pathlib import Path
from gi_segmentation import files

what, target = sys.argv[1], Path(sys.argv[2])

def write(text):
    if what == "file":
        files.write_text(target, text)
        return
    with files.writing_folder(target) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(text)

def read():
    if what != "file" and not target.exists():
        files.clear_leftovers(target)
    paths = [target] if what == "file" else sorted(target.iterdir())
    return [path.read_text() for path in paths]

if what == "folder without exchange":
    files.exchange = lambda first, second: False
step = killed = 0
while not step or killed:
    step += 1
    write("old")
    child = os.fork()
    if not child:
        steps = iter(range(1, step))
        def kill(event, arguments):
            if event.startswith(("open", "os.", "shutil.")) and next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(kill)
        write("new")
        os._exit(0)
    killed = os.waitpid(child, 0)[1]
    print(*read())
write("last")
print(*read(), *os.listdir(target.parent))
"""


def visible(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_files(folder).files]


@pytest.mark.parametrize("what", ["file", "folder", "folder without exchange"])
def test_a_process_killed_at_any_step_leaves_the_old_or_the_new(what: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, what, str(tmp_path / "target")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    *states, last = printed.splitlines()
    old, new = ("old", "new") if what == "file" else ("old old", "new new")
    # First the old content, from some step on the new one.
    assert states == [old] * states.count(old) + [new] * states.count(new)
    assert states.count(old) >= 3 and states[-1] == new
    assert last == f"{old.replace('old', 'last')} target", "the next write removes what is left"


class TestFindFiles:
    def test_links_are_followed_and_circles_end(self, tmp_path: Path) -> None:
        (tmp_path / "store" / "inner").mkdir(parents=True)
        (tmp_path / "store" / "inner" / "x").touch()
        (tmp_path / "store" / "back").symlink_to(tmp_path / "store")
        (tmp_path / "in" / "real").mkdir(parents=True)
        (tmp_path / "in" / "real" / "y").touch()
        (tmp_path / "in" / "linked").symlink_to("../store")
        (tmp_path / "in" / "again").symlink_to("real")
        (tmp_path / "in" / "z").symlink_to("real/y")
        (tmp_path / "in" / "real" / "up").symlink_to("..")
        (tmp_path / "whole").symlink_to("in")
        for folder in (tmp_path / "in", tmp_path / "whole"):
            found = find_files(folder)
            # The folder `again` has the same files as `real`, and they count once. A link to a file is a file.
            assert visible(folder) == ["linked/inner/x", "real/y", "z"] and not found.broken
            assert [path.name for path in found.repeated] == ["again", "back", "up"]

    def test_hidden_names_are_passed_over_but_not_links_to_them(self, tmp_path: Path) -> None:
        for name in ("a.png", "._a.png", ".git/annex/key.png", ".ipynb_checkpoints/a.png", "__MACOSX/._a.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).touch()
        (tmp_path / "b.png").symlink_to(".git/annex/key.png")
        (tmp_path / "c.png").symlink_to(".git/annex/key.png")
        (tmp_path / "d").symlink_to(".git/annex")
        assert visible(tmp_path) == ["a.png", "b.png", "c.png", "d/key.png"]
        assert visible(tmp_path / ".git") == ["annex/key.png"], "the folder that the user names may be hidden"

    def test_broken_links_are_reported(self, tmp_path: Path) -> None:
        (tmp_path / "circle").symlink_to("circle")
        (tmp_path / "missing").symlink_to("nowhere")
        (tmp_path / ".#lock").symlink_to("nowhere")
        os.mkfifo(tmp_path / "pipe")
        assert find_files(tmp_path) == ([], [tmp_path / "circle", tmp_path / "missing"], [])

    def test_a_folder_can_be_left_out_under_any_name(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").touch()
        (tmp_path / "link").symlink_to("out")
        assert find_files(tmp_path, tmp_path / "link") == ([], [], [])
        assert visible(tmp_path / "out") == ["x"]
        assert find_files(tmp_path / "out", tmp_path / "out").files == [tmp_path / "out" / "x"]

    def test_a_folder_that_cannot_be_read_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "closed").mkdir()
        opened = os.scandir

        def refuse(path: Path) -> object:
            if path.name == "closed":
                raise PermissionError(13, "Permission denied")
            return opened(path)

        monkeypatch.setattr(files.os, "scandir", refuse)
        with pytest.raises(InputError, match=r"closed: this folder cannot be read .*Permission denied"):
            find_files(tmp_path)
        with pytest.raises(InputError, match="nowhere: cannot be read"):
            find_files(tmp_path / "nowhere")


class TestWriting:
    def test_an_error_changes_nothing(self, tmp_path: Path) -> None:
        write_text(tmp_path / "a.json", "old")
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "a.json", float("nan"))
        with pytest.raises(KeyError), writing_file(tmp_path / "a.json") as scratch:
            scratch.write_text("half")
            raise KeyError
        with pytest.raises(KeyError), writing_folder(tmp_path / "folder") as folder:
            (folder / "x").write_text("half")
            raise KeyError
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
        assert (tmp_path / "a.json").read_text() == "old"

    def test_permissions_are_those_of_a_plain_file(self, tmp_path: Path) -> None:
        (tmp_path / "plain").touch()
        (tmp_path / "plain folder").mkdir()
        (tmp_path / "shared").touch()
        (tmp_path / "shared").chmod(0o664)
        for name in ("new", "shared"):
            write_text(tmp_path / name, "new")
        with writing_folder(tmp_path / "folder"):
            pass
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        assert modes["new"] == modes["plain"] and modes["folder"] == modes["plain folder"]
        assert modes["shared"] == 0o664

    def test_the_file_behind_a_link_is_written_unless_it_is_read_only(self, tmp_path: Path) -> None:
        for name, mode in (("store", 0o644), ("annex", 0o444)):
            (tmp_path / name).write_text("old")
            (tmp_path / name).chmod(mode)
            (tmp_path / f"to {name}").symlink_to(name)
            write_text(tmp_path / f"to {name}", "new")
            assert (tmp_path / f"to {name}").read_text() == "new"
        assert (tmp_path / "to store").is_symlink() and (tmp_path / "store").read_text() == "new"
        assert not (tmp_path / "to annex").is_symlink() and (tmp_path / "annex").read_text() == "old"
        write_text(Path("/dev/null"), "nothing")
        assert not Path("/dev/null").is_file()

    def test_a_name_in_another_encoding_is_written_as_its_number(self, tmp_path: Path) -> None:
        name = os.fsdecode(b"caf\xe9")
        write_text(tmp_path / name, name)
        write_json(tmp_path / "a.json", [name])
        assert (tmp_path / name).read_bytes() == b"caf\\udce9"
        assert json.loads((tmp_path / "a.json").read_text()) == [name]

    def test_a_folder_in_the_output_that_may_not_be_written(self, tmp_path: Path) -> None:
        def fail(path: Path) -> None:
            with writing_to(tmp_path / "out", tmp_path / "out" / ".lock"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))

        with pytest.raises(InputError, match=r"out: cannot be written .*train.*; correct its permissions"):
            fail(tmp_path / "out" / "train")
        # An input that cannot be read is another error.
        with pytest.raises(PermissionError):
            fail(tmp_path / "in")
        assert list((tmp_path / "out").iterdir()) == []
