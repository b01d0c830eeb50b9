#!/usr/bin/env bash
# Run or resume a study on a Ray cluster and wait for it. Every argument goes to `samreg run`:
#   RAY_ADDRESS=http://head:8265 deploy/submit.sh configs/cardiac.yaml --cohort /data/cohort.csv --out /data/study
# REMOTE_PYTHON names the Python of the nodes that has the packages (default: python).
# Exit code 0 when the job succeeded. Paths are seen from the cluster: absolute, on storage every node mounts.
set -euo pipefail
: "${RAY_ADDRESS:?set RAY_ADDRESS to the dashboard of the cluster, for example http://head-node:8265}"
previous=
for argument in "$@"; do
  case "$previous" in
    --cohort | --out | --pairs)
      case "$argument" in
        /* | *://* | all | star | intra | knn) ;;
        *)
          echo "submit.sh: $previous $argument is relative; the job runs elsewhere, give an absolute path" >&2
          exit 2
          ;;
      esac
      ;;
  esac
  previous=$argument
done
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ray_command=${RAY:-$repository/.venv/bin/ray}
command -v "$ray_command" >/dev/null || ray_command=ray
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
# Only the code travels: never data, results, .git or the virtual environment.
cp -R "$repository"/{pipeline,actors,storage,configs} "$repository"/{samreg.py,pyproject.toml} "$stage"/
find "$stage" -name __pycache__ -type d -prune -exec rm -rf {} +
"$ray_command" job submit --address "$RAY_ADDRESS" --working-dir "$stage" -- \
  "${REMOTE_PYTHON:-python}" -m pipeline.cli run "$@" --executor ray
