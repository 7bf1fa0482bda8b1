"""A `TaskManager` of lm-evaluation-harness that keeps the tasks that it has loaded and checks them."""

from __future__ import annotations

from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from illada.evaluation.asked import asked_of
from illada.evaluation.settings import EvaluationSettings


class RememberingTaskManager(TaskManager):
    """A `TaskManager` that keeps the tasks it has loaded, which the harness's results do not hold.

    Attributes:
        loaded: the tasks by name.
        settings: of the model that the next ones are for. What they ask of a generation is checked when they are
            loaded: the harness runs generation last, when all scores are computed.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loaded: dict[str, Task] = {}
        self.settings: EvaluationSettings | None = None

    def load(self, task_list: Any) -> Any:
        """Load tasks as `TaskManager` does.

        ValueError, which names a task: its generation_kwargs cannot be followed.
        """
        try:
            found = super().load(task_list)
        except (TypeError, ValueError) as error:  # the harness converts some values itself, and names no task
            names = ", ".join(map(str, [task_list] if isinstance(task_list, str) else task_list))
            raise ValueError(f"lm_eval cannot load task {names}: {error!s:.500}") from error
        self.loaded.update(found["tasks"])
        for name, task in found["tasks"].items():
            if self.settings is not None and task.get_config("output_type") == "generate_until":
                try:
                    asked_of(task.get_config("generation_kwargs") or {}, self.settings)
                except ValueError as error:
                    raise ValueError(f"task {name}: {error!s:.500}") from None
        return found
