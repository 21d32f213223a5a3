#!/usr/bin/env bash
# All papers side by side on the images of `make real`: one dataset, one budget of steps, one size of student.
#   make study-all      runs `make real` first where needed; under three hours on two cores; writes into docs/methods.md,
#                       .svg and -latency.svg, and the page methods.html in its folder; run it again to resume
#   STEPS=10 SEEDS=0 bash demo/study_all.sh      every row's command once; writes nothing to docs
# All rows of a seed see as many pairs or images; a seed's rows are finished before the next seed begins.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-demo-run/real} STUDY=${STUDY:-$RUN/all}
OUT=${OUT:-$([ -z "${STEPS:-}${SEEDS:-}${ROWS:-}" ] && echo docs/methods || echo "$STUDY/methods")}
SEEDS=${SEEDS:-0 1 2} STEPS=${STEPS:-1200} LANES=${LANES:-2}
TEACHER_STEPS=${TEACHER_STEPS:-$((STEPS * 4))} TUNE_STEPS=${TUNE_STEPS:-$((STEPS / 2))}
ROWS=${ROWS:-scratch synthetic siclip manual auto stages lit cached live two catlip tinymim untied tied multiplexed
  distilled}
ROOT=$RUN/dataset KINDS=$STUDY/eval/kinds TITLES=$STUDY/eval/titles
export CLIPMILL_LOG=${CLIPMILL_LOG:-WARNING} PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
[ -f "$RUN/compare.md" ] || RUN=$RUN bash demo/real/run.sh
mkdir -p "$STUDY"/{done,logs}

run=(--workers 0 --precision fp32 --warmup $((STEPS < 60 ? 2 : 50)))
views=(--scale 0.7 1 --ratio 0.9 1.1) # those of the teachers' caches
pairs=(--data "$ROOT" --select clean --batch-size 64 --clip-norm 1)
titles=("${pairs[@]}" --captions original) # what people wrote
measured=(--eval-data "$KINDS" --eval-every-steps $((STEPS < 6 ? 1 : STEPS / 6)))
student=(--model "local-dir:$STUDY/models/student")
large=(--teacher large --teacher-weights "local-dir:$STUDY/models/large-trained")
images=(--data "$KINDS" --batch-size 64)
tower=(--model "timm:local-dir:$STUDY/models/tower")
# what a teacher that is not as small as its student says: features as they are, at the scale that it learned
affine=(--fixed-logit-scale None --feature-weight 10)
# Masks overshoot what is asked for, which is meant to end at the student's 58 % fewer weights in blocks, as the stages
masks=(--inherit auto --mask-lr 0.05)
HALF=$(((STEPS + 1) / 2))

shared=("${images[@]}" --model "timm:local-dir:$STUDY/models/mini" "${views[@]}" --flip 0 --ops 0 --mixup 0 --cutmix 0
  --erasing 0 --smoothing 0 --drop-path 0 --warmup-lr None --lr 2e-3 --final-lr 0 --eval-every-epochs 10000)
plain=(--head-maps none)
labels=(--teacher none --label-weight 1)

