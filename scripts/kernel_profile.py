#!/usr/bin/python3
"""Where a step's time goes, kernel by kernel, from a trace that tests/bench/kernel_trace.c wrote.

A step begins with the kernel whose name has --first in it. Of the steps that have the commonest list of kernels after
the first half of the trace, each kernel's share is the median of its `advance`: by how much it moved the end of what
was done, so that shares add up to the step, whatever overlapped. `alone` is the same less the time in which nothing
ran. Kernels of one name and launch in a row of a step are one line.
"""
import argparse
import collections
import re
import statistics
import sys


def short(name):
    """The function and its numbers, of a mangled or a plain name."""
    mangled = re.match(r"_Z(?:N\d+\w*?)?(\d+)", name)
    if mangled:
        begin = mangled.end()
        plain = name[begin:begin + int(mangled[1])]
        numbers = re.findall(r"L[jibm](\d+)E", name[begin:])
        return f"{plain}<{','.join(numbers)}>" if numbers else plain
    return name[:60]


def read(path):
    """(start, end, label) of every kernel, ascending; ends the program where there are none."""
    kernels = []
    try:
        for line in open(path, encoding="utf-8"):
            start, end, grid, block, _, _, name = line.split(None, 6)
            kernels.append((int(start), int(end), f"{short(name.strip())} {grid} x {block}"))
    except OSError as error:
        sys.exit(f"kernel_profile.py: {path}: {error.strerror}")
    except ValueError:
        sys.exit(f"kernel_profile.py: {path} is not what kernel_trace writes, from line {len(kernels) + 1} on")
    if not kernels:
        sys.exit(f"kernel_profile.py: {path} is empty: no kernel ran, or the program was killed")
    return sorted(kernels)


def steps_of(kernels, first):
    """Lists of (label, advance, idle before) in us, each a step."""
    steps, done = [], None
    for start, end, label in kernels:
        if first in label or not steps:
            steps.append([])
        advance = 0 if done is None else max(0, end - done) / 1e3
        idle = 0 if done is None else max(0, start - done) / 1e3
        done = end if done is None else max(done, end)
        steps[-1].append((label, advance, idle))
    return steps


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("trace")
    p.add_argument("--first", default="embed", help="in the name of the first kernel of every step")
    p.add_argument("--width", type=int, default=72)
    a = p.parse_args()
    kernels = read(a.trace)
    if not any(a.first in label for _, _, label in kernels):
        sys.exit(f"kernel_profile.py: no kernel's name has '{a.first}' in it: see --first")
    steps = steps_of(kernels, a.first)
    steps = steps[len(steps) // 2:]
    lists = collections.Counter(tuple(label for label, _, _ in step) for step in steps)
    labels, count = lists.most_common(1)[0]
    same = [step for step in steps if tuple(label for label, _, _ in step) == labels]
    table = collections.OrderedDict()
    for i, label in enumerate(labels):
        of = table.setdefault(label, [0, 0.0, 0.0])
        of[0] += 1
        of[1] += statistics.median(step[i][1] for step in same)
        of[2] += statistics.median(step[i][2] for step in same)
    total = sum(of[1] for of in table.values())
    print(f"{count} of {len(steps)} steps; {len(labels)} kernels, {total:.0f} us a step")
    print(f"{'kernel, grid x threads':{a.width}} {'times':>5} {'us':>8} {'each':>7} {'alone':>7} {'share':>6}")
    for label, (n, advance, idle) in sorted(table.items(), key=lambda item: -item[1][1]):
        print(f"{label[:a.width]:{a.width}} {n:5} {advance:8.1f} {advance / n:7.2f} {(advance - idle) / n:7.2f} "
              f"{advance / total:6.1%}")


if __name__ == "__main__":
    main()
