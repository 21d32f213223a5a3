#!/usr/bin/env bash
# SiCLIP's ablation (its tables 4 and 5) at small scale: the demo's scenes, MobileCLIP-S0 and SiCLIP at an eighth of
# the width.
#   make study-siclip      runs the demo first where needed; under an hour on two cores; writes docs/siclip.md, .svg and -divergence.svg
# A small MobileCLIP, distilled from the demo's CoCa by the TinyCLIP recipe, is base and teacher of all rows.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-demo-run}
SEEDS=${SEEDS:-0 1 2} STEPS=${STEPS:-120} BASE_STEPS=${BASE_STEPS:-600}
ROOT=$RUN/scenes STUDY=$RUN/siclip EVAL=("$RUN/web/eval/zeroshot" "$RUN/web/eval/retrieval")
export CLIPMILL_LOG=${CLIPMILL_LOG:-WARNING} PYTHONWARNINGS=ignore
[ -f "$ROOT/teacher/coca/dataset.json" ] || [ -d "$ROOT/teacher/coca" ] || RUN=$RUN bash demo/demo.sh

common=(--data "$ROOT" --batch-size 128 --lr 2e-3 --warmup 20 --workers 0 --precision fp32)
clipmill train tinyclip "${common[@]}" --model local-dir:demo/models/mobileclip --teacher coca \
  --out "$STUDY/base" --steps "$BASE_STEPS" --feature-weight 2
# the paper's --fd-weight of 4000 is for features of width 512; these have width 128
plain=(--no-inherit --fd-weight 0 --crd-weight 0 --icl-weight 0 --pm-weight 0)
inherited=(--fd-weight 0 --crd-weight 0 --icl-weight 0 --pm-weight 0)
wikd=(--fd-weight 1000 --pm-weight 0)
whole=(--fd-weight 1000)
for seed in $SEEDS; do
  for row in plain inherited wikd whole original; do
    declare -n flags=$([ $row = original ] && echo whole || echo $row)
    clipmill train siclip "${common[@]}" "${flags[@]}" --captions $([ $row = original ] && echo original || echo all) \
      --model local-dir:demo/models/siclip --base local-dir:demo/models/mobileclip --base-weights "$STUDY/base" \
      --steps "$STEPS" --seed "$seed" --ops 0 --scale 0.9 1 --ratio 1 1 --out "$STUDY/$row-$seed" \
      --eval-data "${EVAL[0]}" --eval-every-steps 30
  done
done
for model in "$STUDY"/*; do
  clipmill eval "$model" --data "${EVAL[@]}"
done
python demo/study_siclip.py "$STUDY" "$ROOT" docs/siclip
