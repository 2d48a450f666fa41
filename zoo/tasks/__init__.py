"""Tasks: LightningModules with the losses, metrics and optimisation of a plain `nn.Module`.

See `zoo.tasks.base.Task`.
"""

from zoo.optim import ScheduleError, create_optimizer, create_scheduler, param_groups, schedule_problems
from zoo.tasks.base import NonFiniteLossError, OptionError, Task, load_task
from zoo.tasks.classification import ClassificationTask
from zoo.tasks.continual import ContinualTask
from zoo.tasks.forecasting import ForecastingTask
from zoo.tasks.tabular import TabularTask

__all__ = [
    "ClassificationTask",
    "ContinualTask",
    "ForecastingTask",
    "NonFiniteLossError",
    "OptionError",
    "ScheduleError",
    "TabularTask",
    "Task",
    "create_optimizer",
    "create_scheduler",
    "load_task",
    "param_groups",
    "schedule_problems",
]
