#!/usr/bin/env bash
# The searches behind experiments/README.md, in the order of their worth.
# What is finished is skipped, and what was stopped goes on, so it may be stopped and started at any time.
# A result.json of nasbench201 is a line of experiments/nasbench201.jsonl; what is there is not run again.
#
#   bash experiments/runs.sh nasbench201 DATA OUT      90 searches of 11 minutes of one core each
#   bash experiments/runs.sh small DATA OUT            38 searches, about six hours of one core
#
# DATA has train/CLASS/IMAGE; two searches at a time, one thread each. --dry_run only prints the commands.
set -u
usage='usage: bash experiments/runs.sh nasbench201|small DATA OUT [--dry_run]'
LIST=${1:?$usage}
export DATA=${2:?$usage} OUT=${3:?$usage} DRY=${4:-} OMP_NUM_THREADS=1 PYTHON=${PYTHON:-python}

all="--node_norm --larc --sqrt_beta"

nasbench201() {                                             # a line each: folder, program, flags
    program="experiments.nasbench201 --dataset folder --data $DATA --image_size 16 --limit 6400 --layers 3"
    program="$program --init_channels 8 --arch_learning_rate 2.35e-3"
    for seeds in "0 1 2 3 4" "5 6 7 8 9"; do                # five seeds of every row, then the others
        rows | while read -r row flags; do
            for seed in $seeds; do
                if ! grep -qs "\"method\": \"$row\", \"seed\": $seed," experiments/nasbench201.jsonl; then
                    echo "nb201-$row-$seed $program $flags --seed $seed"
                fi
            done
        done
    done
}

rows() {
    echo "darts_l2"
    echo "vs_darts_1 $all --larc_trust 1"
    echo "vs_darts_0.1 $all --larc_trust 0.1"
    echo "norm_sqrt --node_norm --sqrt_beta"
    echo "norm --node_norm"
    echo "vs_darts_0.3 $all --larc_trust 0.3"
    echo "darts --weight_decay 3e-4"
    echo "release $all --larc_clip --larc_trust 0.02"
    echo "norm_larc --node_norm --larc --larc_trust 1"
}

small="--dataset folder --data $DATA --image_size 16 --layers 3 --init_channels 8 --keep_nets"
s3="$small --space s3 --limit 6400 --epochs 50 --arch_learning_rate 2.35e-3"      # 2,500 steps
full="$small --space darts --limit 6400 --epochs 25 --arch_learning_rate 4.7e-3"  # 1,250 steps
s4="$small --space s4 --limit 1600 --epochs 100 --arch_learning_rate 4.5e-3"      # 1,300 steps

small() {
    for seed in 0 1 2 3 4; do
        echo "s3-darts_l2-$seed search.py $s3 --seed $seed"
        echo "s3-vs_darts-$seed search.py $s3 $all --seed $seed"
    done
    echo "full-darts_l2-0 search.py $full --seed 0"
    echo "full-vs_darts-0 search.py $full $all --seed 0"
    for seed in 0 1 2; do
        echo "s3-norm-$seed search.py $s3 --node_norm --seed $seed"
    done
    for seed in 0 1 2; do
        echo "s4-darts-$seed search.py $s4 --weight_decay 3e-4 --seed $seed"
        echo "s4-vs_darts-$seed search.py $s4 $all --seed $seed"
    done
    for seed in 0 1 2; do
        echo "s3-vs_darts_trust_0.1-$seed search.py $s3 $all --larc_trust 0.1 --seed $seed"
        echo "s3-norm_sqrt-$seed search.py $s3 --node_norm --sqrt_beta --seed $seed"
        echo "s3-norm_larc-$seed search.py $s3 --node_norm --larc --seed $seed"
    done
    echo "full-darts_l2-1 search.py $full --seed 1"
    echo "full-vs_darts-1 search.py $full $all --seed 1"
    for seed in 0 1 2; do
        echo "s4-darts_l2-$seed search.py $s4 --seed $seed"
        echo "s4-es-$seed experiments.baselines es $s4 --seed $seed"
    done
}

one() {
    name=$1 program=$2
    shift 2
    case $program in
        search.py) command="$PYTHON search.py" ;;
        experiments.baselines) command="$PYTHON -m $program $1"; shift ;;
        *) command="$PYTHON -m $program" ;;
    esac
    if [ -e "$OUT/$name/genotype.json" ] || [ -e "$OUT/$name/result.json" ]; then return; fi
    if [ -e "$OUT/$name/config.json" ]; then flags="--resume $OUT/$name"; else flags="$* --out $OUT/$name"; fi
    if [ -n "$DRY" ]; then echo "$command $flags"; return; fi
    mkdir -p "$OUT"
    nice -n 19 $command $flags >> "$OUT/$name.txt" 2>&1 || echo "$name ended with status $?: see $OUT/$name.txt"
}
export -f one
if [ -n "$DRY" ]; then JOBS=1; fi                           # the commands in their order
"$LIST" | xargs -P "${JOBS:-2}" -L 1 bash -c 'one "$@"' one
