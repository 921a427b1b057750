"""Tables of `brainflow adapt` in a terminal of 80 columns."""

import io
from types import SimpleNamespace

from rich.console import Console

from brainflow.cli.score_tables import scores_table
from brainflow.decoding.baselines import BASELINES
from brainflow.decoding.scores import Interval


def test_no_name_of_a_decoder_is_cut_in_80_columns():
    value = Interval(value=0.123, low=0.012, high=0.234)
    scores = SimpleNamespace(accuracy=value, permutation_p=0.001, balanced_accuracy=value, macro_f1=value)
    results = [
        SimpleNamespace(name=name, scores=scores, calibration=SimpleNamespace(error=0.1))
        for name in BASELINES
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(scores_table(results, title="condition"))
    first = {line.split("│")[0].strip() for line in out.getvalue().splitlines()}
    assert set(BASELINES) <= first
    assert "…" not in out.getvalue()
