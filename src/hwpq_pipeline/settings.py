"""Kedro project settings: https://docs.kedro.org/en/stable/configure/configuration_basics/"""

from hwpq_pipeline.executing import ExecutionHooks
from hwpq_pipeline.failures import FailureHooks
from hwpq_pipeline.locking import LockHooks
from hwpq_pipeline.project import CONFIG_PATTERNS, ProjectHooks, ProjectLoader

HOOKS = (ProjectHooks(), LockHooks(), ExecutionHooks(), FailureHooks())
CONFIG_LOADER_CLASS = ProjectLoader
CONFIG_LOADER_ARGS = {"base_env": "base", "default_run_env": "local", "config_patterns": CONFIG_PATTERNS}
