"""Merges of two synthetic bf16 checkpoints: time, peak memory, and how both grow.

    python scripts/bench/merge.py [--mergekit PATH/TO/mergekit-yaml] [--runs 3] [--folder DIR]
                                  [--methods linear ties] [--sizes "0.5 GB" "2.2 GB" "4.4 GB"]

Llama shapes in 0.5, 2.2 and 4.4 GB (2.2 GB is 1.1B parameters), three shards each. In turn, each
a process of its own, page cache warm: fishertool, which hashes all that it reads and writes;
fishertool again, which remembers the digests of its inputs from a run before; mergekit at 2.2 GB
(if its command is given: it wants an environment of its own); and the floor, reading both inputs
and writing a copy of one with fsync. All read the same recipe; ties has a base. Agreement with
mergekit is checked on the outputs. Then a mixture of experts of 20,000 small tensors: how long its
plan takes, and the merge.
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


def llama_shapes(layers: int) -> dict[str, tuple[int, ...]]:
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
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_checkpoint(folder: Path, layers: int, seed: int) -> None:
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
    write_random(folder, llama_shapes(layers), config, seed)


def make_experts(folder: Path, seed: int) -> None:
    """Mixtral's names: 52 layers of 128 experts with three matrices each, 64 wide."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, 64)}
    for layer in range(52):
        name = f"model.layers.{layer}.block_sparse_moe"
        for expert in range(128):
            for matrix in ("w1", "w2", "w3"):
                shapes[f"{name}.experts.{expert}.{matrix}.weight"] = (64, 64)
        shapes[f"{name}.gate.weight"] = (128, 64)
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 256}
    write_random(folder, shapes, config, seed)


def write_random(
    folder: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, object], seed: int
) -> None:
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


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """The largest, and the share above one, in units of one bf16 rounding of the larger value."""
    worst, above, total = 0.0, 0, 0
    with open_checkpoint(ours) as first, open_checkpoint(theirs) as second:
        assert set(first) == set(second)
        for name in first:
            x, y = first[name].float(), second[name].float()
            unit = torch.maximum(x.abs(), y.abs()).clamp_(min=1e-30) * 2**-7
            steps = (x - y).abs() / unit
            worst = max(worst, float(steps.max()))
            above, total = above + int((steps > 1).sum()), total + steps.numel()
    return {"largest": round(worst, 3), "share_above_one": above / total}


def write_recipe(path: Path, method: str, models: list[Path], base: Path) -> None:
    lines = [f"merge_method: {method}", "dtype: bfloat16", "models:"]
    for weight, model in zip((0.6, 0.4), models, strict=True):
        density = ", density: 0.5" if method == "ties" else ""
        lines.append(f"  - {{model: {model}, parameters: {{weight: {weight}{density}}}}}")
    if method == "ties":
        lines.append(f"base_model: {base}")
    path.write_text("\n".join(lines) + "\n")


def measure(work: Path, method: str, mergekit: Path | None, runs: int) -> dict[str, object]:
    """Seconds, peak memory and ratios of each contestant, on the checkpoints in the folder."""
    models, base = [work / "first", work / "second"], work / "base"
    recipe = work / "recipe.yml"
    write_recipe(recipe, method, models, base)
    outs = {name: work / name for name in ("fishertool", "again", "mergekit", "floor")}
    ours = [sys.executable, "-m", "fishertool", "merge", "--config", str(recipe), "--out"]
    again = ["env", f"FISHERTOOL_CACHE={work}", *ours, str(outs["again"])]
    run(again)
    commands = {
        "fishertool": ["env", "FISHERTOOL_CACHE=", *ours, str(outs["fishertool"])],
        "again": again,
        "floor": [sys.executable, "-c", FLOOR, *map(str, (*models, outs["floor"]))],
    }
    if mergekit:
        commands["mergekit"] = [str(mergekit), str(recipe), str(outs["mergekit"])]
    figures: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            os.sync()
            figures[name].append(run(command))
    own = figures["fishertool"]
    result: dict[str, object] = {
        name: {
            "seconds": [round(seconds, 1) for seconds, _ in rows],
            "peak_rss_mb": round(max(peak for _, peak in rows) / 1e6),
            "ratio_to_fishertool": round(
                statistics.median(row[0] / mine[0] for row, mine in zip(rows, own, strict=True)), 2
            ),
        }
        for name, rows in figures.items()
    }
    if mergekit:
        result["difference_in_bf16_roundings"] = differences(outs["fishertool"], outs["mergekit"])
    for folder in outs.values():
        shutil.rmtree(folder, ignore_errors=True)
    return result


def measure_experts(work: Path) -> dict[str, object]:
    """A mixture of experts of 20,000 tensors: time to plan, and to merge."""
    models = [work / "moe-a", work / "moe-b"]
    for seed, model in enumerate(models):
        make_experts(model, seed)
    command = ["env", "FISHERTOOL_CACHE=", sys.executable, "-m", "fishertool", "merge"]
    command += [*map(str, models), "--out", str(work / "moe-out")]
    planned, merged = run([*command, "--dry-run", "-q"]), run([*command, "-q"])
    return {
        "plan_seconds": round(planned[0], 1),
        "merge_seconds": round(merged[0], 1),
        "peak_rss_mb": round(merged[1] / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work [default: a temporary folder]")
    parser.add_argument("--sizes", nargs="*", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--methods", nargs="+", choices=["linear", "ties"], default=["linear"])
    options = parser.parse_args()
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        work = Path(temporary)
        result["20,000 tensors"] = measure_experts(work)
        for size in options.sizes:
            folders = [work / name for name in ("base", "first", "second")]
            for seed, folder in enumerate(folders):
                make_checkpoint(folder, LAYERS[size], seed)
            mergekit = options.mergekit if size == "2.2 GB" else None
            for method in options.methods:
                result[f"{method}, {size}"] = measure(work, method, mergekit, options.runs)
            for folder in folders:
                shutil.rmtree(folder)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
