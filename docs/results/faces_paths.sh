#!/bin/sh
# Several paths on faces: paths.sh OUT
set -eu
out=$1
run="rfield sweep --data configs/data/faces_256x208.yaml --model largefov_vgg16 --weights ../shared/weights/vgg16_features_imagenet_fp16.pth --epochs 20 --val-every 20 --freeze-backbone --head-channels 128 --precision bf16-mixed --jobs 2 --seeds 0,1,2"
export OMP_NUM_THREADS=1
$run --search none --dilations 6 --aspp 6,12,18,24 --out "$out/aspp"
$run --search none --dilations 4 --paths 2 --out "$out/fixed-two"
$run --search sampled --dilations 4 --paths 2 --out "$out/unguided"
$run --search sampled --dilations 4 --paths 2 --class-groups auto --path-weight 5 --out "$out/guided"
$run --search sampled --dilations 4 --paths 2 --class-groups auto --path-weight 2 --path-guidance gradient --out "$out/published-2"
$run --search sampled --dilations 4 --paths 2 --class-groups auto --path-weight 5 --path-guidance gradient --out "$out/published-5"
