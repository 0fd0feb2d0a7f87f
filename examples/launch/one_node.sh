#!/bin/sh
# All GPUs of one machine, a copy of the model on each (DDP).
#   examples/launch/one_node.sh train-mllm --config qwen2.5-3b --output runs/mllm --loop.precision bf16
# PROCESSES says how many, where it is not one for each GPU; on a machine without GPUs they talk by gloo.
set -e
exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" --shutdown-timeout 300 \
  --no-python dualtoken "$@"
