#!/bin/sh
# Why the local gradient fails, on MSRC-21: the exact gradient trained in six ways from a dilation of 14, then the loss
# and its slopes around that start.   studies/local_gradient/local_gradient.sh OUT
set -eu
out=$1
run="rfield train --data configs/data/msrc21.yaml --model largefov_vgg16 --weights ../shared/weights/vgg16_features_imagenet_fp16.pth --freeze-backbone --head-channels 128 --epochs 10 --val-every 10 --precision bf16-mixed --seed 0"
export OMP_NUM_THREADS=1
once() { # once NAME FLAGS...
    folder=$out/$1
    shift
    [ -f "$folder/metrics.json" ] || $run --resume --out "$folder" "$@" > "$folder.log" 2>&1
}
mkdir -p "$out"
once fixed-14 --search none --dilation 14 &
once shared --search sampled --dilation 14 --no-search-narrowing --search-share 1
wait
[ -f "$out/local_gradient.png" ] || python "$(dirname "$0")/local_gradient.py" "$out/fixed-14" "$out/shared" --out "$out"
once plain --search gradient --dilation 14 &
once off-one --search gradient --dilation 7 --factor 0.5
wait
once fast-factor --search gradient --dilation 14 --factor-lr 0.1 &
once slow-weights --search gradient --dilation 14 --lr 0.00001
wait
once taps --search gradient --dilation 14 --mechanism dilation &
once image-loss --search gradient --dilation 14 --loss-resolution image
wait
