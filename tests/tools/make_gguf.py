#!/usr/bin/python3
"""Write a GGUF model with random weights of a given shape, for benchmarks and parity tests.

The file is a well-formed GGUF model that any GGUF engine loads: real metadata, a real
vocabulary when one is given, and quantized blocks whose dequantized values have mean 0 and a
standard deviation of about gain / sqrt(input width), so activations neither vanish nor overflow.
The weights mean nothing: use such a file for speed, memory and engine-against-engine parity.

    make_gguf.py OUT.gguf --shape llama-8b --mix q4_k_m [--vocab vocab-llama3.gguf] [--seed 1]
    make_gguf.py OUT.gguf --arch llama --layers 4 --embd 256 --heads 8 --kv-heads 2 --ffn 512 \
                 --vocab-size 512 --mix q6_k

--mix is one GGUF type for every matrix (f32 f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k
q6_k), or q4_k_m / q5_k_m, the usual medium mixes. --vocab copies every tokenizer.* key of another
GGUF file; without it the tokenizer is "none" and the vocabulary has --vocab-size nameless ids.
--arch phi3 has fused attn_qkv and fused gate+up; gpt2 has fused attn_qkv, LayerNorm, biases, learned
positions and a plain GELU FFN. --window N adds a sliding attention window, --rope-freqs Llama 3.1's
frequency divisors. Equal arguments give equal bytes, split or not.
Needs python3 and numpy.
"""
import argparse
import struct
import sys

import numpy as np

TYPES = {  # name: (ggml type id, weights per block, bytes per block)
    "f32": (0, 1, 4), "f16": (1, 1, 2), "bf16": (30, 1, 2), "q4_0": (2, 32, 18), "q4_1": (3, 32, 20),
    "q5_0": (6, 32, 22), "q5_1": (7, 32, 24), "q8_0": (8, 32, 34), "q2_k": (10, 256, 84),
    "q3_k": (11, 256, 110), "q4_k": (12, 256, 144), "q5_k": (13, 256, 176), "q6_k": (14, 256, 210),
}
SHAPES = {  # layers embd heads kv_heads head_dim ffn vocab rope_base context
    "llama-135m": (30, 576, 9, 3, 64, 1536, 49152, 1e5, 8192),
    "llama-1b": (16, 2048, 32, 8, 64, 8192, 128256, 5e5, 131072),
    "llama-8b": (32, 4096, 32, 8, 128, 14336, 128256, 5e5, 131072),
    "llama-70b": (80, 8192, 64, 8, 128, 28672, 128256, 5e5, 131072),
    "qwen3-8b": (36, 4096, 32, 8, 128, 12288, 151936, 1e6, 40960),
}
ALIGN = 32


def f16(x):
    return np.asarray(x, dtype=np.float16).view(np.uint8)


def blocks(rng, kind, n, sigma):
    """n random blocks of one type as (n, block bytes) uint8; dequantized std is about sigma."""
    _, per, size = TYPES[kind]
    if kind == "f32":
        return rng.normal(0, sigma, n).astype(np.float32).view(np.uint8).reshape(n, size)
    if kind == "f16":
        return rng.normal(0, sigma, n).astype(np.float16).view(np.uint8).reshape(n, size)
    if kind == "bf16":
        whole = rng.normal(0, sigma, n).astype(np.float32).view(np.uint32)
        return (whole >> 16).astype(np.uint16).view(np.uint8).reshape(n, size)
    b = rng.integers(0, 256, (n, size), dtype=np.uint8)
    jitter = rng.uniform(0.7, 1.3, n).astype(np.float32)

    def put(at, value):
        b[:, at:at + 2] = f16(value).reshape(n, 2)
    if kind == "q4_0":
        put(0, sigma / 4.61 * jitter)
    elif kind == "q4_1":
        put(0, sigma / 4.61 * jitter)
        put(2, -7.5 * sigma / 4.61 * jitter)
    elif kind == "q5_0":
        put(0, sigma / 9.23 * jitter)
    elif kind == "q5_1":
        put(0, sigma / 9.23 * jitter)
        put(2, -15.5 * sigma / 9.23 * jitter)
    elif kind == "q8_0":
        put(0, sigma / 73.9 * jitter)
    elif kind == "q2_k":      # scales[16] (4-bit scale | 4-bit min), qs[64], d, dmin; w = d*sc*q - dmin*m
        s = rng.integers(4, 16, (n, 16), dtype=np.uint8)
        b[:, :16] = s | (s << 4)
        put(80, sigma / (10 * 1.118) * jitter)
        put(82, 1.5 * sigma / (10 * 1.118) * jitter)
    elif kind == "q3_k":      # hmask[32], qs[64], scales[12], d; q in -4..3, 6-bit scales minus 32
        put(108, sigma / (18.5 * 2.29) * jitter)
    elif kind in ("q4_k", "q5_k"):  # d, dmin, scales[12] (8 x 6-bit scale, 8 x 6-bit min), quants
        s = rng.integers(16, 64, (n, 8), dtype=np.uint8)
        lo, hi = s[:, :4], s[:, 4:]
        b[:, 4:8] = lo | ((hi >> 4) << 6)
        b[:, 8:12] = lo | ((hi >> 4) << 6)
        b[:, 12:16] = (hi & 15) | ((hi & 15) << 4)
        std, mid = (4.61, 7.5) if kind == "q4_k" else (9.23, 15.5)
        put(0, sigma / (40 * std) * jitter)
        put(2, mid * sigma / (40 * std) * jitter)
    elif kind == "q6_k":      # ql[128], qh[64], scales[16] int8, d; w = d*sc*(q-32)
        b[:, 192:208] = rng.integers(32, 112, (n, 16), dtype=np.uint8)
        put(208, sigma / (72 * 18.5) * jitter)
    return b


