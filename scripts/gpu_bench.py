#!/usr/bin/python3
"""Time `strata-worker --bench` on one GPU: models of real shapes, one stream, batches, prefill.

Prints a table: tokens a second, the part of the card's limit that is, and what llama.cpp gave on an H200, with the
ratio where this is one. The limit of decoding is memory: the weights once a step and the keys and values of every
sequence, at the bandwidth measured on that card. The limit of prefill is arithmetic: two operations for each token and
weight that it meets, at the rate of a large bf16 product. The models have random weights; they are made in --models
when they are not there, and removed again when they were made here (unless --keep).

The case "online" serves the model with `strata serve` and loads it with `strata bench` over gRPC: all tokens a second,
prompts and answers, and which part that is of what the engine alone does with as many (its prefill, then its decoding,
of as many sequences at once). It also says, from the worker's trace, which share of the middle half of that time the
GPU computed. It needs --vocab, and takes the first of --mixes.
"""
import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

SOURCE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SOURCE / "tests" / "tools"))
import make_gguf  # noqa: E402
import pipeline_timeline  # noqa: E402

CARDS = {"H200": (4.65e12, 780e12), "H100 80GB HBM3": (3.0e12, 780e12)}  # bytes, operations a second: measured
CASES = [  # name, prompt, new tokens, batch, what is measured
    ("one stream", 0, 128, 1, "decode"),
    ("batch 8, 1k context", 1024, 64, 8, "decode"),
    ("batch 32, 1k context", 1024, 64, 32, "decode"),
    ("batch 64, 1k context", 1024, 64, 64, "decode"),
    ("prefill 2048", 2048, 0, 1, "prefill"),
]
ONLINE = {"clients": 64, "prompt": 1000, "new": 200, "requests": 192}
LLAMA_CPP = {  # (shape, mix) -> case -> tokens a second
    ("8b", "q4_k_m"): {"one stream": 265, "batch 8, 1k context": 725, "batch 32, 1k context": 2853,
                       "batch 64, 1k context": 3814, "prefill 2048": 9970},
    ("8b", "q8_0"): {"one stream": 253},
    ("8b", "f16"): {"one stream": 209},
    ("70b", "q4_k_m"): {"one stream": 42.0, "prefill 2048": 1198},
}


def models_folder():
    """In memory where there is room: loading is part of no figure, and waits for no disk."""
    memory = pathlib.Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 48e9
    return (memory if roomy else pathlib.Path(tempfile.gettempdir())) / "strata-bench-models"


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--build", type=pathlib.Path, required=True, help="the folder of strata-worker")
    p.add_argument("--models", type=pathlib.Path, default=models_folder())
    p.add_argument("--keep", action="store_true", help="keep the models that are made")
    p.add_argument("--vocab", help="a GGUF file whose tokens the models get")
    p.add_argument("--shapes", default="8b", help="of 8b, 70b, 1b; separated by commas")
    p.add_argument("--mixes", default="q4_k_m,q8_0,f16")
    p.add_argument("--cases", default="", help="only those whose name has one of these words, separated by commas")
    p.add_argument("--backend", default="cuda")
    p.add_argument("--online", default="{}", help="JSON that changes the online case: clients, prompt, new, requests")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--json", type=pathlib.Path, help="where the figures go (default: gpu-bench.json in the build)")
    return p.parse_args()


