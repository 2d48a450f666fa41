"""Optimizers and schedules by name, and parameter groups that know the zoo's models."""

from zoo.optim.optimizers import ScheduleError, create_optimizer, create_scheduler, param_groups, schedule_problems

__all__ = ["ScheduleError", "create_optimizer", "create_scheduler", "param_groups", "schedule_problems"]
