#!/usr/bin/env bash
# The paper's 2-way scaling on two GPUs of one host, in under nine minutes; JSON and logs go to $OUT.
#
#   OUT=out/two_gpus bash benchmarks/two_gpus.sh
#
# PEERS=path/to/script measures other implementations beside this one: `script VARIANT SIZE compile` under torchrun
# prints a line RESULT {json}. DEVICE=cpu runs all of it small, over gloo, to try the script itself.
set -u
export PYTHONUNBUFFERED=1 PYTHONPATH="${PYTHONPATH:-}:$PWD" OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# NVLink multicast stays off; torchrun hands these to the ranks.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} TORCH_SYMM_MEM_DISABLE_MULTICAST=${TORCH_SYMM_MEM_DISABLE_MULTICAST:-1}
: "${OUT:?name a directory}"
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
SMALL=() TSMALL=() BATCH=8 SEQUENCE=1024 COMPILE=layers TIMED=15 STEPS=300
if [ "$DEVICE" = cpu ]; then
  SMALL=(--set layers=2 --set hidden=64 --set heads=4 --set vocab=300) BATCH=2 SEQUENCE=64 COMPILE=none TIMED=2 STEPS=6
fi
port=29600
ranks() { port=$((port + 1)); timeout "$1" "$PYTHON" -m torch.distributed.run --nproc-per-node "$2" --master-addr 127.0.0.1 --master-port $port "${@:3}"; }
note() { printf '%4ss  %s\n' "$SECONDS" "$*"; }

speed() { # name, ranks, spec
  note "speed: $1"
  ranks 100 "$2" benchmarks/train_gpu.py --spec "$3" --tensor "$2" --dropout 0 --compile $COMPILE --steps $TIMED \
    --batch $BATCH --sequence $SEQUENCE --device $DEVICE "${SMALL[@]}" 2>"$OUT/$1.err" | tee -a "$OUT/speed.jsonl" | cut -c1-400
}
peer() { # variant, size, ranks
  [ -n "${PEERS:-}" ] || return 0
  note "peer: $1 $2 on $3"
  ranks 100 "$3" "$PEERS" "$1" "$2" compile 2>"$OUT/peer-$1-$2-$3.err" | grep RESULT | tee -a "$OUT/peers.txt"
}
later() { [ $SECONDS -gt 460 ] && note "no time left for: $*" || "$@"; } # each takes up to 40 s; 540 s are the limit
train() { # run, ranks, steps
  note "train: $1 to step $3 on $2"
  timeout 110 "$PYTHON" -m tpcompiler.cli.main train models/gpt2.py --spec specs/gpt2-355m.yaml --tensor "$2" --nproc "$2" \
    --steps "$3" -t batch=$BATCH -t micro_batch=$BATCH -t sequence=$SEQUENCE -t compile=$COMPILE -t schedule.warmup=$((STEPS / 6)) \
    -t optimizer.lr=3e-4 -t evaluation.every=0 -t checkpoints.every=0 -t logging.tensorboard=false --device $DEVICE \
    "${SMALL[@]}" -o "$1" >"$OUT/train-$2-$3.log" 2>&1 || tail -3 "$OUT/train-$2-$3.log"
}

[ "$DEVICE" = cpu ] || { note nccl; ranks 60 2 benchmarks/nccl.py 2>"$OUT/nccl.err" | tee "$OUT/nccl.json"; }
speed 1.2B-1 1 specs/gpt2-1.2b.yaml
speed 2.5B-2 2 specs/gpt2-2.5b.yaml
peer hand 2.5B 2
peer dtensor 2.5B 2
speed 2.5B-2 2 specs/gpt2-2.5b.yaml # again: one machine differs from minute to minute
peer dtensor_sp 2.5B 2
speed 1.2B-2 2 specs/gpt2-1.2b.yaml
peer hand 1.2B 2
peer mcore 2.5B 2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
train "$work/one" 1 $STEPS
train "$work/two" 2 $STEPS
cp "$work/one/log.jsonl" "$OUT/curve-1.jsonl"; cp "$work/two/log.jsonl" "$OUT/curve-2.jsonl"
train "$work/two" 1 $((STEPS + 20)) # the checkpoint of two ranks goes on, on one
cp "$work/two/log.jsonl" "$OUT/curve-2-then-1.jsonl"

note "verify over processes"
for model in gpt2 llama bert encoder seq2seq; do
  timeout 120 "$PYTHON" -m tpcompiler.cli.main verify models/$model.py --spec specs/2way.yaml --distributed --json \
    >"$OUT/verify-$model.json" 2>"$OUT/verify-$model.err" &
done
wait
for model in gpt2 llama bert encoder seq2seq; do
  "$PYTHON" - "$model" "$OUT/verify-$model.json" <<'P'
import json, pathlib, sys
text = pathlib.Path(sys.argv[2]).read_text()
found = json.loads(text) if text else {"error": "nothing was printed"}
print(sys.argv[1], found.get("passed"), found.get("max_rel_error"), [c["what"] for c in found.get("cases", [])][-1:], found.get("error", ""))
P
done
later peer plain 1.2B 1
later speed 1.2B-1 1 specs/gpt2-1.2b.yaml
later peer hand 2.5B 2
note done
