"""Make the model that ships with the package, `story-small`: `python -m brainflow.demo.shipped`.

It is pretrained as `brainflow pretrain` would do by itself, on people 1–16 of the story; then people 17–24,
who are in no training, say once what it is worth. On one machine the same command gives the same weights; on
another one, with other instructions or another torch, sums differ in their last digits and weights by more.
The salt of the hashed names is drawn anew each time.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

from brainflow.demo import story, worth
from brainflow.pretrained.card import MARKER
from brainflow.pretrained.format import CARD, CONFIG, SHIPPED, WEIGHTS
from brainflow.sharing import prepare_upload
from brainflow.storage import BoldStore
from brainflow.storage.files import write_text

NAME = "story-small"
LABELLED, DRAWS = 4, 10
"""People who are labelled where it is measured what the model is worth, and how often these are drawn."""
TABLE = "## What data must look like\n"
ABOUT = """\
For examples, tests and first steps: pretrained on people 1–16 of the story (Simony et al. 2016, Nature
Communications 7:12141), one recording of seven and a half minutes each; two of the people said when to stop.
100 spatial factors without names. People 17–24 were in no training. The data ship with the package under the
MIT licence, © 2016 Contextual Dynamics Laboratory. `python -m brainflow.demo.shipped` makes this folder.

"""
WORTH = """
## Worth

Which of 13 segments of the story is a window of 30 s? {labelled} labelled people of 1–16, {draws} draws of
them; people 17–24 test; chance is {chance:.3f}.

- `brainflow adapt` with this model: accuracy {model:.3f}
- the same from random weights: {scratch:.3f}
- the difference: {gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f} over people and draws
- the best decoder without a model, {best}, which was the best of {others} in this very test: {without:.3f};
  this model minus it: {lead:+.3f}, {lead_low:+.3f} to {lead_high:+.3f}
"""


def make(folder: Path) -> Path:
    """Pretrain the model, write it with its card, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="brainflow-") as temporary:
        store = story.write_store(story.read(), story.PEOPLE, Path(temporary) / "store")
        run = worth.pretrained_on(store, story.split(store, story.TEST), Path(temporary) / NAME)
        upload = prepare_upload(run, license="apache-2.0", name=NAME)
        shutil.copyfile(run / WEIGHTS, folder / WEIGHTS)
        write_text(folder / CONFIG, upload.texts[CONFIG])
        # without the marker it is nobody's to write anew
        card = upload.texts[CARD].replace(f"{MARKER}\n\n", "").replace("load(folder)", f'load("{NAME}")')
        write_text(folder / CARD, card.replace(TABLE, ABOUT + TABLE, 1) + measured(store, run))
    return folder


def measured(store: BoldStore, run: Path) -> str:
    """Return what the model is worth where labels are few, for its card."""
    task = story.task(store, story.TEST)
    (point,) = worth.curve(task, [run], [LABELLED], draws=DRAWS, without=None)
    model, scratch, *others = point.results
    best, gains = worth.opponents(point)["best"], worth.gains(point)
    gain, lead = gains["scratch"], gains["best"]
    return WORTH.format(
        labelled=LABELLED, draws=DRAWS, chance=model.scores.chance, model=model.scores.accuracy.value,
        scratch=scratch.scores.accuracy.value, gain=gain.value, low=gain.low, high=gain.high, best=best.name,
        others=len(others), without=best.scores.accuracy.value, lead=lead.value, lead_low=lead.low,
        lead_high=lead.high,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(make(Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED / NAME))  # noqa: T201 - where it was written