row() { # row NAME: the options of `clipmill train` for a row
  case $1 in
    scratch) words=(clip "${student[@]}" "${titles[@]}" "${views[@]}" --lr 1e-3) ;;
    synthetic) words=(clip "${student[@]}" "${pairs[@]}" "${views[@]}" --captions all --lr 1e-3) ;;
    # the paper's --fd-weight of 4000 is for features of width 512; these have width 128
    siclip)
      words=(siclip "${pairs[@]}" "${views[@]}" --model "local-dir:$STUDY/models/siclip" --lr 1e-3 --ops 0
        --base "local-dir:$STUDY/models/mobileclip" --base-weights "$STUDY/teachers/mobileclip" --fd-weight 1000)
      ;;
    manual) words=(tinyclip "${student[@]}" "${titles[@]}" "${large[@]}" --inherit manual --lr 1e-3) ;;
    auto)
      words=(tinyclip "${titles[@]}" "${large[@]}" "${masks[@]}" --lr 1e-3 --sparsity 0.55
        --prune-step $((STEPS * 3 / 8)) --sparsity-ramp $((STEPS / 5)))
      ;;
    stages)
      words=(tinyclip "${titles[@]}" "${large[@]}" "${masks[@]}" --lr 1e-3 --stages 1,0.7,0.45
        --prune-step $((HALF * 3 / 8)) --sparsity-ramp $((HALF / 5)))
      steps=$HALF
      ;;
    lit) words=(tinyclip "${student[@]}" "${titles[@]}" --teacher teacher "${affine[@]}" --lr 1e-3) ;;
    cached) words=(tinyclip "${student[@]}" "${titles[@]}" --teacher large "${affine[@]}" --lr 1e-3) ;;
    live) # a live teacher's images are the student's, so it is not the LiT teacher with its 96 px
      words=(tinyclip "${student[@]}" "${titles[@]}" "${views[@]}" --teacher-from live
        --teacher-weights "local-dir:$STUDY/models/large-trained" "${affine[@]}" --lr 1e-3)
      ;;
    two) words=(tinyclip "${student[@]}" "${titles[@]}" --teacher teacher large "${affine[@]}" --lr 1e-3) ;;
    catlip)
      words=(catlip "${tower[@]}" "${pairs[@]}" "${views[@]}" --flip 0 --sides 48 --base-side 48 --batch-parts 1
        --no-range-augment --ema-decay None --warmup-lr None --frequency-bias --lr 2e-3)
      ;;
    tinymim)
      words=(tinymim "${tower[@]}" "${pairs[@]}" "${views[@]}" --flip 0 --jitter 0 0 0 0 --drop-path 0 --lr 2e-3
        --teacher "local-dir:$STUDY/models/large-trained")
      ;;
    untied) words=(minivit "${shared[@]}" "${plain[@]}" "${labels[@]}" --groups 4) ;;
    tied) words=(minivit "${shared[@]}" "${plain[@]}" "${labels[@]}" --groups 2) ;;
    multiplexed) words=(minivit "${shared[@]}" --head-maps identity "${labels[@]}" --groups 2) ;;
    distilled) words=(minivit "${shared[@]}" --head-maps identity --teacher "$STUDY/teachers/classifier" --groups 2) ;;
  esac
}
once() { # once NAME COMMAND...: run it if it is not done; what it says is in a file, its seconds in seconds.tsv
  [ ! -f "$STUDY/done/$1" ] || return 0
  local start=$EPOCHREALTIME
  "${@:2}" >>"$STUDY/logs/$1.txt" 2>&1 || {
    echo "$1 failed: $STUDY/logs/$1.txt says why" >&2
    return 255 # on which xargs starts nothing more
  }
  awk -v n="$1" -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%s\t%.1f\n", n, b - a }' >>"$STUDY/seconds.tsv"
  touch "$STUDY/done/$1"
}
teacher() { # teacher NAME, of which students inherit or by which they are taught
  local out=$STUDY/teachers/$1
  case $1 in
    large | mobileclip)
      clipmill train tinyclip --model "local-dir:$STUDY/models/$1" "${pairs[@]}" "${run[@]}" --captions all \
        --teacher teacher "${affine[@]}" --lr 1e-3 --steps "$TEACHER_STEPS" --seed 100 --out "$out" &&
        clipmill eval "$out" --data "$KINDS" "$TITLES"
      ;;
    classifier)
      clipmill train minivit "${shared[@]}" "${plain[@]}" "${labels[@]}" "${run[@]}" --groups 4 --seed 100 \
        --steps "$TEACHER_STEPS" --out "$out"
      ;;
  esac
}
cache_of_large() {
  clipmill export "$STUDY/teachers/large" --to "$STUDY/models/large-trained" &&
    clipmill cache "$ROOT" --model "local-dir:$STUDY/models/large-trained" --name large --views 2 "${views[@]}" --flip 0 \
      --overwrite # of an earlier study
}
last_stage() { # last_stage ROW SEED: the RUN of its student
  echo "$STUDY/rows/$1-$2$([ "$1" = stages ] && echo /stage-2)"
}
train_row() { # train_row ROW SEED
  local words=() steps=$STEPS
  row "$1"
  case $1 in
    catlip | tinymim | untied | tied | multiplexed | distilled) ;;
    *) words+=("${measured[@]}") ;;
  esac
  clipmill train "${words[@]}" "${run[@]}" --steps "$steps" --seed "$2" --out "$STUDY/rows/$1-$2"
}
tune() { # tune probe|finetune ROW SEED: what labels make of the image tower
  local words
  case $1 in
    probe) words=(--no-augment --steps 500 --lr 1e-2) ;;
    finetune)
      words=("${views[@]}" --flip 0 --sides 48 --base-side 48 --no-range-augment --ema-decay None --clip-norm None
        --warmup-lr None --steps "$TUNE_STEPS" --lr 1e-3)
      ;;
  esac
  clipmill train "$1" --model "$(last_stage "$2" "$3")" "${images[@]}" "${run[@]}" "${words[@]}" --final-lr 0 \
    --eval-every-epochs 10000 --seed "$3" --out "$STUDY/$1/$2-$3"
}
make_row() { # make_row ROW SEED: train a row's student, measure it, and fine-tune its image tower
  local model
  model=$(last_stage "$1" "$2")
  once "$1-$2" train_row "$1" "$2" || return 255
  case $1 in
    untied | tied | multiplexed | distilled) return 0 ;; # classifiers, measured as they were trained
    catlip | tinymim) once "$1-$2-probe" tune probe "$1" "$2" || return 255 ;;
    *)
      once "$1-$2-eval" clipmill eval "$model" --data "$KINDS" "$TITLES" || return 255
      once "$1-$2-probe" clipmill eval "$model" --data "$KINDS" --task linear-probe || return 255
      ;;
  esac
  once "$1-$2-finetune" tune finetune "$1" "$2"
}
cost() { # cost ROW SEED: speeds, with nothing beside them
  local model
  model=$(last_stage "$1" "$2")
  clipmill eval "$model" --cost --cost-images 200 &&
    clipmill export "$model" --format onnx --int8 dynamic --to "$STUDY/onnx/$1" --overwrite &&
    clipmill eval "$STUDY/onnx/$1" --cost --cost-images 200 --output "$model/eval"
}
in_parallel() { xargs -P "$LANES" -I@ bash -c 'set -euo pipefail; eval "$SHARED"; @'; }
SHARED=$(
  declare -p RUN STUDY ROOT KINDS TITLES STEPS HALF TEACHER_STEPS TUNE_STEPS run views pairs titles measured student large \
    images tower affine masks shared plain labels
  declare -f once teacher cache_of_large last_stage row train_row tune make_row
)
export SHARED

