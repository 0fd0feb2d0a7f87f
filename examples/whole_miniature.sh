#!/bin/sh
# The whole miniature from shards of pictures on several processes: image-text encoder, tokenizer, codes of all shards,
# the language model's four stages on shards of codes.
#   PROCESSES=2 OUT=runs/whole examples/whole_miniature.sh
# SHORT=1 trains a few steps of everything, to see that all of it runs (minutes); without it a day on two cores, and what
# comes out knows captions and drawings alone: questions and edits are no part of shards of codes.
# Stopped at any moment, the same command goes on.
set -e
out=${OUT:-runs/whole} processes=${PROCESSES:-2}
here=$(dirname "$0")
on_all() {
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} torchrun --standalone --nproc-per-node "$processes" --shutdown-timeout 300 \
    --no-python dualtoken "$@"
}
if [ -n "$SHORT" ]; then
  images=400 encoder="--steps 20 --grow_stem 0" tokenizer='--phases [{"steps":4,"trains":["pixel","semantic","decoder"]},{"steps":16}]'
  mllm=$out/short.yaml
  mkdir -p "$out"
  sed 's/ steps: .*/ steps: 6/; s/save_every: [0-9]*/save_every: 3/; s/log_every: [0-9]*/log_every: 1/' \
    "$here/whole_miniature.yaml" > "$mllm"
else
  images=40000 encoder="" tokenizer="" mllm=$here/whole_miniature.yaml
fi
dualtoken data scenes "$out/shards" --images "$images" --shard_size 100
# shellcheck disable=SC2086 (options are words of their own)
on_all train-encoder --config mini-encoder --output "$out/encoder" --data.source "$out/shards/*.tar" $encoder
# shellcheck disable=SC2086
on_all train-tokenizer --config mini-tokenizer --encoder "$out/encoder/model" --output "$out/tokenizer" \
  --data.source "$out/shards/*.tar" $tokenizer
on_all encode "$out/shards" --model "$out/tokenizer/model" --out "$out/codes"
on_all train-mllm --config "$mllm" --vision_tokenizer "$out/tokenizer/model" --output "$out/mllm" \
  --data.sources "[{\"format\": \"codes\", \"path\": \"$out/codes\", \"task\": \"caption\", \"name\": \"caption\"},
                   {\"format\": \"codes\", \"path\": \"$out/codes\", \"task\": \"text_to_image\", \"name\": \"text_to_image\"}]"
dualtoken draw "a red star" --model "$out/mllm/stage-4-2/model" --out "$out/drawings"
