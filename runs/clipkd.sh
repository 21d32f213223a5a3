#!/usr/bin/env bash
# CLIP-KD (Yang et al., arXiv 2307.12732) from two lists to its number: a ViT-T/16 on CC3M + CC12M, alone and taught by
# the ViT-B/16 of LAION-400M. Published ImageNet zero-shot accuracies: 30.6 and 42.6, the teacher 67.1.
#
#   CC3M=Train_GCC-training.tsv CC12M=cc12m.tsv IMAGENET=/data/imagenet/val bash runs/clipkd.sh
#   WHERE=slurm NODES=1 GPUS=8 CC3M=... CC12M=... IMAGENET=... bash runs/clipkd.sh
#
# It stops at the first failure. Run the same line again: finished shards, caches and steps are kept. What it costs,
# what differs from the paper and what to look at after an hour: docs/recipes/clipkd.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

# Data: both lists as they are published (CC3M: caption, tab, URL; CC12M: URL, tab, caption), and ImageNet's validation
# images in folders named by WNID.
CC3M=${CC3M:?give the list of CC3M: Train_GCC-training.tsv}
CC12M=${CC12M:?give the list of CC12M: cc12m.tsv}
IMAGENET=${IMAGENET:?give the folder of the validation images of ImageNet, a folder per WNID in it}
ROOT=${ROOT:-/data/cc3m-cc12m}      # the dataset that is made, about 1 TB
EVAL=${EVAL:-/data/eval/imagenet}   # the evaluation set that is made of IMAGENET
OUT=${OUT:-runs/clipkd}             # the runs
# Where: this machine with GPUS GPUs, or Slurm with a GPU per task of an array and NODES x GPUS for the trainings.
WHERE=${WHERE:-here}                # here or slurm
GPUS=${GPUS:-1} NODES=${NODES:-1} ARRAY=${ARRAY:-32} TIME=${TIME:-1-00:00:00}
DOWNLOADERS=${DOWNLOADERS:-8}       # tasks of ingest, each of which reads both lists
ON_GPU=${ON_GPU:-}                  # before `clipmill eval` where this machine has no GPU, such as "srun --gpus=1"
# The setting of CLIP-KD
TEACHER=${TEACHER:-ViT-B-16} TEACHER_WEIGHTS=${TEACHER_WEIGHTS-laion400m_e32}
STUDENT=${STUDENT:-local-dir:$here/ViT-T-16}
EPOCHS=${EPOCHS:-32} BATCH=${BATCH:-1024} WARMUP=${WARMUP:-10000}
VIEWS=${VIEWS:-4}                   # crops per image; CLIP-KD draws a new one in each epoch
SEED=${SEED:-0}
# More options of these commands, such as INGEST_OPTIONS="--allow-private"
INGEST_OPTIONS=${INGEST_OPTIONS:-} CACHE_OPTIONS=${CACHE_OPTIONS:-} TRAIN_OPTIONS=${TRAIN_OPTIONS:-}

say() { printf '\n[%(%F %T)T] %s\n' -1 "$*"; }
stage() { # stage TASKS GPUS COMMAND ROOT OPTION...: a stage, on Slurm as an array of so many tasks with so many GPUs
  local array=(--array "$1") gpus=(--gpus-per-node "$2")
  [ "$2" -gt 0 ] || gpus=()
  shift 2
  say "clipmill $*"
  case $WHERE in
    here) clipmill "$@" ;;
    slurm) clipmill submit "$@" "${array[@]}" "${gpus[@]}" --time "$TIME" --wait ;;
  esac
}
train() { # train RECIPE OPTION...: a training on all GPUs
  say "clipmill train $*"
  case $WHERE in
    here) if [ "$GPUS" -gt 1 ]; then torchrun --nproc_per_node "$GPUS" -m clipmill train "$@"; else clipmill train "$@"; fi ;;
    slurm) clipmill submit train "$@" --nodes "$NODES" --gpus-per-node "$GPUS" --time "$TIME" --wait ;;
  esac
}
refuse() { # refuse MESSAGE
  echo "clipkd.sh: $1" >&2
  exit 2
}
[ "$WHERE" = here ] || [ "$WHERE" = slurm ] || refuse "WHERE=$WHERE: here or slurm"
for list in "$CC3M" "$CC12M"; do [ -f "$list" ] || refuse "$list is no file: give the list as it was published"; done
[ -d "$IMAGENET" ] || refuse "IMAGENET=$IMAGENET is no folder: give the one with a folder per WNID"
read -ra ingest_options <<<"$INGEST_OPTIONS"
read -ra cache_options <<<"$CACHE_OPTIONS"
read -ra train_options <<<"$TRAIN_OPTIONS"
weights=() teacher=${TEACHER#local-dir:}
[ -z "$TEACHER_WEIGHTS" ] || { weights=(--pretrained "$TEACHER_WEIGHTS"); teacher=$TEACHER:$TEACHER_WEIGHTS; }

# 1. The evaluation set, and the teacher on it: 67.1 says that folders, names and prompts are right
say "clipmill evalset, and the teacher on it"
clipmill evalset "$EVAL" --classes "$IMAGENET"
$ON_GPU clipmill eval "$teacher" --data "$EVAL" --output "$OUT/teacher"

# 2. One list of both corpora, in the order of CC12M's columns, becomes shards with their original captions
mkdir -p "$ROOT.lists"
[ -s "$ROOT.lists/cc3m.tsv" ] || {
  gzip -cdf "$CC3M" | awk -F '\t' -v OFS='\t' '{ print $2, $1 }' >"$ROOT.lists/cc3m.part" # gzip passes plain text on
  mv "$ROOT.lists/cc3m.part" "$ROOT.lists/cc3m.tsv"
}
stage "$DOWNLOADERS" 0 ingest "$ROOT" --source "$ROOT.lists/cc3m.tsv" "$CC12M" --format cc12m --shard-size 10000 \
  "${ingest_options[@]}"
stage "$ARRAY" 0 pack "$ROOT" --captioner none --download-wordnet

# 3. The teacher's embeddings of VIEWS crops of each image and of its caption
stage "$ARRAY" 1 cache "$ROOT" --model "$TEACHER" "${weights[@]}" --name clipkd-teacher --views "$VIEWS" \
  --scale 0.9 1 --flip 0 "${cache_options[@]}"

# 4. The student alone, then with CLIP-KD's losses: CLIP's + 2000 FD + CRD + ICL. The optimizer is CLIP-KD's for ViTs.
common=(--data "$ROOT" --model "$STUDENT" --batch-size "$BATCH" --lr 1e-3 --weight-decay 0.1 --beta2 0.98 --eps 1e-6
  --warmup "$WARMUP" --epochs "$EPOCHS" --seed "$SEED" --captions original --eval-data "$EVAL" "${train_options[@]}")
train clip "${common[@]}" --scale 0.9 1 --flip 0 --out "$OUT/scratch"
train siclip "${common[@]}" --no-inherit --teacher-from cache --teacher clipkd-teacher \
  --fd-weight 2000 --crd-weight 1 --icl-weight 1 --icl-raw-scale --pm-weight 0 --out "$OUT/distilled"

# 5. The numbers: acc1 of both, published as 30.6 and 42.6
say "clipmill eval"
$ON_GPU clipmill eval "$OUT/scratch" "$OUT/distilled" --data "$EVAL"
clipmill compare "$OUT/scratch" "$OUT/distilled" --output "$OUT/compare.html"
