"""What a user should know before a model is compressed, in one warning each: what is out of reach, what got no data."""

from __future__ import annotations

import logging

from hwpq_pipeline.checkpoints.block_weights import block_weights, out_of_reach, told_left_dense
from hwpq_pipeline.method.groups import Groups

#: Layers named in a warning.
NAMED = 12

logger = logging.getLogger(__name__)


def warn_of_dense_weights(groups: Groups) -> None:
    """Say which weights of the decoder blocks cannot be compressed, and why."""
    dense, layers = groups.checkpoint, groups.layers
    if left := out_of_reach(dense, layers):
        lines = told_left_dense(left, block_weights(dense, layers), layers)
        logger.warning("Left dense: %s", "; ".join(lines))


def warn_of_silent_layers(groups: Groups) -> None:
    """Check the sums, and say which layers no calibration token reached, and which ones (experts) few did.

    Raises:
        HwpqError: damaged sums, which are named by their group, or none of any token.
    """
    if silent := groups.silent():
        more = f" and {len(silent) - NAMED} more" if len(silent) > NAMED else ""
        logger.warning(
            "No calibration token reached %d layers. Their weights are chosen by magnitude and rounded to "
            "nearest. They are: %s%s",
            len(silent),
            ", ".join(silent[:NAMED]),
            more,
        )
    if few := groups.seldom():
        shown = ", ".join(f"{name} ({tokens})" for name, tokens in list(few.items())[:NAMED])
        logger.warning(
            "Fewer calibration tokens than inputs reached %d groups of layers. They keep their mask and are rounded to "
            "nearest. They are, with their tokens: %s%s",
            len(few),
            shown,
            f" and {len(few) - NAMED} more" if len(few) > NAMED else "",
        )