class Pool:
    """A reusable buffer of random blocks per (type, sigma): big models need bytes, not fresh entropy."""
    def __init__(self, rng, limit):
        self.rng, self.limit, self.kept = rng, limit, {}

    def write(self, out, kind, sigma, count):
        n = min(count, max(1, self.limit // TYPES[kind][2]))
        key = (kind, round(sigma, 9))
        if key not in self.kept or len(self.kept[key]) < n:
            self.kept[key] = blocks(self.rng, kind, n, sigma)
        data = self.kept[key]
        start = int(self.rng.integers(0, len(data)))
        left = count
        while left:
            take = min(left, len(data) - start)
            out.write(memoryview(np.ascontiguousarray(data[start:start + take])).cast("B"))
            left -= take
            start = 0


def kv_string(s):
    raw = s.encode()
    return struct.pack("<Q", len(raw)) + raw


class Meta:
    def __init__(self):
        self.items = []

    def add(self, key, kind, value):
        code, fmt = {"u16": (2, "<H"), "u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"),
                     "str": (8, None)}[kind]
        body = kv_string(value) if kind == "str" else struct.pack(fmt, value)
        self.items.append(kv_string(key) + struct.pack("<I", code) + body)

    def add_raw(self, raw):
        self.items.append(raw)


def tokenizer_keys(path):
    """Raw bytes of every tokenizer.* key-value of a GGUF file, and the number of its tokens."""
    data = open(path, "rb").read()
    magic, version, n_tensors, n_kv = struct.unpack_from("<4sIQQ", data, 0)
    assert magic == b"GGUF" and version >= 2, path
    at, found, tokens = 24, [], 0
    size = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def skip(kind, at):
        if kind == 8:
            return at + 8 + struct.unpack_from("<Q", data, at)[0]
        if kind == 9:
            inner, count = struct.unpack_from("<IQ", data, at)
            at += 12
            if inner in size:
                return at + size[inner] * count
            for _ in range(count):
                at = skip(inner, at)
            return at
        return at + size[kind]
    for _ in range(n_kv):
        start = at
        length = struct.unpack_from("<Q", data, at)[0]
        key = data[at + 8:at + 8 + length].decode()
        at += 8 + length
        kind = struct.unpack_from("<I", data, at)[0]
        if key == "tokenizer.ggml.tokens":
            tokens = struct.unpack_from("<Q", data, at + 8)[0]
        at = skip(kind, at + 4)
        if key.startswith("tokenizer."):
            found.append(data[start:at])
    return found, tokens


def more_bits(i, n):
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def pick(mix, name, layer, layers, embd, is_70b):
    """GGUF type of one matrix, by the usual medium-mix rules."""
    if mix in TYPES:
        return mix
    base, high = ("q4_k", "q6_k") if mix == "q4_k_m" else ("q5_k", "q6_k")
    if name == "output":
        return high
    if name in ("attn_v", "ffn_down") and more_bits(layer, layers):
        return high
    if name == "attn_v" and is_70b:
        return "q5_k"
    return base


def rope_divisors(dim, base, factor=8.0, low=1.0, high=4.0, original=8192):
    """Llama 3.1's per-frequency divisors: 1 for short waves, factor for long ones, a ramp between."""
    wave = 2 * np.pi * base ** (np.arange(0, dim, 2) / dim)
    ramp = np.clip((original / wave - low) / (high - low), 0, 1)
    return 1 / ((1 - ramp) / factor + ramp)


def parse(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out")
    p.add_argument("--shape", choices=SHAPES)
    p.add_argument("--arch", default="llama", choices=["llama", "qwen2", "qwen3", "phi3", "gpt2"])
    p.add_argument("--mix", default="q4_k_m")
    p.add_argument("--vocab")
    p.add_argument("--seed", type=int, default=1)
    for name, value in (("layers", 4), ("embd", 256), ("heads", 8), ("kv-heads", 2), ("head-dim", 0), ("ffn", 512),
                        ("vocab-size", 512), ("context", 4096), ("window", 0)):
        p.add_argument("--" + name, type=int, default=value)
    p.add_argument("--rope-base", type=float, default=1e4)
    p.add_argument("--gain", type=float, default=1.0)
    p.add_argument("--rope-freqs", action="store_true", help="add rope_freqs.weight as Llama 3.1 has it")
    p.add_argument("--tied", action="store_true", help="no output.weight: the head is token_embd.weight")
    p.add_argument("--version", type=int, default=3, choices=[2, 3], help="of the GGUF format")
    p.add_argument("--split", type=int, default=1, metavar="N",
                   help="write N parts, OUT-00001-of-0000N.gguf and so on, with the same weights")
    a = p.parse_args(arguments)
    if a.shape:
        (a.layers, a.embd, a.heads, a.kv_heads, a.head_dim, a.ffn, a.vocab_size, a.rope_base,
         a.context) = SHAPES[a.shape]
        if a.shape.startswith("qwen3"):
            a.arch = "qwen3"
    a.head_dim = a.head_dim or a.embd // a.heads
    if a.arch == "gpt2":
        a.kv_heads = a.heads
    return a


def metadata(a):
    """The key-values of the model, and the size of its vocabulary."""
    m = Meta()
    vocab_size = a.vocab_size
    m.add("general.architecture", "str", a.arch)
    m.add("general.name", "str", a.shape or "synthetic")
    m.add("general.alignment", "u32", ALIGN)
    for key, value in (("block_count", a.layers), ("context_length", a.context), ("embedding_length", a.embd),
                       ("feed_forward_length", a.ffn), ("attention.head_count", a.heads),
                       ("attention.head_count_kv", a.kv_heads), ("attention.key_length", a.head_dim),
                       ("attention.value_length", a.head_dim), ("rope.dimension_count", a.head_dim)):
        m.add(f"{a.arch}.{key}", "u32", value)
    if a.window:
        m.add(f"{a.arch}.attention.sliding_window", "u32", a.window)
    if a.arch != "gpt2":
        m.add(f"{a.arch}.rope.freq_base", "f32", a.rope_base)
    m.add(f"{a.arch}.attention.layer_norm{'' if a.arch == 'gpt2' else '_rms'}_epsilon", "f32", 1e-5)
    if a.vocab:
        keys, vocab_size = tokenizer_keys(a.vocab)
        for raw in keys:
            m.add_raw(raw)
    else:
        m.add("tokenizer.ggml.model", "str", "none")
    m.add(f"{a.arch}.vocab_size", "u32", vocab_size)
    return m, vocab_size


def tensor_table(a, vocab_size):
    """(name, kind, shape with the input width first, sigma) of every tensor, in file order."""
    arch, layers, width, ffn, head = a.arch, a.layers, a.embd, a.ffn, a.head_dim
    q, kv = a.heads * head, a.kv_heads * head
    tensors = []

    def matrix(name, short, layer, k, n):
        kind = pick(a.mix, short, layer, layers, width, layers >= 80)
        if k % TYPES[kind][1]:
            sys.exit(f"{name}: input width {k} is not a multiple of {TYPES[kind][1]}, which {kind} needs")
        tensors.append((name, kind, (k, n), a.gain / np.sqrt(k)))

    def bias(name, n):
        tensors.append((name, "bias", (n,), 0.1))

    def norm(name, n):
        tensors.append((name, "norm", (n,), 0.1))
        if arch == "gpt2":
            bias(name.replace(".weight", ".bias"), n)

    matrix("token_embd.weight", "token_embd", 0, width, vocab_size)
    if arch == "gpt2":
        tensors.append(("position_embd.weight", "bias", (width, a.context), 0.1))
    if a.rope_freqs:
        tensors.append(("rope_freqs.weight", "freqs", (head // 2,), a.rope_base))
    for i in range(layers):
        b = f"blk.{i}."
        norm(b + "attn_norm.weight", width)
        if arch in ("phi3", "gpt2"):
            matrix(b + "attn_qkv.weight", "attn_qkv", i, width, q + 2 * kv)
        else:
            matrix(b + "attn_q.weight", "attn_q", i, width, q)
            matrix(b + "attn_k.weight", "attn_k", i, width, kv)
            matrix(b + "attn_v.weight", "attn_v", i, width, kv)
        if arch == "qwen2":
            for x, n in (("q", q), ("k", kv), ("v", kv)):
                bias(b + f"attn_{x}.bias", n)
        if arch == "gpt2":
            for x, n in (("attn_qkv", q + 2 * kv), ("attn_output", width), ("ffn_up", ffn), ("ffn_down", width)):
                bias(b + f"{x}.bias", n)
        if arch == "qwen3":
            norm(b + "attn_q_norm.weight", head)
            norm(b + "attn_k_norm.weight", head)
        matrix(b + "attn_output.weight", "attn_output", i, q, width)
        norm(b + "ffn_norm.weight", width)
        if arch not in ("phi3", "gpt2"):
            matrix(b + "ffn_gate.weight", "ffn_gate", i, width, ffn)
        matrix(b + "ffn_up.weight", "ffn_up", i, width, 2 * ffn if arch == "phi3" else ffn)
        matrix(b + "ffn_down.weight", "ffn_down", i, ffn, width)
    norm("output_norm.weight", width)
    if not a.tied:
        matrix("output.weight", "output", 0, width, vocab_size)
    return tensors


def write_part(path, version, items, tensors, rng, pool):
    info, offset, sizes = [], 0, []
    for name, kind, shape, _ in tensors:
        code, per, size = TYPES["f32"] if kind in ("norm", "bias", "freqs") else TYPES[kind]
        count = int(np.prod(shape)) // per
        info.append(kv_string(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", d) for d in shape)
                    + struct.pack("<IQ", code, offset))
        sizes.append((count, count * size))
        offset += -(-count * size // ALIGN) * ALIGN
    with open(path, "wb") as out:
        out.write(struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(items)) + b"".join(items + info))
        out.write(b"\0" * (-out.tell() % ALIGN))
        for (name, kind, shape, sigma), (count, size) in zip(tensors, sizes):
            if kind == "norm":
                out.write(rng.normal(1, sigma, count).astype(np.float32).tobytes())
            elif kind == "freqs":
                out.write(rope_divisors(2 * count, sigma).astype(np.float32).tobytes())
            elif kind == "bias":
                out.write(rng.normal(0, sigma, count).astype(np.float32).tobytes())
            else:
                pool.write(out, kind, sigma, count)
            out.write(b"\0" * (-size % ALIGN))
        return out.tell()


def part_name(path, number, count):
    stem = path[:-len(".gguf")] if path.endswith(".gguf") else path
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def generate(arguments):
    """Writes the model that the command line describes; returns the path to open (the first part's)."""
    a = parse(arguments)
    m, vocab_size = metadata(a)
    tensors = tensor_table(a, vocab_size)
    rng = np.random.default_rng(a.seed)
    pool = Pool(rng, 64 << 20)
    if a.split == 1:
        total = write_part(a.out, a.version, m.items, tensors, rng, pool)
        print(f"{a.out}: {len(tensors)} tensors, {total} bytes")
        return a.out
    for i in range(a.split):
        part = Meta() if i else m
        part.add("split.no", "u16", i)
        part.add("split.count", "u16", a.split)
        part.add("split.tensors.count", "i32", len(tensors))
        own = tensors[i * len(tensors) // a.split:(i + 1) * len(tensors) // a.split]
        path = part_name(a.out, i, a.split)
        total = write_part(path, a.version, part.items, own, rng, pool)
        print(f"{path}: {len(own)} tensors, {total} bytes")
    return part_name(a.out, 0, a.split)


if __name__ == "__main__":
    generate(sys.argv[1:])
