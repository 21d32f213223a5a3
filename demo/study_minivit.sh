#!/usr/bin/env bash
# MiniViT's ablation at small scale: a Swin of 2 + 6 blocks (width 32 and 64, 48 px) that tells the demo's things apart.
#   make study-minivit     about 25 minutes of one core; writes docs/minivit-gradients.svg, docs/minivit-cka.svg and
#                          the table of docs/minivit.md
# Weights are shared by no blocks, by pairs or by all of a stage; with and without transformation and distillation. All
# rows of a seed see the same images, in as many steps; a seed's rows are finished before the next seed begins.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-demo-run}
SEEDS=${SEEDS:-0 1 2} STEPS=${STEPS:-250} TEACHER_STEPS=${TEACHER_STEPS:-900}
STUDY=$RUN/minivit IMAGES=$RUN/minivit/labelled/eval/zeroshot
export CLIPMILL_LOG=${CLIPMILL_LOG:-WARNING} PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
[ -d "$IMAGES" ] || python demo/scenes.py "$STUDY/labelled" --count 0 --eval-count 1000 --train-count 4000 >/dev/null

common=(--data "$IMAGES" --model timm:mini_swin_study --batch-size 64 --lr 2e-3 --warmup 20 --final-lr 0 --workers 0
  --precision fp32 --scale 0.9 1 --ratio 1 1 --flip 0 --ops 0 --mixup 0 --cutmix 0 --erasing 0 --smoothing 0
  --log-every 25 --eval-every-epochs 10000)
plain=(--head-maps none --local none)
labels=(--teacher none --label-weight 1)
declare -A groups=([1]="2 6" [2]="1 3" [all]="1 1") # of the two stages

train() { # train NAME OPTION...
  local out=$STUDY/$1
  [ ! -f "$out/done" ] || return 0
  clipmill train minivit "${common[@]}" "${@:2}" --out "$out" >>"$STUDY/log.txt" 2>&1
  touch "$out/done"
}

train teacher "${plain[@]}" "${labels[@]}" --groups ${groups[1]} --steps "$TEACHER_STEPS" --seed 100
for seed in $SEEDS; do
  for size in 1 2 all; do
    student=(--groups ${groups[$size]} --steps "$STEPS" --seed "$seed" --log-analysis 25)
    train "rows/plain-$size-$seed" "${student[@]}" "${plain[@]}" "${labels[@]}"
    train "rows/transformation-$size-$seed" "${student[@]}" "${labels[@]}"
    train "rows/distillation-$size-$seed" "${student[@]}" "${plain[@]}" --teacher "$STUDY/teacher"
    train "rows/all-$size-$seed" "${student[@]}" --teacher "$STUDY/teacher"
    train "rows/identity-$size-$seed" "${student[@]}" --teacher "$STUDY/teacher" --head-maps identity
  done
done
python demo/study_minivit.py "$STUDY" docs/minivit
