#!/bin/sh
# Several paths, three seeds each, in one of two settings.   studies/paths/paths.sh faces|msrc21 OUT
# Run it where configs/ is. Two runs at a time, one thread each. It can be stopped and called again.
set -eu
setting=$1 out=$2/$1
vgg16="--model largefov_vgg16 --weights ../shared/weights/vgg16_features_imagenet_fp16.pth"
case $setting in
faces) what="--data configs/data/faces_256x208.yaml $vgg16 --epochs 20 --val-every 20" best=3 ;;
msrc21) what="--data configs/data/msrc21.yaml $vgg16 --epochs 10 --val-every 10" best=6 ;;
*) echo "unknown setting $setting" >&2; exit 2 ;;
esac
run="rfield sweep $what --freeze-backbone --precision bf16-mixed --jobs 2 --seeds 0,1,2 --dilations $best"
narrow="$run --head-channels 128"
groups="--paths 2 --class-groups auto"
export OMP_NUM_THREADS=1
$narrow --search none --out "$out/fixed"
$narrow --search sampled --out "$out/learned"
$run --head-channels 256 --search sampled --out "$out/learned-wide"
$narrow --search none --aspp 6,12,18,24 --out "$out/aspp"
# The paths' batch norm wants larger steps (their default is 0.001); what these do to heads without one:
$narrow --search sampled --lr 0.0003 --out "$out/learned-fast"
$narrow --search none --aspp 6,12,18,24 --lr 0.0003 --out "$out/aspp-fast"
$narrow --search none --paths 2 --out "$out/fixed-two"
$narrow --search sampled --paths 2 --out "$out/unguided"
$narrow --search sampled $groups --path-weight 5 --out "$out/guided"
$narrow --search sampled $groups --path-weight 2 --path-guidance gradient --out "$out/published-2"
$narrow --search sampled $groups --path-weight 5 --path-guidance gradient --out "$out/published-5"
