"""One module per stage of a study: plan the units, run one unit."""
