"""Files and folders that appear complete or not at all: links, devices, pipes, locks, modes, and what kills leave."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from illada import cli, files
from illada.checkpoints import weights
from illada.evaluation.journal import Journal


def fill(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a").write_text(text)


def stage(target, text):
    with files.staged_directory(target) as folder:
        fill(folder, text)


def test_devices_and_pipes_stay(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    files.write_text(pipe, "text\n")
    reader.join(10)
    assert received == ["text\n"] and stat.S_ISFIFO(pipe.stat().st_mode)
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    files.write_text(link, "text\n")
    assert link.is_symlink() and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["null", "pipe"]


def test_links_are_followed_and_modes_stay(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to("real")
    files.write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new" and stat.S_IMODE(real.stat().st_mode) == 0o640
    fill(tmp_path / "folder", "old")
    (tmp_path / "to folder").symlink_to("folder")
    stage(tmp_path / "to folder", "new")
    assert (tmp_path / "to folder").is_symlink() and (tmp_path / "folder" / "a").read_text() == "new"
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / ".out.tmp").symlink_to("secret")  # a planted name of the temporary file
    files.write_text(tmp_path / "out", "text")
    assert secret.read_text() == "secret" and (tmp_path / "out").read_text() == "text"


def test_targets_that_no_folder_can_replace(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        stage(tmp_path / "file", "new")
    monkeypatch.chdir(tmp_path)
    for target in (".", "..", tmp_path):
        with pytest.raises(ValueError, match="is the current folder or above it"):
            stage(target, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_between_the_renames_keeps_the_old_folder(tmp_path, monkeypatch, error, failing):
    fill(tmp_path / "x", "old")
    calls, rename = [], os.rename

    def fails(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise error("no")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", fails)
    with pytest.raises(error):
        stage(tmp_path / "x", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x" / "a").read_text() == "old"


def test_leftovers_of_kills_go_with_the_next_run(tmp_path):
    fill(tmp_path / ".x.old.abcdefgh" / "x", "old")
    fill(tmp_path / ".x.new.abcdefgh", "part")
    fill(tmp_path / ".x.new.y.new.abcdefgh", "another target's")
    (tmp_path / ".x.lock").write_text("pid 1 on elsewhere")
    files.recover(tmp_path / "x")
    assert (tmp_path / "x" / "a").read_text() == "old"  # there was no new one
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.new.y.new.abcdefgh", "x"]
    fill(tmp_path / ".x.old.abcdefgh" / "x", "older")
    stage(tmp_path / "x", "new")
    assert (tmp_path / "x" / "a").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.new.y.new.abcdefgh", "x"]


def test_one_process_at_a_time(tmp_path):
    with files.locked(tmp_path / "lock", "the run is in use"):
        held = f"the run is in use by another process \\(pid {os.getpid()} on .+\\)"
        with pytest.raises(BlockingIOError, match=held), files.locked(tmp_path / "lock", "the run is in use"):
            pass
    assert not list(tmp_path.iterdir())
    with files.staged_directory(tmp_path / "x"), pytest.raises(BlockingIOError, match="x is being written by another"):
        stage(tmp_path / "x", "other")
    journal = Journal(tmp_path / "journal")
    with pytest.raises(BlockingIOError, match="journal is being written by another process"):
        Journal(tmp_path / "journal")
    Journal(tmp_path / "journal", rank=1)
    del journal
    Journal(tmp_path / "journal")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("mask,mode", [(0o022, 0o644), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with files.staged_directory(tmp_path / "x") as folder:
            fill(folder / "sub", "text")
            (folder / "sub" / "a").chmod(0o600)  # as safetensors leaves weights
    finally:
        os.umask(before)
    found = [stat.S_IMODE((tmp_path / "x" / name).stat().st_mode) for name in ("sub/a", "sub", "")]
    assert found == [mode, 0o777 & ~mask, 0o777 & ~mask]


def test_tokenizer_files_that_leave_their_folder(tmp_path):
    fill(tmp_path / "stranger", "x")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "stranger" / "vocab.txt").symlink_to("../secret")
    with pytest.raises(ValueError, match="vocab.txt is a link out of its folder"):
        weights._copy_tokenizer(tmp_path / "stranger", tmp_path)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    fill(tmp_path / "models--a--b" / "blobs", "vocabulary")
    (snapshot / "vocab.txt").symlink_to("../../blobs/a")
    fill(tmp_path / "copy", "x")
    weights._copy_tokenizer(snapshot, tmp_path / "copy")
    assert (tmp_path / "copy" / "vocab.txt").read_text() == "vocabulary"


def test_outputs_that_are_devices_have_no_journal(tmp_path, capsys):
    arguments = ["eval", str(tmp_path), "--tasks", "cloze", "--output", "/dev/null", "--log-samples"]
    assert cli.main(arguments) == 2
    assert "need a file as --output, /dev/null is a device or a pipe" in capsys.readouterr().err
    assert not os.path.lexists("/dev/null.journal")


@pytest.mark.parametrize("closed", ["0<&-", "2>&-", "1>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams(tmp_path, closed):
    command = f"exec {sys.executable} -m illada convert nothing here {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error" not in done.stdout


def test_a_closed_reader_is_no_error(monkeypatch, capsys):
    def gone(options):
        raise BrokenPipeError

    monkeypatch.setattr("illada.cli.info._run", gone)
    assert cli.main(["info"]) == 141 and capsys.readouterr().err == ""
