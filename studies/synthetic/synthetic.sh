#!/bin/sh
# The synthetic set, whose cues lie at a known distance: the grid, and the searches from 4 and from 24.
#   studies/synthetic/synthetic.sh OUT
set -eu
out=$1
run="rfield sweep --data synthetic --model small_cnn --head-channels 32 --dropout 0 --epochs 15 --batch-size 8 --optimizer adamw --lr 0.003 --head-lr-scale 1 --crop-size 129 --scale-range 1,1 --no-flip --colour-jitter 0 --workers 0 --seeds 0,1,2 --jobs 1 --out $out"
export OMP_NUM_THREADS=1
$run --search none --dilations 9,10,11,12,13,14
$run --search sampled --dilations 4,24
$run --search spsa --dilations 4,24
