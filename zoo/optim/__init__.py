"""Optimizers and schedules by name, and parameter groups for the zoo's models."""

from zoo.optim.groups import param_groups
from zoo.optim.optimizers import create_optimizer
from zoo.optim.schedules import ScheduleError, create_scheduler, schedule_problems

__all__ = ["ScheduleError", "create_optimizer", "create_scheduler", "param_groups", "schedule_problems"]
