"""Events become the published segments: 20 HCP states, 26 MDTB tasks, and anything in an events.tsv."""

import pytest

from brainflow.prepare.events import (
    HCP_STATES,
    Event,
    EventSettings,
    merge_blocks,
    read_events,
    segments_of,
)

# Set A and set B of the multi-domain task battery (King et al. 2019): 17 tasks each, 8 of them in both.
MDTB_A = [
    "GoNoGo",
    "ToM",
    "actionObservation",
    "affective",
    "arithmetic",
    "checkerBoard",
    "emotional",
    "intervalTiming",
    "motorImagery",
    "motorSequence",
    "nBack",
    "nBackPic",
    "rest",
    "spatialNavigation",
    "stroop",
    "verbGeneration",
    "visualSearch",
]
MDTB_B = [
    "CPRO",
    "ToM2",
    "actionObservation2",
    "emotionProcess",
    "landscapeMovie",
    "natureMovie",
    "mentalRotation",
    "motorSequence2",
    "nBackPic2",
    "prediction",
    "rest2",
    "respAlt",
    "romanceMovie",
    "spatialMap",
    "spatialNavigation2",
    "verbGeneration2",
    "visualSearch2",
]
# Files of the HCP's EV folders that are states of a task, and some that are not.
EV_FILES = {
    "EMOTION": ["fear", "neut"],
    "GAMBLING": ["win", "loss", "win_event", "loss_event", "neut_event"],
    "LANGUAGE": ["story", "math"],
    "MOTOR": ["cue", "lf", "rf", "lh", "rh", "t"],
    "RELATIONAL": ["relation", "match"],
    "SOCIAL": ["mental", "rnd", "mental_resp", "other_resp"],
    "WM": [f"{n}bk_{x}" for n in (0, 2) for x in ("body", "faces", "places", "tools", "cor", "err", "nlr")],
}


def ev_folder(folder, task):
    """EV files as the HCP gives them, one block after another; returns the paths."""
    paths = []
    for i, name in enumerate(EV_FILES[task]):
        path = folder / f"sub-100307_task-{task}_run-1_EV_{name}.txt"
        path.write_text(f"{8.0 + 40 * i:.3f}\t18.0\t1.0\n{8.0 + 40 * i + 20:.3f}\t12.0\t1.0\n")
        paths.append(path)
    return paths


def test_the_twenty_states_of_the_hcp(tmp_path):
    settings = EventSettings(preset="hcp")
    found = {}
    for task in EV_FILES:
        for segment in segments_of(ev_folder(tmp_path, task), settings, task=task, t_r=0.72, volumes=800):
            found.setdefault(segment.labels["label_across_tasks"], set()).add(segment.labels["mental_state"])
    for segment in segments_of([], settings, task="REST1", t_r=0.72, volumes=1200):
        found.setdefault(segment.labels["label_across_tasks"], set()).add(segment.labels["mental_state"])
    assert sorted(found) == list(range(20))
    names = [name for states in HCP_STATES.values() for name in states]
    assert [found[i] for i in range(20)] == [{name} for name in names]


def test_hcp_segments_are_shifted_by_four_volumes(tmp_path):
    segments = segments_of(
        ev_folder(tmp_path, "EMOTION"), EventSettings(preset="hcp"), task="EMOTION", t_r=0.72, volumes=176
    )
    # published rule: volumes with onset + 4 TR <= i TR < onset + duration + 4 TR
    expected = [
        [i for i in range(176) if o + 4 * 0.72 <= i * 0.72 < o + d + 4 * 0.72]
        for o, d in ((8, 18), (28, 12), (48, 18), (68, 12))
    ]
    assert [list(range(s.onset, s.onset + s.length)) for s in segments] == expected
    assert dict(segments[0].labels) == {"mental_state": "fear", "label_in_task": 0, "label_across_tasks": 0}


def test_hcp_events_from_the_table_of_the_published_preparation(tmp_path):
    path = tmp_path / "sub-100307_task-MOTOR_run-1_EV.csv"
    path.write_text(
        "subject,task,run,event_type,onset,duration,end\n100307,MOTOR,LR,lf,71.35,12,83.35\n"
        "100307,MOTOR,LR,cue,83.5,3,86.5\n100307,MOTOR,LR,t,86.5,12,98.5\n"
    )
    segments = segments_of([path], EventSettings(preset="hcp"), task="MOTOR", t_r=0.72, volumes=284)
    assert [segment.labels["mental_state"] for segment in segments] == ["lf", "t"]
    assert [segment.labels["label_across_tasks"] for segment in segments] == [6, 10]


