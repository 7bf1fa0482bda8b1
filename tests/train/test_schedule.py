"""The schedule of the learning rate: its shape, the plateau rule, and a decay that begins by command."""

import pytest
from tiny_runs import change, metrics, same, weights

from illada import cli
from illada.train import state as train_state
from illada.train import train
from illada.train.config import OptimizerConfig, ScheduleConfig
from illada.train.requests import decay_is_requested, request_decay
from illada.train.schedule import Schedule, has_plateaued

PEAK = OptimizerConfig(learning_rate=1.0)


def schedule(steps=21, **options):
    return Schedule(steps, PEAK, ScheduleConfig(**{"warmup_steps": 4, "final_learning_rate": 0.1, **options}))


def test_shape():
    cosine = schedule(decay="cosine", decay_start=0.5)
    rates = [cosine.rate(step) for step in range(21)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1) and rates[11:] == sorted(rates[11:], reverse=True)
    assert schedule(decay="linear", decay_start=10.0).rate(15) == pytest.approx(0.55)
    assert schedule(decay="none").rate(20) == 1.0
    assert cosine.end == 21


def test_a_decay_of_its_own_length_ends_the_run():
    short = schedule(decay="linear", decay_start=10.0, decay_steps=5)
    assert short.end == 15 and short.rate(10) == 1.0 and short.rate(14) == pytest.approx(0.1)
    assert schedule(decay="linear", decay_start=18.0, decay_steps=50).end == 21  # never beyond train.steps


@pytest.mark.parametrize(
    "bounds,reached",
    [
        ([], False),
        ([3.0, 2.0], False),  # fewer than m + 1
        ([3.0, 2.0, 2.0], True),
        ([3.0, 2.0, 1.98], False),  # 1% is progress
        ([3.0, 2.0, 1.9801], True),
        ([3.0, 1.0, 2.5, 2.4], True),  # falls, but not below what was reached before
        ([2.0, 3.0, 1.5, 3.0], False),  # one of the last two
    ],
)
def test_plateau(bounds, reached):
    assert has_plateaued(bounds, 2 if len(bounds) == 4 else 1, 0.01) is reached


def test_the_plateau_rule_decides_once():
    plan = schedule(100, decay_trigger="plateau", plateau_validations=1, plateau_improvement=0.01, decay_steps=10)
    assert plan.end == 100 and plan.rate(60) == 1.0
    assert not plan.observe(2, 3.0) and not plan.observe(3, 3.0)  # in the warm-up
    assert plan.observe(20, 3.0)
    assert (plan.decided, plan.end) == (20, 30)
    assert not plan.observe(25, 3.0) and plan.decided == 20
    assert not schedule(decay_trigger="plateau", plateau_validations=1, decay="none").observe(9, 3.0)


def test_the_same_validation_counts_once():
    plan = schedule(100, decay_trigger="plateau", plateau_validations=1)
    assert not plan.observe(20, 3.0) and not plan.observe(20, 3.0)


def test_a_command_begins_the_decay_before_its_step_and_not_after():
    plan = schedule(decay="linear", decay_start=15.0)
    assert plan.begin_decay(10) and plan.rate(10) == 1.0 and plan.rate(15) == pytest.approx(0.55)
    assert not plan.begin_decay(12) and plan.decided == 10
    assert not schedule(decay="linear", decay_start=5.0).begin_decay(6)
    assert not schedule(decay="none").begin_decay(6)
    assert not schedule(decay_trigger="command").begin_decay(21)  # the run is over


def plateau(config, **train_options):
    rule = {"decay_trigger": "plateau", "plateau_validations": 1, "plateau_improvement": 0.99, "decay_steps": 3}
    options = {"steps": 40, "save_every": 2, **train_options}
    return change(config, schedule=rule, validation={"every": 2}, train=options)


def test_a_run_decays_on_its_plateau_and_resumes_with_the_same_rates(config, tmp_path):
    whole = train(plateau(config), progress=False)
    assert whole.finished and whole.step == 7  # validations after steps 2 and 4 decide
    records = metrics(config)
    assert [(r["step"], r["end"], r["reason"]) for r in records if r["kind"] == "decay"] == [(4, 7, "plateau")]
    rates = [r["learning_rate"] for r in records if r["kind"] == "train"]
    assert rates[4] == rates[3] > rates[5] > rates[6] == pytest.approx(config.schedule.final_learning_rate)

    for stop_after in (3, 7, 9, 11):  # micro-batches: before, at and after the decision
        parts = plateau(config, out_dir=str(tmp_path / f"stopped-{stop_after}"))
        asked = []
        first = train(parts, should_stop=lambda a=asked, n=stop_after: a.append(1) or len(a) == n, progress=False)
        assert not first.finished
        second = train(parts, progress=False)
        assert second.step == 7 and same(weights(whole.checkpoint), weights(second.checkpoint))
        assert [r["step"] for r in metrics(parts) if r["kind"] == "decay"] == [4]


