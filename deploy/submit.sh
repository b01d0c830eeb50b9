#!/usr/bin/env bash
# Run or resume a study on a Ray cluster and wait for it: `samreg submit` of this checkout, with the same options.
#   RAY_ADDRESS=http://head:8265 deploy/submit.sh configs/cardiac.yaml --cohort /data/cohort.csv --out /data/study
# PYTHON names the local Python that has the packages (default: that of .venv, else python3).
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$repository/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m pipeline.cli submit "$@"
