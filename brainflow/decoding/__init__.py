"""Decoding: labelled windows, folds, scores with intervals, baselines, adaptation of a pretrained model."""
