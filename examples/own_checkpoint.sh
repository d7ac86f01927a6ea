#!/bin/sh
# Exports a checkpoint and serves it: sh own_checkpoint.sh SOURCE [BUNDLE]
#
# SOURCE is a model on the Hugging Face hub (hf:google/vit-base-patch16-224), a timm model
# (timm:vit_small_patch16_224.augreg_in21k_ft_in1k), or the path of a checkpoint.
# The export needs torch: pip install "vitserve[export]"
set -eu
source=$1
bundle=${2:-bundle}

# The export compares every engine with the original network, and fails if the outputs differ.
[ -e "$bundle" ] || vitserve export "$source" --output "$bundle"

# Shows the classes, the engines and the measured differences.
vitserve inspect "$bundle"

# Every option of `vitserve serve` is also an environment variable, for example VITSERVE_PORT.
exec vitserve serve "$bundle"