once models python demo/study_all_inputs.py models "$RUN" "$STUDY"
once images python demo/study_all_inputs.py images "$RUN/web" "$STUDY/images"
once titles clipmill evalset "$TITLES" --images "$STUDY/images/heldout" --captions "$RUN/web/heldout.csv"
for split in test train; do
  once "kinds-$split" clipmill evalset "$KINDS" --classes "$STUDY/images/labelled/$split" --split $split
done
for name in large mobileclip classifier; do echo "once teacher-$name teacher $name"; done | in_parallel
once cache-large cache_of_large
for seed in $SEEDS; do
  for name in $ROWS; do echo "make_row $name $seed"; done
done | in_parallel
first=${SEEDS%% *} tables=()
for name in $ROWS; do once "$name-cost" cost "$name" "$first"; done
for folder in rows probe finetune; do # of those that there are
  for name in $ROWS; do
    for seed in $SEEDS; do [ ! -d "$STUDY/$folder/$name-$seed" ] || tables+=("$STUDY/$folder/$name-$seed"); done
  done
done
clipmill compare "${tables[@]}" --baseline "$STUDY/rows/scratch-$first" --output "$STUDY/methods.html" \
  --markdown "$STUDY/compare.md"
python demo/study_all.py "$STUDY" "$OUT" --teacher "$RUN/teacher" --rows $ROWS --seeds $SEEDS