def test_a_validation_that_no_checkpoint_has_is_made_again(config, tmp_path, monkeypatch):
    """Stopped within the validation that decides, then before the next checkpoint: the decision is not lost."""
    whole = train(plateau(config), progress=False)
    parts = plateau(config, out_dir=str(tmp_path / "parts"))
    steps = [r["step"] for r in metrics(config) if r["kind"] == "decay"]

    def stopped_after(count):
        asked = []
        return train(parts, should_stop=lambda: asked.append(1) or len(asked) == count, progress=False)

    per_validation = 4  # micro-batches: 2 strata of 4 windows
    first = stopped_after(4 * 2 + per_validation + 1)  # within the second validation, after step 4
    assert first.step == 4 and train_state.read_state(first.checkpoint)["validation_bounds"][-1][0] == 2
    second = stopped_after(per_validation + 1)  # validates again and stops in the next micro-batch
    assert second.step == 4
    last = train(parts, progress=False)
    assert last.step == whole.step and same(weights(whole.checkpoint), weights(last.checkpoint))
    assert [r["step"] for r in metrics(parts) if r["kind"] == "decay"] == steps == [4]
    assert [r["step"] for r in metrics(parts) if r["kind"] == "validation"] == [
        r["step"] for r in metrics(config) if r["kind"] == "validation"
    ]


def by_command(config, **train_options):
    return change(
        config,
        schedule={"decay_trigger": "command", "decay_steps": 4},
        train={"steps": 50, "save_every": 100, **train_options},
    )


def test_decay_now(config, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="is not a run"):
        request_decay(run)
    options = by_command(config)

    def validated(step, model):
        if step == 6:
            assert cli.main(["train", "--decay-now", str(run)]) == 0

    result = train(options, on_validation=validated, progress=False)
    assert result.step == 10 and not decay_is_requested(run)
    assert [(r["step"], r["end"], r["reason"]) for r in metrics(options) if r["kind"] == "decay"] == [
        (6, 10, "command")
    ]
    state = train_state.read_state(run / "checkpoints" / "step-000006")  # saved at once, with the decision
    assert state["decay_step"] == 6
    assert "decays from here on: by command" in capsys.readouterr().out

    again = by_command(config, out_dir=str(tmp_path / "again"))
    asked = []
    stopped = train(again, should_stop=lambda: asked.append(1) or len(asked) == 9, progress=False)
    request_decay(tmp_path / "again")  # of a run that is not running
    resumed = train(again, progress=False)
    assert resumed.step == stopped.step + 1 + 4 and not decay_is_requested(tmp_path / "again")


def test_a_kill_before_the_decision_is_saved_keeps_the_request(config, tmp_path, monkeypatch):
    options = by_command(config, save_every=2)
    train(options, should_stop=lambda asked=[]: asked.append(1) or len(asked) == 9, progress=False)
    request_decay(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train_state, "save", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(options, progress=False)
    assert decay_is_requested(tmp_path / "run")
    assert train(options, progress=False).finished
    assert not decay_is_requested(tmp_path / "run")


def test_a_request_during_the_warm_up_waits_for_its_end(config, tmp_path):
    options = change(by_command(config), schedule={"warmup_steps": 5})

    def validated(step, model):
        if step == 3:
            request_decay(tmp_path / "run")

    result = train(options, on_validation=validated, progress=False)
    assert result.step == 5 + 4
    assert [r["step"] for r in metrics(options) if r["kind"] == "decay"] == [5]


def test_requests_that_change_nothing(config, tmp_path, capsys):
    """The log says why; a request of an earlier run in the same folder is dropped."""
    run = tmp_path / "run"
    options = change(config, schedule={"decay_start": 1.0, "decay": "none"}, train={"steps": 4})
    train(options, progress=False)
    assert cli.main(["train", "--decay-now", str(run)]) == 2
    assert "has no decay (schedule.decay is none)" in capsys.readouterr().err

    late = change(config, schedule={"warmup_steps": 0, "decay_start": 2.0}, train={"out_dir": str(tmp_path / "late")})
    train(late, on_validation=lambda step, model: step == 3 and request_decay(tmp_path / "late"), progress=False)
    assert "asked to decay, which changes nothing: the decay has begun" in capsys.readouterr().out

    again = by_command(config, out_dir=str(tmp_path / "late"), steps=6)
    request_decay(tmp_path / "late")
    for path in (tmp_path / "late" / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    assert train(again, progress=False).step == 6
    assert not [r for r in metrics(again) if r["kind"] == "decay"]


def test_decay_now_stands_alone(tmp_path, capsys):
    for extra in (["demo"], ["--train.steps=3"], ["--print-config"], ["--dry-run"]):
        assert cli.main(["train", "--decay-now", str(tmp_path), *extra]) == 2
        assert "stands alone" in capsys.readouterr().err
    assert cli.main(["train", "--decay-now", str(tmp_path / "none")]) == 2
    assert "is not a run" in capsys.readouterr().err
