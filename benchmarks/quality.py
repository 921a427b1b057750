"""What a forecast as good as that of the recipe of 2022 costs: same size, same data, as many steps."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from brainflow.config import PretrainConfig, TrainConfig
from brainflow.demo import story, worth
from brainflow.frameworks import model_config
from brainflow.recipes import preset
from brainflow.training.loop import pretrain
from brainflow.training.metrics import read_metrics

from .plan import Plan, Row

CHECKS = 40
"""Validations of a run."""


def quality_part(plan: Plan, folder: Path, framework: str) -> list[Row]:
    """Pretrain on the story by the recipe of 2022 and by today's defaults, and find when ours is as good.

    People 17–24 are not read: the last two of the others validate. CPU time is that of this process, a
    step costing what all steps and validations of its run cost in the mean.
    """
    store = story.write_store(story.read(), plan.people, folder / "store")
    split = folder / "split.json"
    story.split(store, plan.test_people).save(split)
    ours = worth.default_run(store, folder / "ours", framework=framework, steps=plan.story_steps)
    ours = replace(ours, data=replace(ours.data, split=str(split)))
    then, seconds = _trained(_of_2022(ours, folder / "then"))
    now, our_seconds = _trained(ours)
    final = then[-1]["val_explained_variance"]
    note = f"{ours.train.steps} steps of {ours.data.batch_size} windows, seed 0"
    case = f"quality/{framework}"
    rows = [
        Row(case=case, metric="recipe_ev", value=final, note=note),
        Row(case=case, metric="ev", value=now[-1]["val_explained_variance"], note=note),
        Row(case=case, metric="ev_linear", value=now[-1]["val_linear_explained_variance"], note=note),
        Row(case=case, metric="recipe_cpu_seconds", value=seconds, note=note),
    ]
    goals = {"recipe": ("model", final), "recipe_network": ("network", final)}
    goals["linear_network"] = ("network", now[-1]["val_linear_explained_variance"])
    for name, (who, goal) in goals.items():
        step = next((line["step"] for line in now if _explained(line, who) >= goal), None)
        if step is None:
            best = max(_explained(line, who) for line in now)
            rows.append(
                Row(case=case, metric=f"{name}_not_reached", value=best, note=f"{who}, goal {goal:.3f}")
            )
            continue
        cost = our_seconds * step / ours.train.steps
        rows.append(
            Row(case=case, metric=f"{name}_share", value=cost / seconds, note=f"{who}, after step {step}")
        )
    return rows


def _of_2022(ours: PretrainConfig, out: Path) -> PretrainConfig:
    """Return the recipe of 2022 in our size: model, loss and learning rate; batches and steps are ours."""
    published = preset("published", ours.model.framework)
    size: dict[str, Any] = {
        name: getattr(ours.model, name) for name in ("layers", "width", "heads", "networks")
    }
    model = {**published["model"], **size}
    train = {name: getattr(ours.train, name) for name in ("steps", "checkpoint_every")}
    return replace(
        ours,
        out=str(out),
        model=model_config(ours.model.framework, **model),
        train=TrainConfig(lr=published["train"]["lr"], plot=False, **train),
    )


def _trained(config: PretrainConfig) -> tuple[list[dict[str, Any]], float]:
    """Return the lines of a run's validations and its CPU seconds."""
    every = max(1, config.train.steps // CHECKS)
    config = replace(config, train=replace(config.train, validate_every=every))
    began = time.process_time()
    run = pretrain(config, resume="never", quiet=True)
    seconds = time.process_time() - began
    return [line for line in read_metrics(run) if "val_mse" in line], seconds


def _explained(line: dict[str, Any], who: str) -> float:
    """Return the variance that the model, or its network alone, explains."""
    # Without a linear path the network is the model.
    error = line["val_network_mse"] if who == "network" and "val_network_mse" in line else line["val_mse"]
    return float(1 - error / line["val_mean_mse"])
