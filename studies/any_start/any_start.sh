#!/bin/sh
# From any start: the grid of fixed dilations, and every search from four starts, in one of three settings.
#   studies/any_start/any_start.sh msrc21|camvid|faces OUT [SEEDS]
# Run it where configs/ is; OUT gets the run folders. Two runs at a time, one thread each. It can be stopped and called
# again. SEEDS are those of the local searches, 0,1,2 unless given.
set -eu
setting=$1 out=$2 seeds=${3:-0,1,2}
vgg16="--model largefov_vgg16 --weights ../shared/weights/vgg16_features_imagenet_fp16.pth"
case $setting in
msrc21) # maps of 41 x 41
    what="--data configs/data/msrc21.yaml $vgg16 --epochs 10 --val-every 10"
    each="0 1 2" starts="1 2 10 20" grid=1,2,3,4,5,6,8,10,14,20 again="4,5,6,20" best=5 ;;
camvid) # maps of 46 x 61
    what="--data configs/data/camvid.yaml --model efficientnet_lite0 --weights imagenet --output-stride 8 --epochs 12 --val-every 12"
    each=0 starts="1 2 11 23" grid=1,2,3,4,5,6,8,11,16,23 again="2,3,4,23" best=3 ;;
faces) # maps of 33 x 27
    what="--data configs/data/faces_256x208.yaml $vgg16 --epochs 20 --val-every 20"
    each=0 starts="1 2 8 16" grid=1,2,3,4,5,6,7,8,12,16 again="2,3,4,5,16" best=3 ;;
*) echo "unknown setting $setting" >&2; exit 2 ;;
esac
run="rfield sweep $what --freeze-backbone --head-channels 128 --precision bf16-mixed --jobs 2 --out $out/$setting"
export OMP_NUM_THREADS=1
$run --search none --dilations $grid --seeds 0
# Where a sampled search starts changes nothing for one seed (a test), so every start has seeds of its own.
seed=0
for start in $starts; do
    seeds_here=
    for _ in $each; do
        seeds_here=${seeds_here:+$seeds_here,}$seed
        seed=$((seed + 1))
    done
    $run --search sampled --dilations "$start" --seeds "$seeds_here"
done
$run --search none --dilations "$again" --seeds 1,2
# The best of the grid once more, on fresh seeds: the best of several looks better than it is.
[ -z "$best" ] || $run --search none --dilations "$best" --seeds 3,4,5
for search in spsa gradient; do
    $run --search $search --dilations "$(echo "$starts" | tr ' ' ,)" --seeds "$seeds"
done
