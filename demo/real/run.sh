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
SEEDS=${SEEDS:-0} STEPS=${STEPS:-500} CAPTIONER_STEPS=${CAPTIONER_STEPS:-600} TEACHER_STEPS=${TEACHER_STEPS:-300}
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
  step world python demo/real/world.py "$WEB" --base-url "http://127.0.0.1:$PORT" \
    ${DRAWINGS:+--drawings $DRAWINGS --fewest 1} \
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

# 2. The list becomes raw shards; the models: others' weights, and descriptions of small ones
step ingest clipmill ingest "$ROOT" --source "$WEB/list.parquet" --shard-size 1000 --image-size 144 \
  --min-caption-chars 3 --allow-private
step dedup clipmill dedup "$ROOT"
MODELS=$RUN/models
[ -f "$MODELS/student/open_clip_config.json" ] ||
  step models env PYTHONPATH=demo python demo/real/models.py "$PACKAGES" "$WEB/list.parquet" "$MODELS"

# 3. A captioner of the titles, its captions, nouns by the Penn tagger, final shards
run=(--workers 0 --precision fp32 --batch-size 128)
step captioner clipmill train coca --data "$ROOT" --out "$RUN/captioner" --model "local-dir:$MODELS/coca" "${run[@]}" \
  --steps "$CAPTIONER_STEPS" --lr 1e-3 --warmup 30 --clip-norm 1
step export clipmill export "$RUN/captioner" --to "$MODELS/captioner"
step caption clipmill caption "$ROOT" --model "local-dir:$MODELS/captioner" --num-captions 1 --temperature 0.3 \
  --max-tokens 20 --similarity
step pack env PYTHONPATH=demo/real PACKAGES="$PACKAGES" clipmill pack "$ROOT" --nouns-only --tagger tagger:tag

# 4. Which pairs are worth training on: English, no copy of an evaluation image, no synset too often
step select clipmill select "$ROOT" --name clean --against "$EVAL/titles" "$EVAL/kinds" --balance 100 \
  --where 'language == "en" or language_confidence < 0.5' 'aspect < 4'
step vocab clipmill vocab "$ROOT" --min-count 20

# 5. The teacher: MiniLM's text tower as it is, and ImageNet's EfficientNet-Lite0, which learns to match it (LiT)
views=(--scale 0.7 1 --ratio 0.9 1.1)
step teacher clipmill train clip --data "$ROOT" --out "$RUN/teacher" --model "local-dir:$MODELS/lit" --lock text \
  --select clean --captions original "${run[@]}" "${views[@]}" --steps "$TEACHER_STEPS" --lr 1e-3 --warmup 30 \
  --clip-norm 1
step export clipmill export "$RUN/teacher" --to "$MODELS/teacher"
step cache clipmill cache "$ROOT" --model "local-dir:$MODELS/teacher" --name teacher --views 2 "${views[@]}" --flip 0
step check clipmill check "$ROOT"

# 6. A small student, from scratch and distilled from the cache, equal steps
student=(--data "$ROOT" --select clean --model "local-dir:$MODELS/student" "${run[@]}" --steps "$STEPS" --lr 1e-3
  --warmup 30 --clip-norm 1)
for seed in $SEEDS; do
  step scratch clipmill train clip "${student[@]}" "${views[@]}" --out "$RUN/scratch-$seed" --seed "$seed"
  step distilled clipmill train tinyclip "${student[@]}" --teacher teacher --fixed-logit-scale None --feature-weight 2 \
    --out "$RUN/distilled-$seed" --seed "$seed"
done

# 7. Evaluation on held-out drawings, and the reports
for model in "$RUN/captioner" "$RUN/teacher" "$RUN"/scratch-* "$RUN"/distilled-*; do
  step evaluate clipmill eval "$model" --data "$EVAL/kinds" "$EVAL/titles"
done
step report clipmill report "$ROOT"
step report clipmill report "$RUN/distilled-${SEEDS%% *}"
step compare clipmill compare "$RUN/teacher" "$RUN"/scratch-* "$RUN"/distilled-* --data "$EVAL/kinds" \
  --baseline scratch --output "$RUN/compare.html" --markdown "$RUN/compare.md"
cat "$RUN/compare.md"
awk -F'\t' '{ sum += $2 } END { printf "\n%.0f s in all, %s has them by step\n", sum, FILENAME }' "$RUN/seconds.tsv"
