"""The demo's second act with few simulated people and short runs; its process imports this file."""

from functools import partial
from unittest import mock

from brainflow.demo import cohort, pipeline
from brainflow.simulate import Cohort

whole_act = pipeline.run_order


def run_order(config):
    """Stands in for `pipeline.run_order`: 6 people with labels train and 6 test, not 20 each."""
    with (
        mock.patch.multiple(cohort, LABELLED=6, TESTED=6),
        mock.patch.object(pipeline, "Cohort", partial(Cohort, time_points=100)),
    ):
        return whole_act(config)