def mdtb_events(path, tasks):
    """Trials of 5 s after an instruction of 5 s, 30 s a task, as in ds002105."""
    lines, onset = ["onset\tduration\ttaskName\ttrial_type"], 0
    for task in tasks:
        lines.append(f"{onset}\t5\tinstruct\tn/a")
        lines += [f"{onset + 5 + 5 * i}\t4\t{task}\t{i}" for i in range(6)]
        onset += 35
    path.write_text("\n".join(lines) + "\n")
    return onset


def test_the_twenty_six_tasks_of_the_mdtb(tmp_path):
    numbers, path = {}, tmp_path / "events.tsv"
    for tasks in (MDTB_A, MDTB_B):
        end = mdtb_events(path, tasks)
        segments = segments_of([path], EventSettings(preset="mdtb"), task="a", t_r=1.0, volumes=end + 3)
        assert len(segments) == 17  # also the last block, and those whose name ends in 2
        assert [(segment.onset, segment.length) for segment in segments[:2]] == [(8, 30), (43, 30)]
        assert segments[-1].length == 29  # until the end of its last trial
        numbers |= {segment.labels["mental_state"]: segment.labels["task_label"] for segment in segments}
    assert not any(label.endswith("2") or "instruct" in label for label in numbers)
    # the published task_label_mapping.json numbers the sorted names
    assert numbers == {name: number for number, name in enumerate(sorted(numbers))}
    assert len(numbers) == 26
    mdtb_events(path, ["juggling"])
    with pytest.raises(ValueError, match="juggling are none of the MDTB's 26 tasks"):
        segments_of([path], EventSettings(preset="mdtb"), task="a", t_r=1.0, volumes=50)


def test_any_column_shift_and_merging(tmp_path):
    path = tmp_path / "events.tsv"
    path.write_text(
        "onset\tduration\ttrial_type\tstimulus\n0\t2\tface\ta\n2\t2\tface\tb\n10\tn/a\thouse\tc\n"
        "30\t4\tn/a\td\n90\t4\tface\te\n"
    )
    assert [event.label for event in read_events(path, "stimulus")] == list("abcde")
    rows = [
        (segment.onset, segment.length, segment.labels["mental_state"])
        for segment in segments_of([path], EventSettings(shift=4.0), task="x", t_r=2.0, volumes=40)
    ]
    assert rows == [(2, 1, "face"), (3, 1, "face"), (7, 1, "house")]  # the last one lies behind the run
    merged = segments_of([path], EventSettings(shift=4.0, merge=True), task="x", t_r=2.0, volumes=60)
    assert [(s.onset, s.length) for s in merged] == [(2, 5), (7, 40), (47, 2)]
    dropped = segments_of([path], EventSettings(shift=4.0), task="x", t_r=2.0, volumes=40, dropped=3)
    assert [(s.onset, s.length) for s in dropped] == [(0, 1), (4, 1)]
    with pytest.raises(ValueError, match="has no column mood"):
        segments_of([path], EventSettings(column="mood"), task="x", t_r=2.0, volumes=40)


def test_default_shift_is_three_seconds():
    assert EventSettings().seconds == 3.0
    assert EventSettings(preset="mdtb").seconds == 3.0
    assert EventSettings(preset="hcp").seconds == pytest.approx(2.88)
    assert EventSettings(preset="hcp", shift=0.0).seconds == 0.0


def test_merging_keeps_order_and_ends():
    events = [Event(onset=o, duration=1, label=x) for o, x in ((0, "a"), (1, "a"), (5, "b"), (7, "a"))]
    assert [(e.onset, e.duration, e.label) for e in merge_blocks(events)] == [
        (0, 5, "a"),
        (5, 2, "b"),
        (7, 1, "a"),
    ]
    assert merge_blocks([]) == []


def test_a_broken_ev_file_is_named(tmp_path):
    path = tmp_path / "sub-1_task-EMOTION_EV_fear.txt"
    path.write_text("1.0 2.0\n")
    with pytest.raises(ValueError, match="line 1"):
        segments_of([path], EventSettings(preset="hcp"), task="EMOTION", t_r=0.72, volumes=100)
