#!/usr/bin/env bash
# CatLIP's figure 4 and Transfer Init at small scale: one ViT (three layers of width 96, 48 px) on the demo's scenes.
#   make study-catlip      runs the demo first where needed; under an hour on two cores; writes docs/catlip.md, two .svg
# Pre-training by synsets or by CLIP, for 2 to 16 epochs of 5,000 images; then linear probes on 4,000 labelled ones.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-demo-run}
SEEDS=${SEEDS:-0 1 2} EPOCHS=${EPOCHS:-2 4 8 16} LANES=${LANES:-2}
ROOT=$RUN/scenes STUDY=$RUN/catlip
IMAGES=$STUDY/labelled/eval/zeroshot
export CLIPMILL_LOG=${CLIPMILL_LOG:-WARNING} PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
[ -f "$ROOT/vocab/all.tsv" ] || RUN=$RUN bash demo/demo.sh
[ -d "$IMAGES" ] || python demo/scenes.py "$STUDY/labelled" --count 0 --eval-count 2000 --train-count 4000 >/dev/null

data=(--data "$ROOT" --captions original --batch-size 128 --scale 0.9 1 --ratio 1 1 --warmup 20)
run=(--workers 0 --precision fp32)
catlip=(--model timm:catlip_vit_tiny --sides 48 --base-side 48 --batch-parts 1 --flip 0 --no-range-augment
  --ema-decay 0.99)
fixed=(--data "$IMAGES" --no-augment --batch-size 64 --final-lr 0 --eval-every-epochs 10000)

pretrain() { # pretrain ROW EPOCHS SEED, then its linear probe with all labels
  local out=$STUDY/$1-$2-$3 words
  [ ! -f "$out/done" ] || return 0
  case $1 in
    clip) words=(clip --model local-dir:demo/models/clip --lr 5e-4) ;;
    catlip) words=(catlip "${catlip[@]}" --lr 2e-3) ;;
    bias) words=(catlip "${catlip[@]}" --lr 2e-3 --frequency-bias) ;;
  esac
  clipmill train "${words[@]}" "${data[@]}" "${run[@]}" --epochs "$2" --seed "$3" --out "$out"
  clipmill train probe --model "$out" "${fixed[@]}" "${run[@]}" --steps 1500 --lr 1e-2 --seed "$3" --out "$out/probe"
  touch "$out/done"
}
transfer() { # transfer INIT FRACTION LR SEED: a probe of the 8-epoch tower with frequency biases
  local base=$STUDY/bias-8-$4
  clipmill train probe --model "$base" "${fixed[@]}" "${run[@]}" --fraction "$2" --steps 300 --lr "$3" --seed "$4" \
    --out "$STUDY/transfer/$1-$2-$3-$4" $([ "$1" = rows ] && echo --class-map "$STUDY/classes.tsv")
}
in_parallel() { xargs -P "$LANES" -I@ bash -c 'set -euo pipefail; eval "$SHARED"; @' >>"$STUDY/log.txt" 2>&1; }
SHARED=$(declare -p STUDY IMAGES data run catlip fixed; declare -f pretrain transfer)
export SHARED

for epochs in $EPOCHS; do
  for row in catlip bias clip; do
    for seed in $SEEDS; do echo "pretrain $row $epochs $seed"; done
  done
done | in_parallel
clipmill classes "$IMAGES/classnames.txt" --vocabulary "$ROOT/vocab/all.tsv" --out "$STUDY/classes.tsv"
for fraction in 0.01 0.05 0.25 1; do
  for lr in 1e-4 1e-3 1e-2; do
    for init in rows random; do
      for seed in $SEEDS; do echo "transfer $init $fraction $lr $seed"; done
    done
  done
done | in_parallel
python demo/study_catlip.py "$STUDY" docs/catlip
