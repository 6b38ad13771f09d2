#!/usr/bin/python3
"""`strata plan` and `strata inspect` on generated models: every family and type, split files, damaged files, pipes."""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

SOURCE = pathlib.Path(os.environ.get("STRATA_TEST_SOURCE") or pathlib.Path(__file__).resolve().parents[2])
STRATA = pathlib.Path(os.environ.get("STRATA_TEST_BIN") or SOURCE / "build") / "strata"
sys.path.insert(0, str(SOURCE / "tests" / "tools"))
try:
    import make_gguf
    import models
except ImportError as missing:
    print(missing)
    sys.exit(77)


def strata(*words, code=0):
    """Runs the program; returns (standard output, standard error)."""
    run = subprocess.run([str(STRATA), *words], capture_output=True, text=True, timeout=60)
    assert run.returncode == code, (words, run.returncode, run.stdout[-500:], run.stderr)
    return run.stdout, run.stderr


def strata_json(*words):
    return json.loads(strata(*words, "--json")[0])


def expected_tensors(**options):
    """What the generator says it wrote: name -> (type, shape, bytes)."""
    a = make_gguf.parse(["unused.gguf"] + models.arguments_of(options))
    found = {}
    for name, kind, shape, _ in make_gguf.tensor_table(a, a.vocab_size):
        kind = kind if kind in make_gguf.TYPES else "f32"
        _, per, size = make_gguf.TYPES[kind]
        count = 1
        for dimension in shape:
            count *= dimension
        found[name] = (kind.upper(), list(shape), count // per * size)
    return found


def check_model(**options):
    path = models.make(**options)
    want = expected_tensors(**options)
    seen = strata_json("inspect", path)
    have = {t["name"]: (t["type"], t["shape"], t["bytes"]) for t in seen["tensors"]}
    assert have == want, (options, {k: (have.get(k), want.get(k)) for k in have.keys() | want.keys()
                                    if have.get(k) != want.get(k)})
    assert seen["runs"] and seen["problem"] == "", seen["problem"]
    assert sum(t["bytes"] for t in seen["types"].values()) == sum(t[2] for t in want.values())
    layers = options.get("layers", 4)
    for workers in range(1, layers + 1):
        plan = strata_json("plan", path, "--workers", str(workers), "--context", "100", "--max-sequences", "3")
        check_plan(plan, want, workers, layers, options)
    return path


def check_plan(plan, want, workers, layers, options):
    a = make_gguf.parse(["unused.gguf"] + models.arguments_of(options))
    stages = plan["stages"]
    assert len(stages) == workers and plan["layers"] == layers
    assert [s["first_layer"] for s in stages] == [sum(s["layers"] for s in stages[:i]) for i in range(workers)]
    assert sum(s["layers"] for s in stages) == layers and min(s["layers"] for s in stages) >= 1
    total = sum(t[2] for t in want.values())
    total += want["token_embd.weight"][2] if options.get("tied") else 0  # once as a table, once as the head
    total += (workers - 1) * want.get("rope_freqs.weight", (0, 0, 0))[2]
    assert sum(s["weight_bytes"] for s in stages) == plan["weight_bytes"] == total, (plan, total)
    for s in stages:
        assert s["kv_bytes_per_position"] == s["layers"] * a.kv_heads * a.head_dim * 2 * 2
        assert s["kv_bytes"] == s["kv_bytes_per_position"] * 128 * 3  # 100 positions are two pages of 64


def test_families_and_types():
    check_model(arch="llama", mix="q4_k_m", layers=4, rope_freqs=True)
    check_model(arch="llama", mix="q8_0", layers=3, tied=True, rope_freqs=True)
    check_model(arch="qwen2", mix="q5_1", layers=2)
    check_model(arch="qwen3", mix="bf16", layers=2, head_dim=64)
    check_model(arch="phi3", mix="q6_k", layers=2, window=16)
    check_model(arch="gpt2", mix="q5_0", layers=2, tied=True, context=64 * 4)
    for mix in ("f32", "f16", "q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q5_k"):
        check_model(arch="llama", mix=mix, layers=1)


def test_split_and_versions():
    whole = models.make(arch="llama", mix="q4_0", layers=2)
    plan = strata_json("plan", whole, "-w", "2")
    table = [(t["name"], t["type"], t["shape"]) for t in strata_json("inspect", whole, "--tensors")["tensors"]]
    for options in ({"split": 3}, {"split": 5, "version": 2}, {"version": 2}):
        first = pathlib.Path(models.make(arch="llama", mix="q4_0", layers=2, **options))
        parts = sorted(first.parent.glob("*.gguf"))
        assert len(parts) == options.get("split", 1)
        for part in parts:
            seen = strata_json("inspect", str(part))
            assert seen["parts"] == len(parts) and seen["version"] == options.get("version", 3)
            assert [(t["name"], t["type"], t["shape"]) for t in seen["tensors"]] == table
            other = strata_json("plan", str(part), "-w", "2")
            assert {**other, "file_bytes": 0} == {**plan, "file_bytes": 0}


def test_sections_and_text():
    path = models.make(arch="llama", mix="q4_0", layers=2)
    assert set(strata_json("inspect", path, "--metadata")) & {"metadata", "tensors", "vocabulary"} == {"metadata"}
    assert set(strata_json("inspect", path, "--vocab")) & {"metadata", "tensors", "vocabulary"} == {"vocabulary"}
    metadata = strata_json("inspect", path, "--metadata")["metadata"]
    assert metadata["general.architecture"] == "llama" and metadata["llama.block_count"] == 2
    text = strata("inspect", path)[0]
    for expected in ("blk.1.ffn_down.weight", "512 x 256", "llama.rope.freq_base", "synthetic: llama, 2 layers"):
        assert expected in text, expected
    text = strata("plan", path, "-w", "2")[0]
    assert "32 sequences of 4096 positions" in text and text.count("\n") == 7, text


def test_bad_files():
    whole = pathlib.Path(models.make(arch="llama", mix="q4_0", layers=2)).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bad.gguf")

        def refused(data, *sentences):
            pathlib.Path(path).write_bytes(data)
            for command in ("inspect", "plan"):
                out, err = strata(command, path, code=1)
                assert out == "" and err.startswith(f"strata: {path}: ") and err.count("\n") == 1, (out, err)
                for sentence in sentences:
                    assert sentence in err, (sentence, err)

        refused(b"", "the file is empty")
        refused(b"GGML" + whole[4:], "not a GGUF file")
        refused(whole[:-100], "tensor 'output.weight'", "beyond the end of the file")
        refused(whole[:1000], "the file ends inside")
        refused(whole[:4] + b"\0\0\0\3" + whole[8:], "big-endian")
        refused(whole[:4] + b"\1\0\0\0" + whole[8:], "version 1")
        at = whole.index(b"blk.1.attn_q.weight") + len(b"blk.1.attn_q.weight") + 4 + 16
        refused(whole[:at] + b"\x14\0\0\0" + whole[at + 4:], "'blk.1.attn_q.weight'", "IQ4_NL")
        refused(whole.replace(b"blk.1.attn_q.weight", b"blk.1.attn_k.weight"), "'blk.1.attn_k.weight' appears twice")
        at = whole.index(b"llama.block_count") + len(b"llama.block_count") + 4
        pathlib.Path(path).write_bytes(whole[:at] + b"\3\0\0\0" + whole[at + 4:])
        assert "tensor 'blk.2.attn_norm.weight' is missing" in strata("plan", path, code=1)[1]
        seen = strata_json("inspect", path)  # a file that opens can be looked at, model or not
        assert not seen["runs"] and "'blk.2.attn_norm.weight' is missing" in seen["problem"]
        pathlib.Path(path).write_bytes(whole.replace(b"\0llama", b"\0mamba", 1))
        assert "architecture 'mamba' is not one Strata supports" in strata("plan", path, code=1)[1]
    assert "cannot open it: No such file" in strata("inspect", "absent.gguf", code=1)[1]
    assert "not a regular file" in strata("inspect", "/", code=1)[1]


def test_words():
    path = models.make(arch="llama", mix="q4_0", layers=2)
    assert strata("--version")[0].startswith("strata ")
    for words in (["--help"], ["-h"], ["help"]):
        assert "commands:" in strata(*words)[0]
    assert strata("help", "plan") == strata("plan", "--help")
    assert "usage: strata inspect" in strata("inspect", "-h")[0]
    assert "commands:" in strata(code=2)[1]
    assert "no command 'serv'" in strata("serv", code=2)[1]
    assert "did you mean --workers?" in strata("plan", path, "--worker", "2", code=2)[1]
    assert "0 is not between 1 and" in strata("plan", path, "-w", "0", code=2)[1]
    assert "3 workers for a model of 2 layers" in strata("plan", path, "-w", "3", code=1)[1]
    assert "a context of 9999 positions" in strata("plan", path, "--context", "9999", code=1)[1]
    assert "takes one model file" in strata("plan", code=1)[1]
    assert "takes one model file" in strata("inspect", path, path, code=1)[1]


def test_pipes():
    path = models.make(arch="llama", mix="q4_0", layers=2)
    with open("/dev/full", "w") as full:
        run = subprocess.run([str(STRATA), "inspect", path], stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1 and "cannot write to standard output" in run.stderr, run
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([str(STRATA), "inspect", path], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert run.returncode in (-13, 1) and "Sanitizer" not in run.stderr, run


for name, test in list(globals().items()):
    if name.startswith("test_"):
        test()
        print(f"{name}: passed")
