#!/usr/bin/env bash
# Clipmill's table of contents: from a list of URLs to a distilled student, with the commands a user runs on CC12M,
# at a size that takes minutes on two cores. Everything is written to demo-run/; run it again to resume.
#   SEEDS="0 1 2" bash demo/demo.sh    trains the two students with three seeds
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-demo-run}
SEEDS=${SEEDS:-0}
WEB=$RUN/web ROOT=$RUN/scenes COCA=$RUN/models/coca STEPS=${STEPS:-250}
export CLIPMILL_LOG=${CLIPMILL_LOG:-WARNING} PYTHONWARNINGS=ignore
mkdir -p "$RUN"
: >"$RUN/seconds.tsv"

step() { # step NAME COMMAND...: print the command, run it, record its seconds
  local name=$1 start=$EPOCHREALTIME
  shift
  printf '\n[%s] %s\n' "$name" "$*"
  "$@"
  awk -v n="$name" -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%s\t%.1f\n", n, b - a }' >>"$RUN/seconds.tsv"
}

# A small web: 5,000 scenes with captions, a list of their URLs with the usual faults, a server, held-out sets
PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
[ -f "$WEB/port" ] && PORT=$(cat "$WEB/port") # the list of an earlier run names its port
[ -f "$WEB/port" ] || {
  step scenes python demo/scenes.py "$WEB" --count 5000 --base-url "http://127.0.0.1:$PORT" --eval-count 400
  echo "$PORT" >"$WEB/port"
}
python demo/serve.py "$WEB" "$PORT" >"$RUN/server.log" 2>&1 &
trap 'kill $!' EXIT
until (: >"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; do sleep 0.1; done

# 1. The list becomes raw shards
step ingest clipmill ingest "$ROOT" --source "$WEB/list.tsv" --shard-size 500 --allow-private

# 2. Captioner and teacher: a small CoCa, trained on the raw shards by open_clip's own CoCa loss
step teacher clipmill train coca --data "$ROOT" --out "$RUN/coca" --model local-dir:demo/models/coca \
  --shards 8 --steps 430 --batch-size 128 --lr 1e-3 --warmup 30 --clip-norm 1 --scale 1 1 --ratio 1 1 --workers 0
step export clipmill export "$RUN/coca" --to "$COCA"

# 3. Synthetic captions, WordNet synsets, final shards, vocabulary
step caption clipmill caption "$ROOT" --model "local-dir:$COCA" --num-captions 2 --temperature 0.3 --max-tokens 20 \
  --similarity
step pack clipmill pack "$ROOT"
step vocab clipmill vocab "$ROOT" --min-count 50

# 4. The teacher's embeddings of replayable views and of all captions
step cache clipmill cache "$ROOT" --model "local-dir:$COCA" --views 2 --scale 0.9 1 --ratio 1 1 --flip 0
step check clipmill check "$ROOT"

# 5. A smaller student, from scratch and distilled from the cache, equal steps
student=(--data "$ROOT" --model local-dir:demo/models/student --steps "$STEPS" --batch-size 128 --lr 2e-3
  --warmup 20 --workers 0)
for seed in $SEEDS; do
  step scratch clipmill train clip "${student[@]}" --out "$RUN/scratch-$seed" --seed "$seed" --scale 0.9 1 --ratio 1 1
  step distilled clipmill train tinyclip "${student[@]}" --teacher coca --out "$RUN/distilled-$seed" --seed "$seed" \
    --feature-weight 2
done

# 6. Evaluation on held-out scenes, and the reports
for model in "$RUN/coca" "$RUN"/scratch-* "$RUN"/distilled-*; do
  step evaluate clipmill eval "$model" --data "$WEB/eval/zeroshot" "$WEB/eval/retrieval"
done
step report clipmill report "$ROOT"
step report clipmill report "$RUN/distilled-${SEEDS%% *}"
python demo/table.py "$RUN"
