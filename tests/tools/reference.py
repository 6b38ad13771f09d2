#!/usr/bin/python3
"""An independent oracle: the forward pass of a GGUF model in float64 numpy, straight from its definition.

    reference.py MODEL.gguf --tokens 1,2,3 [--top 10] [--greedy 16] [--save logits.npy]

Prints the --top ids and logits of the last position (or, with --greedy N, the N ids that greedy
decoding gives). --save writes the logits of every position, float64, shape (positions, vocabulary).
Weights are dequantized exactly and activations never rounded, so the distance of an engine's logits
from these is the engine's own error. Slow and simple on purpose. Needs python3 and numpy.
Architectures: llama (also SmolLM, Mistral, Llama 3.x with rope_freqs), qwen2, qwen3, phi3, gpt2, gemma3.
"""
import argparse
import struct

import numpy as np


# ---- GGUF ------------------------------------------------------------------------------------------
class Gguf:
    def __init__(self, path):
        self.data = np.memmap(path, dtype=np.uint8, mode="r")
        self.raw = memoryview(self.data)
        magic, version, n_tensors, n_kv = struct.unpack_from("<4sIQQ", self.raw, 0)
        assert magic == b"GGUF" and version in (2, 3), (magic, version)
        self.at, self.kv, self.tensors = 24, {}, {}
        for _ in range(n_kv):
            key = self._string()
            self.kv[key] = self._value(self._one("<I"))
        for _ in range(n_tensors):
            name = self._string()
            dims = [self._one("<Q") for _ in range(self._one("<I"))]
            self.tensors[name] = (dims, self._one("<I"), self._one("<Q"))
        align = self.kv.get("general.alignment", 32)
        self.base = -(-self.at // align) * align

    def _one(self, fmt):
        v = struct.unpack_from(fmt, self.raw, self.at)[0]
        self.at += struct.calcsize(fmt)
        return v

    def _string(self):
        n = self._one("<Q")
        s = bytes(self.raw[self.at:self.at + n]).decode("utf-8", "replace")
        self.at += n
        return s

    def _value(self, kind):
        scalar = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
                  12: "<d"}
        if kind == 8:
            return self._string()
        if kind == 9:
            inner, n = self._one("<I"), self._one("<Q")
            if inner == 8:
                return [self._string() for _ in range(n)]
            dt = np.dtype(scalar[inner])
            v = np.frombuffer(self.raw, dt, n, self.at)
            self.at += n * dt.itemsize
            return v
        return self._one(scalar[kind])

    def has(self, name):
        return name in self.tensors

    def tensor(self, name):
        """float64 array, shape reversed from the file's: a matrix is (rows out, width in)."""
        dims, kind, offset = self.tensors[name]
        n = int(np.prod(dims))
        per, size = BLOCK[kind]
        raw = np.asarray(self.data[self.base + offset:self.base + offset + n // per * size]).reshape(-1, size)
        return DEQUANT[kind](raw).reshape(dims[::-1])


def h(b):  # two bytes a row -> one float64 a row
    return np.ascontiguousarray(b).view(np.float16).astype(np.float64)


def low_high(q):
    return np.concatenate([q & 15, q >> 4], axis=1).astype(np.float64)


def fifth_bit(b):
    bits = np.ascontiguousarray(b).view(np.uint32)
    return ((bits >> np.arange(32, dtype=np.uint32)) & 1).astype(np.float64) * 16


def six_bit(s):  # 12 bytes -> 8 scales, 8 mins
    lo, mid, hi = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    sc = np.concatenate([lo & 63, (hi & 15) | ((lo >> 6) << 4)], axis=1)
    mn = np.concatenate([mid & 63, (hi >> 4) | ((mid >> 6) << 4)], axis=1)
    return sc.astype(np.float64), mn.astype(np.float64)


def q4_k(r):
    d, dmin = h(r[:, 0:2]), h(r[:, 2:4])
    sc, mn = six_bit(r[:, 4:16])
    q = r[:, 16:].reshape(-1, 4, 32)
    q = np.stack([q & 15, q >> 4], axis=2).reshape(-1, 8, 32)
    return (d * sc)[..., None] * q - (dmin * mn)[..., None]


def q5_k(r):
    d, dmin = h(r[:, 0:2]), h(r[:, 2:4])
    sc, mn = six_bit(r[:, 4:16])
    q = r[:, 48:].reshape(-1, 4, 32)
    q = np.stack([q & 15, q >> 4], axis=2).reshape(-1, 8, 32)
    high = (r[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return (d * sc)[..., None] * (q + 16.0 * high) - (dmin * mn)[..., None]


def q6_k(r):
    ql, qh = r[:, 0:128].reshape(-1, 2, 64), r[:, 128:192].reshape(-1, 2, 32)
    sc, d = r[:, 192:208].view(np.int8).astype(np.float64), h(r[:, 208:210])
    low = np.stack([ql[:, :, :32] & 15, ql[:, :, 32:] & 15, ql[:, :, :32] >> 4, ql[:, :, 32:] >> 4], axis=2)
    high = np.stack([(qh >> s) & 3 for s in (0, 2, 4, 6)], axis=2)
    q = (low | (high << 4)).astype(np.float64).reshape(-1, 16, 16) - 32
    return (d * sc)[..., None] * q


def q2_k(r):
    s, q, d, dmin = r[:, 0:16], r[:, 16:80].reshape(-1, 2, 32), h(r[:, 80:82]), h(r[:, 82:84])
    q = np.stack([(q >> x) & 3 for x in (0, 2, 4, 6)], axis=2).reshape(-1, 16, 16).astype(np.float64)
    return (d * (s & 15))[..., None] * q - (dmin * (s >> 4))[..., None]


def q3_k(r):
    mask, q, s, d = r[:, 0:32], r[:, 32:96].reshape(-1, 2, 32), r[:, 96:108], h(r[:, 108:110])
    low = np.stack([(q >> x) & 3 for x in (0, 2, 4, 6)], axis=2).reshape(-1, 8, 32).astype(np.float64)
    high = (mask[:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    sc = np.concatenate([s[:, 0:8] & 15, s[:, 0:8] >> 4], axis=1)
    sc = sc | (np.concatenate([(s[:, 8:12] >> x) & 3 for x in (0, 2, 4, 6)], axis=1) << 4)
    q = (low - 4.0 * (1 - high)).reshape(-1, 16, 16)
    return (d * (sc.astype(np.float64) - 32))[..., None] * q


BLOCK = {0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
         10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)}
DEQUANT = {
    0: lambda r: r.view(np.float32).astype(np.float64), 1: lambda r: h(r),
    30: lambda r: (r.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64),
    2: lambda r: h(r[:, 0:2]) * (low_high(r[:, 2:]) - 8), 3: lambda r: h(r[:, 0:2]) * low_high(r[:, 4:]) + h(r[:, 2:4]),
    6: lambda r: h(r[:, 0:2]) * (low_high(r[:, 6:]) + fifth_bit(r[:, 2:6]) - 16),
    7: lambda r: h(r[:, 0:2]) * (low_high(r[:, 8:]) + fifth_bit(r[:, 4:8])) + h(r[:, 2:4]),
    8: lambda r: h(r[:, 0:2]) * r[:, 2:].view(np.int8).astype(np.float64),
    10: q2_k, 11: q3_k, 12: q4_k, 13: q5_k, 14: q6_k,
}


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


# ---- the model -------------------------------------------------------------------------------------
class Model:
    def __init__(self, path):
        self.g = g = Gguf(path)
        self.arch = a = g.kv["general.architecture"]
        k = lambda name, default=None: g.kv.get(f"{a}.{name}", default)
        self.layers, self.C = int(k("block_count")), int(k("embedding_length"))
        self.H = int(k("attention.head_count"))
        self.KV = int(k("attention.head_count_kv", self.H))
        self.D = int(k("attention.key_length", self.C // self.H))
        self.rot, self.base = int(k("rope.dimension_count", self.D)), float(k("rope.freq_base", 10000.0))
        self.eps = float(k("attention.layer_norm_rms_epsilon", k("attention.layer_norm_epsilon", 1e-5)))
        self.window = int(k("attention.sliding_window", 0) or 0)
        self.scaling = float(k("rope.scaling.factor", 1.0)) if k("rope.scaling.type") == "linear" else 1.0
        self.neox = a not in ("llama",)
        self.cache = {}

    def w(self, name):
        if name not in self.cache:
            self.cache[name] = self.g.tensor(name)
        return self.cache[name]

    def norm(self, x, name):
        """RMSNorm; where the file has a bias, LayerNorm."""
        bias = name.replace(".weight", ".bias")
        if not self.g.has(bias):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w(name)
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w(name) + self.w(bias)

    def rope(self, x, pos, base, scale):
        """x (T, heads, D). llama pairs (2i, 2i+1) as the file stores it; the others pair (i, i + rot/2)."""
        half = self.rot // 2
        freq = base ** (-np.arange(half) * 2.0 / self.rot) / scale
        if self.g.has("rope_freqs.weight"):
            freq = freq / self.w("rope_freqs.weight")
        ang = pos[:, None] * freq[None]
        c, s = np.cos(ang)[:, None], np.sin(ang)[:, None]
        y = x.copy()
        a, b = (x[..., :half], x[..., half:self.rot]) if self.neox else (x[..., 0:self.rot:2], x[..., 1:self.rot:2])
        if self.neox:
            y[..., :half], y[..., half:self.rot] = a * c - b * s, a * s + b * c
        else:
            y[..., 0:self.rot:2], y[..., 1:self.rot:2] = a * c - b * s, a * s + b * c
        return y

    def linear(self, x, name):
        y = x @ self.w(name + ".weight").T
        return y + self.w(name + ".bias") if self.g.has(name + ".bias") else y

    def forward(self, tokens):
        T, H, KV, D = len(tokens), self.H, self.KV, self.D
        pos = np.arange(T, dtype=np.float64)
        x = self.w("token_embd.weight")[tokens]
        gemma = self.arch.startswith("gemma")
        if gemma:
            x = x * np.sqrt(self.C)
        learned = self.g.has("position_embd.weight")
        if learned:
            x = x + self.w("position_embd.weight")[:T]
        for i in range(self.layers):
            p = f"blk.{i}."
            n = self.norm(x, p + "attn_norm.weight")
            if self.g.has(p + "attn_qkv.weight"):
                qkv = self.linear(n, p + "attn_qkv")
                q, k, v = np.split(qkv, [H * D, (H + KV) * D], axis=-1)
            else:
                q, k, v = (self.linear(n, p + f"attn_{c}") for c in "qkv")
            q, k, v = q.reshape(T, H, D), k.reshape(T, KV, D), v.reshape(T, KV, D)
            if self.g.has(p + "attn_q_norm.weight"):
                q, k = self.norm(q, p + "attn_q_norm.weight"), self.norm(k, p + "attn_k_norm.weight")
            local = self.arch == "gemma3" and (i + 1) % 6 != 0
            base, scale = (10000.0, 1.0) if local else (self.base, self.scaling)
            if not learned:
                q, k = self.rope(q, pos, base, scale), self.rope(k, pos, base, scale)
            k, v = np.repeat(k, H // KV, axis=1), np.repeat(v, H // KV, axis=1)
            score = np.einsum("thd,shd->hts", q, k) / np.sqrt(D)
            gap = pos[:, None] - pos[None, :]
            hidden = gap < 0
            if self.window and (local or self.arch == "phi3"):
                hidden = hidden | (gap >= self.window)
            score = np.where(hidden[None], -np.inf, score)
            score = np.exp(score - score.max(-1, keepdims=True))
            score /= score.sum(-1, keepdims=True)
            o = self.linear(np.einsum("hts,shd->thd", score, v).reshape(T, H * D), p + "attn_output")
            if gemma and self.g.has(p + "post_attention_norm.weight"):
                o = self.norm(o, p + "post_attention_norm.weight")
            x = x + o
            n = self.norm(x, p + "ffn_norm.weight")
            if self.g.has(p + "ffn_gate.weight"):
                gate, up = self.linear(n, p + "ffn_gate"), self.linear(n, p + "ffn_up")
            else:
                up = self.linear(n, p + "ffn_up")
                gate = None
                if self.arch == "phi3":  # gate and up in one matrix
                    gate, up = np.split(up, 2, axis=-1)
            if gate is None:
                inner = gelu(up)
            else:
                inner = (gelu(gate) if gemma else gate / (1 + np.exp(-gate))) * up
            f = self.linear(inner, p + "ffn_down")
            if gemma and self.g.has(p + "post_ffw_norm.weight"):
                f = self.norm(f, p + "post_ffw_norm.weight")
            x = x + f
        x = self.norm(x, "output_norm.weight")
        return x @ self.w("output.weight" if self.g.has("output.weight") else "token_embd.weight").T


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--tokens", required=True)
    p.add_argument("--top", type=int, default=10)
    p.add_argument("--greedy", type=int, default=0)
    p.add_argument("--save")
    a = p.parse_args()
    m = Model(a.model)
    tokens = [int(t) for t in a.tokens.split(",")]
    if a.greedy:
        for _ in range(a.greedy):
            tokens.append(int(m.forward(tokens)[-1].argmax()))
        print(",".join(map(str, tokens[-a.greedy:])))
        return
    logits = m.forward(tokens)
    if a.save:
        np.save(a.save, logits)
    for i in np.argsort(-logits[-1])[:a.top]:
        print(i, f"{logits[-1][i]:.6f}")


if __name__ == "__main__":
    main()
