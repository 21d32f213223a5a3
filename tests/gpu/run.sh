#!/usr/bin/env bash
# Everything that only a GPU can show: the gpu tests and the figures of docs/benchmarks.md, in under eight minutes.
#
#   bash tests/gpu/run.sh [--dry] [--only STEP ...] [--seconds N]
#
# Needs a CUDA device, a Python that has torch and what tests/gpu/provided.txt lists, and no network: what else
# clipmill needs is installed from tests/gpu/kit, which `make gpu-kit` fills. --dry runs the same steps on the CPU at
# tiny sizes. Files go to $OUT, or to a folder of /tmp that is named at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
are_there='import importlib.metadata as m, importlib.util as u, sys
m.version("clipmill"); sys.exit(not all(map(u.find_spec, ("open_clip", "webdataset", "tyro"))))'
if ! "$python" -c "$are_there" 2> /dev/null; then
    kit=(tests/gpu/kit/*.whl)
    [ -e "${kit[0]}" ] || { echo "tests/gpu/kit has no wheels: run 'make gpu-kit' where there is a network" >&2; exit 2; }
    site=$(mktemp -d /tmp/clipmill-gpu-site.XXXXXX)
    offline=(-m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site")
    "$python" "${offline[@]}" "${kit[@]}"
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    "$python" "${offline[@]}" --no-build-isolation .  # for its entry points; the code is taken from here
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" tests/gpu/runner.py "$@"
