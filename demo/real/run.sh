#!/usr/bin/env bash
# The whole path on images that people made: Debian's clip art and stamps, with their titles in place of alt-texts.
#   make real                      installs what it needs, and runs this; run it again to resume
#   DRAWINGS=100 RUN=/tmp/small bash demo/real/run.sh
# Everything is written to demo-run/real. Nothing of the images is part of this repository.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUN:-demo-run/real}
PACKAGES=${PACKAGES:-demo-run/packages} # where `make real` puts the packages with models and photographs
WEB=$RUN/web ROOT=$RUN/dataset
CLIPART=/usr/share/openclipart/png STAMPS=/usr/share/tuxpaint/stamps
export CLIPMILL_LOG=${CLIPMILL_LOG:-WARNING} PYTHONWARNINGS=ignore
mkdir -p "$RUN"
[ -d $CLIPART ] && [ -d $STAMPS ] && [ -d /usr/share/backgrounds/mate ] && [ -d "$PACKAGES" ] || {
  echo "images or models are not there: run \`make real\` as root, which installs them" >&2
  exit 1
}

step() { # step NAME COMMAND...: print the command, run it, record its seconds
  local name=$1 start=$EPOCHREALTIME
  shift
  printf '\n[%s] %s\n' "$name" "$*"
  "$@"
  awk -v n="$name" -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%s\t%.1f\n", n, b - a }' |
    tee -a "$RUN/seconds.tsv"
}

# A small web: the packages' own folders, images composed of them, and a list of all
PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
[ -f "$WEB/port" ] && PORT=$(cat "$WEB/port") # the list of an earlier run names its port
[ -f "$WEB/port" ] || {
  step world python demo/real/world.py "$WEB" --base-url "http://127.0.0.1:$PORT" ${DRAWINGS:+--drawings $DRAWINGS} \
    --backgrounds /usr/share/backgrounds "$PACKAGES"/skimage/data/{astronaut,brick,chelsea,coffee,grass,gravel}.png
  echo "$PORT" >"$WEB/port"
}
python demo/serve.py "$WEB" "$PORT" openclipart=$CLIPART stamps=$STAMPS >"$RUN/server.log" 2>&1 &
trap 'kill $!' EXIT
until (: >"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; do sleep 0.1; done

# 1. Evaluation sets of held-out drawings: their titles, and classes by folder
EVAL=$RUN/eval
step evalset clipmill evalset "$EVAL/titles" --images "$WEB/heldout" --captions "$WEB/heldout.csv"
step evalset clipmill evalset "$EVAL/kinds" --classes "$WEB/labelled/test"
step evalset clipmill evalset "$EVAL/kinds" --classes "$WEB/labelled/train" --split train

# 2. The list becomes raw shards, without duplicates
step ingest clipmill ingest "$ROOT" --source "$WEB/list.parquet" --shard-size 1000 --image-size 144 --allow-private
step dedup clipmill dedup "$ROOT"
step pack clipmill pack "$ROOT"
