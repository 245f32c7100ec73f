"""Groups: the right layers, rows and errors, one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hwpq_pipeline.calibration.store import Statistics
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.execution.groups import Groups
from hwpq_pipeline.execution.tables import layer_table
