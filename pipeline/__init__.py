"""The study: configuration, stages and driver; `pipeline.algorithms` holds the pure array functions."""
