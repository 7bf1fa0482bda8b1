"""Steps that hang, fail or die in processes of their own, and what is known of them afterwards."""

import faulthandler
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

from benchmarks import isolated  # noqa: E402
from benchmarks.isolated import Step, Task, WrongError  # noqa: E402


def hang(known):
    time.sleep(60)


def hang_stubbornly(known):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def die(known):
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


def fail(known):
    raise RuntimeError("an illegal address\nand more")


def wrong(known):
    raise WrongError("off by 3", {"error": 3})


def leave(known):
    print("out of luck")
    sys.stdout.flush()
    os._exit(3)


def process(known):
    return {"pid": os.getpid(), "known": dict(known)}


def outcomes(*steps, **options):
    task = Task("t", [Step(f"{i} {run.__name__}", run) for i, run in enumerate(steps)])
    return isolated.run([task], **options)


def test_every_kind_of_end_is_recorded_and_the_rest_is_done():
    began = time.monotonic()
    found = outcomes(process, fail, process, wrong, process, die, leave, hang, process, limit=1.5)
    assert time.monotonic() - began < 10
    assert [o.status for o in found] == ["OK", "ERROR", "OK", "WRONG", "OK", "ERROR", "ERROR", "HANG", "OK"]
    first, error, second, bad, third, died, left, hung, last = found
    assert (
        error.message == "RuntimeError: an illegal address" and bad.message == "off by 3" and bad.value == {"error": 3}
    )
    assert died.message.startswith("killed by SIGSEGV") and left.message == "exit status 3: out of luck"
    assert hung.message.startswith("no result after")
    # A wrong result leaves the process as it is; after an error it may not be used again.
    assert first.value["pid"] != second.value["pid"] == third.value["pid"] != last.value["pid"] != os.getpid()
    assert list(last.value["known"]) == ["0 process", "2 process", "4 process"]
    assert last.value["known"]["0 process"] == first.value


def test_who_ignores_a_request_to_end_is_ended(monkeypatch):
    monkeypatch.setattr(isolated, "GRACE", 0.2)
    began = time.monotonic()
    assert [o.status for o in outcomes(hang_stubbornly, process, limit=1)] == ["HANG", "OK"]
    assert time.monotonic() - began < 5


def test_a_task_that_hangs_again_and_again_is_left():
    found = outcomes(hang, process, hang, process, limit=1, most_hangs=2)
    assert [o.status for o in found] == ["HANG", "OK", "HANG", "SKIPPED"] and found[3].message == "after other hangs"


def test_nothing_is_begun_after_the_deadline():
    began = time.monotonic()
    found = outcomes(process, hang, process, deadline=time.monotonic() + 0.5)
    assert [(o.status, o.message) for o in found[1:]] == [("SKIPPED", "no time left")] * 2
    assert found[0].status == "OK" and time.monotonic() - began < 5


def test_tasks_run_side_by_side_and_are_reported_at_once():
    seen = []

    def nap(known):
        time.sleep(0.4)
        return time.monotonic()

    began = time.monotonic()
    tasks = [Task(f"t{i}", [Step("nap", nap)]) for i in range(4)]
    found = isolated.run(tasks, at_once=4, report=lambda o: seen.append((o.task, time.monotonic() - o.value)))
    assert time.monotonic() - began < 1.2 and {o.task for o in found} == {"t0", "t1", "t2", "t3"}
    assert all(late < 0.3 for _, late in seen)


def test_what_children_prepare_is_theirs_alone():
    where = []
    found = outcomes(lambda known: len(where), fail, lambda known: len(where), prepare=lambda: where.append(1))
    assert [o.value for o in found] == [1, None, 1] and where == []


def test_children_do_not_outlive_who_started_them():
    def interrupt(outcome):
        raise KeyboardInterrupt

    before = {p.name for p in Path("/proc").glob("[0-9]*")}
    tasks = [Task("hang", [Step("hang", hang)]), Task("quick", [Step("process", process)])]
    with pytest.raises(KeyboardInterrupt):
        isolated.run(tasks, at_once=2, report=interrupt)
    mine = [p for p in Path("/proc").glob("[0-9]*") if p.name not in before and parent_of(p) == os.getpid()]
    time.sleep(0.2)
    assert all(is_zombie(p) for p in mine)


def parent_of(process):
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def is_zombie(process):
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
