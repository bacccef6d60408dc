#!/usr/bin/env bash
# What one card makes of a checkpoint of any size, in under ten minutes, in bf16: the time and memory of a step beside
# PEFT's, what a whole fit would take, and the first rows of the study (those that are done by then).
#
#     bash experiments/real/gpu.sh CHECKPOINT SPEECH [OUTPUT]
#
# CHECKPOINT is a local folder, SPEECH what manifests.py writes. DEVICE=cpu, SECONDS_OF_ROWS=N, ROUNDS=N, and TOKEN=tr
# with the pocket, are for a trial without a card. What was done is not done again.
set -euo pipefail
base=$(realpath "$1") speech=$(realpath "$2") output=${3:-runs/gpu}
device=${DEVICE:-cuda} budget=${SECONDS_OF_ROWS:-330} token=${TOKEN:-tl}
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
mkdir -p "$output"
cd "$output"
ln -sfn "$base" whisper-base  # as the study calls it
ln -sfn "$speech" human-speech
sed "s/\"tl\"/\"$token\"/" "$here/study.toml" > study.toml  # its rows lie beside it

python "$here/../../benchmarks/steps.py" --base "$base" --device "$device" --precisions bf16 --batch-size 8 \
    --rounds "${ROUNDS:-4}" --contestants "PEFT LoRA;ours" --output "$PWD/steps.json"
blora-pyro fit --base whisper-base --data human-speech --keep 1 --prior base-informed --language-map qu=$token \
    --backward "$(for code in en es fr de; do printf '%s=human-speech/back-%s.jsonl,' $code $code; done | sed 's/,$//')" \
    --precision bf16 --device "$device" --estimate | tee estimate.txt
timeout --signal=INT "$budget" blora-pyro study study.toml --device "$device" || [ $? -eq 124 ]
blora-pyro study study.toml --device "$device" --report
