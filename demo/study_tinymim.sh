#!/usr/bin/env bash
# TinyMIM's claims at small scale: targets, masked input, a teacher between, on the demo's scenes.
#   make study-tinymim     needs no demo run; about 20 minutes of one core; writes docs/tinymim.svg and the table of
#                          docs/tinymim.md
# A CLIP trained here on the scenes teaches small ViTs by its image tower; probes and fine-tuning measure them. All rows
# of a seed see the same images in as many steps; a seed's rows are finished before the next seed begins.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-demo-run}
SEEDS=${SEEDS:-0 1 2} STEPS=${STEPS:-150} TUNE_STEPS=${TUNE_STEPS:-150} TEACHER_STEPS=${TEACHER_STEPS:-600}
LANES=${LANES:-2}
STUDY=$RUN/tinymim
WEB=$STUDY/web ROOT=$STUDY/scenes IMAGES=$STUDY/web/eval/zeroshot
export CLIPMILL_LOG=${CLIPMILL_LOG:-WARNING} PYTHONWARNINGS=ignore OMP_NUM_THREADS=1

if [ ! -f "$ROOT/dataset.json" ]; then # a folder of images with their captions in metadata.jsonl
  python demo/scenes.py "$WEB" --count 5000 --eval-count 1000 --train-count 4000 >/dev/null
  sed 's/"file":/"file_name":/; s/"caption":/"text":/' "$WEB/truth.jsonl" >"$WEB/images/metadata.jsonl"
  clipmill ingest "$ROOT" --source "$WEB/images" --shard-size 500
fi

views=(--scale 0.9 1 --ratio 1 1 --flip 0)
run=(--workers 0 --precision fp32 --warmup 20)
scenes=(--data "$ROOT" --folder raw --batch-size 128)
small=timm:local-dir:demo/models/tinymim_student
middle=timm:local-dir:demo/models/tinymim_middle
mim=(tinymim "${scenes[@]}" "${views[@]}" "${run[@]}" --teacher "local-dir:$STUDY/models/teacher"
  --lr 2e-3 --drop-path 0 --steps "$STEPS")

if [ ! -d "$STUDY/models/teacher" ]; then
  clipmill train clip "${scenes[@]}" "${views[@]}" "${run[@]}" --captions original --lr 5e-4 --steps "$TEACHER_STEPS" \
    --model local-dir:demo/models/tinymim_teacher --out "$STUDY/teacher" --eval-data "$IMAGES" --eval-every-steps 100
  clipmill export "$STUDY/teacher" --to "$STUDY/models/teacher"
fi

student() { # student ROW SEED: pre-training, then a probe and fine-tuning of what it gave
  local out=$STUDY/rows/$1-$2 words=(--model "$small") base
  [ ! -f "$out/done" ] || return 0
  base=$out/encoder
  case $1 in
    class) words+=(--target class-token) ;;
    output) words+=(--target output) ;;
    ffn) words+=(--target ffn-before) ;;
    relations) ;;
    masked) words+=(--mask-ratio 0.75) ;;
    chain) words=(--chain "$middle,$small") base=$out/encoder/stage-2 ;;
    scratch) base=$small ;;
  esac
  [ "$1" = scratch ] || clipmill train "${mim[@]}" "${words[@]}" --seed "$2" --out "$out/encoder"
  clipmill train probe --model "$base" --data "$IMAGES" "${run[@]}" --no-augment --pooling mean --batch-size 64 \
    --steps 500 --warmup 0 --lr 1e-2 --final-lr 0 --eval-every-epochs 10000 --seed "$2" --out "$out/probe"
  clipmill train finetune --model "$base" --data "$IMAGES" "${views[@]}" "${run[@]}" --pooling mean --batch-size 64 \
    --sides 48 --base-side 48 --batch-parts 1 --no-range-augment --ema-decay None --clip-norm None --warmup-lr None \
    --steps "$TUNE_STEPS" --lr 2e-3 --final-lr 0 --eval-every-epochs 1 --seed "$2" --out "$out/tuned"
  touch "$out/done"
}
in_parallel() { xargs -P "$LANES" -I@ bash -c 'set -euo pipefail; eval "$SHARED"; @' >>"$STUDY/log.txt" 2>&1; }
SHARED=$(declare -p STUDY IMAGES TUNE_STEPS views run small middle mim; declare -f student)
export SHARED

for seed in $SEEDS; do
  for row in relations scratch class output ffn masked chain; do echo "student $row $seed"; done
done | in_parallel
python demo/study_tinymim.py "$STUDY" docs/tinymim
