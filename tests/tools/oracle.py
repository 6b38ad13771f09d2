#!/usr/bin/python3
"""Make a small model and the oracle's logits for it, for tests written in C.

    oracle.py TOKENS key=value ...      (models.py's keywords; a value-less key is a flag)

Prints the model's path and the path of the logits: raw float64, (positions, vocabulary). Both are kept beside the
model; a changed generator or oracle makes new ones.
"""
import hashlib
import os
import pathlib
import sys

import models


def main():
    tokens = [int(t) for t in sys.argv[1].split(",")]
    options = dict(a.split("=", 1) if "=" in a else (a, True) for a in sys.argv[2:])
    path = models.make(**options)
    text = sys.argv[1].encode() + (models.HERE / "reference.py").read_bytes()
    saved = pathlib.Path(path).parent / f"logits-{hashlib.sha256(text).hexdigest()[:16]}.f64"
    if not saved.exists():
        import reference
        scratch = saved.with_suffix(f".{os.getpid()}")
        reference.Model(path).forward(tokens).astype("<f8").tofile(scratch)
        os.rename(scratch, saved)
    print(path)
    print(saved)


if __name__ == "__main__":
    main()
