"""Linear merge of two synthetic bf16 checkpoints: time, peak memory, and how both grow.

    python scripts/bench/merge.py [--mergekit PATH/TO/mergekit-yaml] [--runs 3] [--folder DIR]

Llama shapes in 0.5, 2.2 and 4.4 GB (2.2 GB is 1.1B parameters), three shards each. In turn, each
a process of its own, page cache warm: fishertool; mergekit at 2.2 GB (if its command is given: it
wants an environment of its own); and the floor, reading both inputs and writing a copy of one
with fsync. Agreement with mergekit is checked on the outputs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import lay_out
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.checkpoint.stream import pieces
from fishertool.checkpoint.writer import CheckpointWriter

LAYERS = {"0.5 GB": 3, "2.2 GB": 22, "4.4 GB": 47}
HIDDEN, INTERMEDIATE, VOCABULARY, KV = 2048, 5632, 32_000, 256
BLOCK = 1 << 22
LAUNCHER = """
import os, sys, time
# A small parent: a child's peak counts what it shared with its parent before exec.
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print()
print(time.perf_counter() - start, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
FLOOR = """
import os, shutil, sys
first, second, out = sys.argv[1:]
buffer = bytearray(8 << 20)
for name in os.listdir(second):
    with open(os.path.join(second, name), "rb") as file:
        while file.readinto(buffer): pass
os.mkdir(out)
for name in os.listdir(first):
    with open(os.path.join(first, name), "rb") as file, open(os.path.join(out, name), "wb") as copy:
        while count := file.readinto(buffer): copy.write(memoryview(buffer)[:count])
        copy.flush(); os.fsync(copy.fileno())
"""


def make_checkpoint(folder: Path, layers: int, seed: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        block: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KV, HIDDEN),
            "self_attn.v_proj": (KV, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    tensors = [TensorInfo(name, "BF16", shape) for name, shape in shapes.items()]
    total = sum(tensor.nbytes for tensor in tensors)
    generator = torch.Generator().manual_seed(seed)
    block_values = (torch.randn(BLOCK + 8192, generator=generator) * 0.02).bfloat16()
    folder.mkdir()
    with CheckpointWriter(folder, lay_out(tensors, total // 3 + (200 << 20))) as writer:
        for number, piece in enumerate(pieces(tensors, BLOCK)):
            start = number * 13 % 8192
            values = block_values[start : start + piece.elements]
            writer.write(piece.name, values, piece.start)
        writer.finish()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak RSS in bytes of a command."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    seconds, kilobytes = done.stdout.splitlines()[-1].split()
    return float(seconds), int(kilobytes) * 1024


def largest_difference(ours: Path, theirs: Path) -> float:
    """In units of one bf16 rounding (2 ** -8 of the larger value)."""
    worst = 0.0
    with open_checkpoint(ours) as first, open_checkpoint(theirs) as second:
        assert set(first) == set(second)
        for name in first:
            x, y = first[name].float(), second[name].float()
            unit = torch.maximum(x.abs(), y.abs()).clamp_(min=1e-30) * 2**-7
            worst = max(worst, float(((x - y).abs() / unit).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work [default: a temporary folder]")
    parser.add_argument("--sizes", nargs="+", choices=LAYERS, default=list(LAYERS))
    options = parser.parse_args()
    result: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        work = Path(temporary)
        for size, layers in ((size, LAYERS[size]) for size in options.sizes):
            first, second = work / "first", work / "second"
            make_checkpoint(first, layers, 1)
            make_checkpoint(second, layers, 2)
            outs = {name: work / name for name in ("fishertool", "mergekit", "floor")}
            recipe = work / "recipe.yml"
            recipe.write_text(
                "merge_method: linear\ndtype: bfloat16\nmodels:\n"
                f"  - {{model: {first}, parameters: {{weight: 0.6}}}}\n"
                f"  - {{model: {second}, parameters: {{weight: 0.4}}}}\n"
            )
            ours = [sys.executable, "-m", "fishertool", "merge", str(first), str(second)]
            commands = {
                "fishertool": [*ours, "--weights", "0.6,0.4", "--out", str(outs["fishertool"])],
                "floor": [sys.executable, "-c", FLOOR, *map(str, (first, second, outs["floor"]))],
            }
            if options.mergekit and size == "2.2 GB":
                commands["mergekit"] = [str(options.mergekit), str(recipe), str(outs["mergekit"])]
            figures: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
            for _ in range(options.runs):
                for name, command in commands.items():
                    shutil.rmtree(outs[name], ignore_errors=True)
                    os.sync()
                    figures[name].append(run(command))
            result[size] = {
                name: {
                    "seconds": [round(seconds, 1) for seconds, _ in rows],
                    "peak_rss_mb": round(max(peak for _, peak in rows) / 1e6),
                    "ratio_to_fishertool": round(
                        statistics.median(
                            row[0] / own[0]
                            for row, own in zip(rows, figures["fishertool"], strict=True)
                        ),
                        2,
                    ),
                }
                for name, rows in figures.items()
            }
            if "mergekit" in commands:
                result[size]["largest_difference_in_bf16_roundings"] = round(
                    largest_difference(outs["fishertool"], outs["mergekit"]), 3
                )
            for folder in (first, second, *outs.values()):
                shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
