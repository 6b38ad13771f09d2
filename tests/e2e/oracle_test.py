#!/usr/bin/python3
"""The whole path against the oracle: for every model family, what a client is told of a prompt's probabilities and the
ids it gets greedily, from (usually) two workers, beside float64. The models have no vocabulary: ids in, ids out."""
import sys

import strata_e2e as e2e
from strata_e2e import Server, generate, grpc, refused

try:
    import numpy as np
    import reference
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)

PROMPT = [7, 300, 12, 12, 455, 1, 80, 201, 33, 499, 64, 128, 5]
NEW = 12
CLOSE = 0.02  # two logits nearer than this may change places


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def check(**options):
    path = e2e.models.make(layers=4, embd=128, heads=4, ffn=256, vocab_size=512, mix="f16", **options)
    with Server(path, workers=e2e.workers(2)) as server:
        answer = generate(server, tokens=PROMPT, temperature=0, max_tokens=NEW, logprobs=True, prompt_logprobs=True,
                          top_logprobs=5)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "no text vocabulary"):
            generate(server, text="hi")
        assert answer.text == "" and len(answer.ids) == NEW
    whole = PROMPT + answer.ids
    oracle = log_softmax(reference.Model(path).forward(whole))
    reported = [score.logprob for score in answer.prompt_logprobs[1:]] + [entry.logprob for entry in answer.logprobs]
    exact = [oracle[i, token] for i, token in enumerate(whole[1:])]
    worst = max(abs(a - b) for a, b in zip(reported, exact))
    assert worst < CLOSE, f"{options}: {worst}"
    for i, entry in enumerate(answer.logprobs):
        order = np.argsort(-oracle[len(PROMPT) - 1 + i], kind="stable")
        best = oracle[len(PROMPT) - 1 + i, order]
        assert entry.token == order[0] or best[0] - best[list(order).index(entry.token)] < CLOSE, f"{options}: {i}"
        for place, top in enumerate(entry.top):
            assert abs(top.logprob - best[place]) < CLOSE, f"{options}: {i}, {place}"
    print(f"   {options}: the furthest of {len(exact)} log-probabilities is {worst:.1e} off")


def test_llama():
    check(arch="llama", kv_heads=2, rope_freqs=True)


def test_qwen2():
    check(arch="qwen2", kv_heads=2, tied=True)


def test_qwen3():
    check(arch="qwen3", kv_heads=2, head_dim=64)


def test_phi3():
    check(arch="phi3", kv_heads=4)


def test_gpt2():
    check(arch="gpt2", tied=True)


if __name__ == "__main__":
    e2e.main(globals())
