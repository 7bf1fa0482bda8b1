"""Readers of files run on damaged ones in a process of its own, whose crash, hang and memory count as well.

`Child` is this process's side. The other side imports everything once and forks a server of readers, and another where
that one dies.
"""

import faulthandler
import linecache
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

SECONDS = 10  # of CPU time, that a reader may take
STARVED = 60  # seconds after which one that waits, or has no CPU, hangs as well
ALLOWANCE = 64 << 20  # bytes of memory beside TIMES those of the files
TIMES = 10
LONGEST = 2000  # characters of an error


class Child:
    """Runs readers."""

    def __init__(self):
        self._valid = None
        self._log = tempfile.TemporaryFile("w+")
        self._connection, theirs = Pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MALLOC_ARENA_MAX": "1",
            "RUST_BACKTRACE": "0",  # a panic's takes minutes
        }
        command = [sys.executable, __file__, str(theirs.fileno())]
        fds = [theirs.fileno()]
        self._process = subprocess.Popen(command, pass_fds=fds, env=environment, stderr=self._log)
        theirs.close()
        self._pid = self._connection.recv()

    def close(self):
        self._connection.close()
        self._process.wait(60)

    def load(self, reader, files):
        """Run a reader on valid files without limits: what it loads at the first time costs the next runs nothing."""
        self._valid = reader, files
        answer = self.check(reader, files, limited=False)
        assert answer is None, answer

    def check(self, reader, files, limited=True):
        """Run a reader on a folder of files, {name: bytes}. None: a success or a clear error; else (kind, text)."""
        self._log.seek(0)
        self._log.truncate()
        self._connection.send((reader, files, limited))
        hangs, began, before = False, time.monotonic(), cpu_time(self._pid)
        while limited and not hangs and not self._connection.poll(1):
            if cpu_time(self._pid) - before > SECONDS or time.monotonic() - began > STARVED:
                hangs = True
                os.kill(self._pid, signal.SIGABRT)  # faulthandler says where it is
        answer = self._connection.recv()
        if isinstance(answer, int):  # the exit status of a server that died
            self._pid = self._connection.recv()
            self._log.seek(0)
            said = self._log.read().strip()
            self.load(*self._valid)
            return f"{'hangs' if hangs else f'ends the process: status {answer}'} {place_in(said)}", said[-3000:]
        return answer


def cpu_time(pid):
    """Return the CPU seconds of a process, 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def place_in(log):
    """The innermost place of the product in faulthandler's stack."""
    return next((line.strip() for line in log.splitlines() if "/illada/" in line), "")


# ------------------------------------------------------------------------------------------------- in the other process


def serve(connection):
    """Answer requests until there are no more: None for a success or a clear error, else (kind, text)."""
    import readers

    warnings.simplefilter("ignore")
    sys.stdout = open(os.devnull, "w")
    while True:
        try:
            name, files, limited = connection.recv()
        except EOFError:
            return
        with tempfile.TemporaryDirectory() as folder:
            for file, data in files.items():
                path = Path(folder, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            connection.send(run(getattr(readers, name), Path(folder), sum(map(len, files.values())), limited))


def run(reader, folder, size, limited):
    """Return what is wrong with how the reader ends."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if limited:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWANCE + TIMES * size, hard))
    try:
        reader(folder)
        return None
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        if not limited or (wrong := unclear(error)):
            frames = traceback.extract_tb(error.__traceback__)
            last = [frame for frame in frames if "/illada/" in frame.filename] or frames
            place = f"{last[-1].filename}, line {last[-1].lineno}"
            kind = f"{wrong if limited else 'refuses a valid file'}: {type(error).__name__} in {place}"
            return kind, "".join(traceback.format_tb(error.__traceback__)[-8:]) + f"{error!s:.500}"
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def unclear(error):
    """Return why a user does not understand an error, or None."""
    chain, at = [], error
    while at is not None:
        chain.append(at)
        at = at.__cause__ or at.__context__
    if any(isinstance(one, MemoryError) for one in chain):
        return "takes too much memory"
    if not isinstance(error, (ValueError, OSError, NotImplementedError)):
        return "raises another kind of error"
    said = str(error)
    if not said or len(said) > LONGEST:
        return f"says nothing, or {len(said)} characters"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = "/illada/" in frame.filename or frame.filename.endswith("/read_jsonl.py")
    if not isinstance(error, OSError) and not (
        ours and linecache.getline(frame.filename, frame.lineno).lstrip().startswith("raise")
    ):
        return "passes on an error of a library"
    return None


def main():
    connection = Connection(int(sys.argv[1]))
    faulthandler.enable()
    import readers

    readers.load()
    while True:
        if (pid := os.fork()) == 0:
            connection.send(os.getpid())
            serve(connection)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status == 0:
            return
        connection.send(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