def make_model(a, shape, mix):
    """The path of the model, and whether it was made just now."""
    path = a.models / f"{shape}-{mix}.gguf"
    if path.exists():
        return path, False
    a.models.mkdir(parents=True, exist_ok=True)
    began, scratch = time.monotonic(), path.with_suffix(".part")
    arguments = [str(scratch), "--shape", f"llama-{shape}", "--mix", mix] + (["--vocab", a.vocab] if a.vocab else [])
    saved, sys.stdout = sys.stdout, open(os.devnull, "w")
    try:
        make_gguf.generate(arguments)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    finally:
        sys.stdout = saved
    scratch.rename(path)
    print(f"made {path.name} in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return path, True


def weight_figures(shape, mix, vocab_file):
    """What a step reads of the weights in bytes (all but the rows it does not look up), how many of them every prompt
    token meets (not the head, nor the last layer's FFN), and the bytes of keys and values of one position."""
    a = make_gguf.parse(["x", "--shape", f"llama-{shape}", "--mix", mix])
    vocab_size = make_gguf.tokenizer_keys(vocab_file)[1] if vocab_file else a.vocab_size
    total = count = 0
    last_only = ("output.weight", f"blk.{a.layers - 1}.ffn_")
    for name, kind, dims, _ in make_gguf.tensor_table(a, vocab_size):
        if name == "token_embd.weight":
            continue
        _, per, size = make_gguf.TYPES["f32" if kind in ("norm", "bias", "freqs") else kind]
        n = 1
        for d in dims:
            n *= d
        total += n // per * size
        count += 0 if name.startswith(last_only) else n
    return total, count, a.layers * 2 * a.kv_heads * a.head_dim * 2


def limit_of(device, figures, prompt, new, batch, kind):
    """Tokens a second that `device` cannot exceed; None for a card whose rates nobody measured."""
    total, count, kv = figures
    rates = [r for card, r in CARDS.items() if card in device]
    if not rates:
        return None
    if kind == "prefill":
        return rates[0][1] / (2 * count)
    return batch * rates[0][0] / (total + batch * (prompt + new / 2) * kv)


def run_case(a, model, prompt, new, batch):
    command = [a.build / "strata-worker", "--bench", "--json", "--model", model, "--backend", a.backend,
               "--bench-prompt", prompt, "--bench-new", new, "--bench-batch", batch, "--bench-step", 2048,
               "--bench-repeat", a.repeat, "--log-level", "warn"]
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def computing_share(folder, began, ended):
    """The share of the middle half of a time (microseconds) in which the one stage computed; None without a trace."""
    quarter = (ended - began) // 4
    try:
        traces = [pipeline_timeline.Trace(path).within(began + quarter, ended - quarter)
                  for path in pathlib.Path(folder).glob("*.json")]
    except pipeline_timeline.BadTrace:
        return None
    computed = sum(s.end - s.begin for trace in traces for s in trace.spans if s.kind == "compute")
    return computed / (ended - began - 2 * quarter) if computed else None


def serve_and_load(a, model, case):
    """What `strata bench` measured of the one sweep, and the share of computing; None where that failed."""
    with tempfile.TemporaryDirectory() as home:
        address = f"unix:{home}/strata"
        serve = [a.build / "strata", "serve", model, "--listen", address, "--backend", a.backend, "--workers", 1,
                 "--max-sequences", case["clients"], "--context", 2048, "--step-budget", 2048, "--chunk", 1024,
                 "--log-level", "warn", "--trace", home]
        bench = [a.build / "strata", "bench", "--connect", address, "--json", "--prompt", case["prompt"], "--new",
                 case["new"], "--concurrency", case["clients"], "--requests", case["requests"]]
        server = subprocess.Popen([str(c) for c in serve], stdout=subprocess.PIPE, text=True)
        try:
            if not any(line.startswith("ready on") for line in server.stdout):
                return None
            began = time.monotonic_ns() // 1000
            done = subprocess.run([str(c) for c in bench], stdout=subprocess.PIPE, text=True)
            ended = time.monotonic_ns() // 1000
        finally:
            server.terminate()
            server.wait()
        if done.returncode:
            return None
        return json.loads(done.stdout)["sweeps"][0] | {"computing": computing_share(home, began, ended)}


def bench_online(a, shape, mix, model, rows, case):
    sweep = serve_and_load(a, model, case)
    alone = run_case(a, model, case["prompt"], case["new"], case["clients"])
    row = {"shape": shape, "mix": mix, "case": f"online, {case['clients']} clients"}
    rows.append(row)
    if not sweep or not alone:
        print(f"{shape + ' ' + mix:<12} {row['case']:<22} {'failed':>10}", flush=True)
        return
    engine = alone["results"][0]
    seconds = case["requests"] * (case["prompt"] / engine["prefill_tokens_per_second"]
                                  + case["new"] / engine["decode_tokens_per_second"])
    row |= {"sweep": sweep, "device": alone["device"], "of_engine": seconds / sweep["seconds"],
            "tokens_per_second": sweep["prompt_tokens_per_second"] + sweep["new_tokens_per_second"]}
    print(f"{shape + ' ' + mix:<12} {row['case']:<22} {row['tokens_per_second']:>10.1f} "
          f"{row['of_engine']:>9.0%} of the engine alone; first token {sweep['ttft_ms']['p50']:.0f} ms, then "
          f"{sweep['gap_ms']['p50']:.1f} ms (medians)"
          + (f"; computes {sweep['computing']:.1%} of the time" if sweep["computing"] else ""), flush=True)


def bench_model(a, shape, mix, rows):
    words = [w for w in a.cases.split(",") if w]
    model, made = make_model(a, shape, mix)
    figures = weight_figures(shape, mix, a.vocab)
    for name, prompt, new, batch, kind in CASES:
        if words and not any(w in name for w in words):
            continue
        out = run_case(a, model, prompt, new, batch)
        row = {"shape": shape, "mix": mix, "case": name, "llama_cpp_h200": LLAMA_CPP.get((shape, mix), {}).get(name)}
        if out:
            row["limit"] = limit_of(out["device"], figures, prompt, new, batch, kind)
            result = out["results"][0]
            row["tokens_per_second"] = result[f"{kind}_tokens_per_second"]
            row["device"] = out["device"]
        rows.append(row)
        print_row(row)
    if a.vocab and mix == a.mixes.split(",")[0] and (not words or any(w in "online" for w in words)):
        bench_online(a, shape, mix, model, rows, ONLINE | json.loads(a.online))
    if made and not a.keep:
        model.unlink()


def print_row(row):
    rate, limit, other = row.get("tokens_per_second"), row.get("limit"), row["llama_cpp_h200"]
    same_card = rate and other and "H200" in row["device"]
    print(f"{row['shape'] + ' ' + row['mix']:<12} {row['case']:<22} "
          + (f"{rate:>10.1f} " if rate else f"{'failed':>10} ")
          + (f"{rate / limit:>9.0%} " if rate and limit else f"{'':>9} ")
          + f"{other or '':>16}" + (f" {rate / other:>6.2f}x" if same_card else ""), flush=True)


def main():
    a = parse()
    rows = []
    print(f"{'model':<12} {'case':<22} {'tok/s':>10} {'of limit':>9} {'llama.cpp, H200':>16} {'ratio':>7}")
    for shape in a.shapes.split(","):
        for mix in a.mixes.split(","):
            if shape != "70b" or mix == "q4_k_m":  # others do not fit
                bench_model(a, shape, mix, rows)
    out = a.json or a.build / "gpu-bench.json"
    out.write_text(json.dumps({"cards": CARDS, "results": rows}, indent=1) + "\n")
    print(f"figures: {out}", file=sys.stderr)
    sys.exit(any("tokens_per_second" not in row for row in rows))


if __name__ == "__main__":
    main()
