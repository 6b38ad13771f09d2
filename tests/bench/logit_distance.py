#!/usr/bin/python3
"""How far a backend's logits are from the float64 oracle's, for every type of weights and every family: a table.

    logit_distance.py [--backend cuda] [--worker PROGRAM] [--peer PROGRAM] [CASE ...]      (CASE: llama/q4_k, qwen2/f16)

Each model is small and random. The distance is |logits - oracle| / |oracle|, Euclidean norms over all positions. A
peer is another engine beside ours, on the same files: a program called with a model, ids (1,2,3) and a file, where it
writes the logits of every position as raw little-endian float32, as strata-worker's --save does.
"""
import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

SOURCE = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(SOURCE / "tests/tools"))

import numpy as np  # noqa: E402
import models  # noqa: E402
import reference  # noqa: E402

TYPES = ["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_k_m"]
CASES = [f"llama/{mix}" for mix in TYPES] + [f"{family}/{mix}" for family in ("qwen2", "qwen3", "phi3", "gpt2")
                                             for mix in ("f16", "q4_0", "q8_0", "q4_k")]
TOKENS = [(i * i * 31 + 7 * i + 3) % 1024 for i in range(96)]


def distance(command, oracle):
    """Of what the command, to which a file's name is added, writes there."""
    with tempfile.NamedTemporaryFile() as file:
        ran = subprocess.run([*command, file.name], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if ran.returncode:
            sys.exit(f"{' '.join(map(str, command))}: {ran.stderr.strip() or ran.returncode}")
        logits = np.fromfile(file.name, "<f4").reshape(oracle.shape)
    return np.linalg.norm(logits - oracle) / np.linalg.norm(oracle)


def model_of(case):
    family, mix = case.split("/")
    heads = {} if family in ("gpt2", "phi3") else {"kv_heads": 2}
    return models.make(arch=family, mix=mix, layers=4, embd=512, heads=8, ffn=1024, vocab_size=1024, **heads)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    build = os.environ.get("STRATA_TEST_BIN", SOURCE / "build")
    parser.add_argument("cases", nargs="*", metavar="CASE", default=CASES)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--worker", default=f"{build}/strata-worker")
    parser.add_argument("--peer", metavar="PROGRAM")
    options = parser.parse_args()
    ids = ",".join(map(str, TOKENS))
    print(f"{'model':14} {'ours':>9}" + (f" {'peer':>9} {'ours/peer':>9}" if options.peer else ""), flush=True)
    for case in options.cases:
        path = model_of(case)
        oracle = reference.Model(path).forward(TOKENS)
        ours = distance([options.worker, "--backend", options.backend, "--log-level", "error", "-m", path, "--logits",
                         ids, "--save"], oracle)
        line = f"{case:14} {ours:9.2e}"
        if options.peer:
            peer = distance([options.peer, path, ids], oracle)
            line += f" {peer:9.2e} {ours / peer:9.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
