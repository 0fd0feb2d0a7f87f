#!/bin/sh
# Several machines: start this on every one of them, with the same NODES, HEAD and command.
#   NODES=4 HEAD=node0:29500 examples/launch/multi_node_torchrun.sh train-mllm --config qwen2.5-7b \
#     --output /shared/runs/mllm --loop.precision bf16 --loop.shard true --loop.gradient_checkpointing true \
#     --loop.accumulate 2
# HEAD: name of one machine, and a free port on it. --output must be a folder that all machines see.
set -e
: "${NODES:?how many machines}" "${HEAD:?host:port of one of them}"
exec torchrun --nnodes "$NODES" --nproc-per-node "${PROCESSES:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN:-dualtoken}" --shutdown-timeout 300 \
  --no-python dualtoken "$@"
