#!/usr/bin/python3
"""Draw what the stages of a pipeline did, from the traces of `strata serve --trace DIR` (one file a worker).

The picture, an SVG, shows a few consecutive steps: a lane for each worker, a box for each span, with the number of its
step; the bubbles between them say what the stage waits for. What belongs to other steps is pale. The table that is
printed is about the whole trace: of the time that any step was in flight, how much did each stage compute, wait for its
neighbour, spend on sending, and stand idle?
"""
import argparse
import html
import json
import pathlib
import sys

KINDS = ("compute", "wait", "send")
COLOURS = {"compute": ("#3b6fb6", "#6b9bd8"), "wait": ("#f2b84b",) * 2, "send": ("#4f9d69",) * 2,
           "idle": ("#eeeeee",) * 2}
LEFT, RIGHT, TOP, LANE, BOX, LETTER = 150, 20, 60, 56, 40, 6.4  # pixels
LEGEND = {"compute": "computes (light and dark: from step to step)", "wait": "waits for a neighbour",
          "send": "sends, or waits until it can", "idle": "idle: no step to run, or the host is late"}


class BadTrace(Exception):
    pass


class Span:
    """What one worker did for one step, in microseconds of the host's clock."""
    __slots__ = ("kind", "begin", "end", "step", "stage", "rows")

    def __init__(self, event):
        arguments = event["args"]
        self.kind, self.begin, self.end = event["name"], event["ts"], event["ts"] + event["dur"]
        self.step, self.stage = (arguments["epoch"], arguments["step"]), arguments["stage"]
        self.rows = arguments.get("rows")


class Trace:
    """One worker's file, whole or cut off."""

    def __init__(self, path):
        self.name, self.spans = pathlib.Path(path).stem, []
        try:
            for event in read_events(pathlib.Path(path).read_text(errors="replace")):
                if event["ph"] == "M" and event["name"] == "process_name":
                    self.name = event["args"]["name"]
                if event["ph"] == "X" and event["name"] in KINDS:
                    self.spans.append(Span(event))
        except OSError as problem:
            raise BadTrace(f"{path} cannot be read: {problem.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadTrace(f"{path} is no trace of a worker") from None
        self.spans.sort(key=lambda s: (s.begin, s.end))

    def within(self, begin, end):
        """The same worker's spans between two times, cut where they pass them."""
        part = Trace.__new__(Trace)
        part.name, part.spans = self.name, []
        for span in self.spans:
            if span.end > begin and span.begin < end:
                cut = Span.__new__(Span)
                cut.kind, cut.step, cut.stage, cut.rows = span.kind, span.step, span.stage, span.rows
                cut.begin, cut.end = max(span.begin, begin), min(span.end, end)
                part.spans.append(cut)
        return part


def read_events(text):
    """The array, whether or not its end was written; of a last event that was cut off nothing is kept."""
    for whole in (text, text + "]", text.rpartition(",\n")[0] + "]"):
        try:
            return json.loads(whole)
        except json.JSONDecodeError:
            continue
    raise ValueError


# --- numbers -----------------------------------------------------------------------------------------------------

def union(intervals):
    """Sorted intervals without overlaps that cover the same times."""
    merged = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged


def in_flight(traces):
    """The times in which at least one step was on its way: from its first span on any stage to its last."""
    steps = {}
    for span in (s for trace in traces for s in trace.spans):
        begin, end = steps.get(span.step, (span.begin, span.end))
        steps[span.step] = (min(begin, span.begin), max(end, span.end))
    return union(steps.values())


def summarize(traces):
    """A dict for each stage, in their order. Shares are of the time that steps were in flight."""
    flight = sum(end - begin for begin, end in in_flight(traces))
    stages = {}
    for trace in traces:
        for span in trace.spans:
            row = stages.setdefault(span.stage, {"stage": span.stage, "workers": set(), "steps": set(),
                                                 **{f"{kind}_us": 0 for kind in KINDS}})
            row["workers"].add(trace.name)
            row[f"{span.kind}_us"] += span.end - span.begin
            if span.kind == "compute":
                row["steps"].add(span.step)
    for row in stages.values():
        row["worker"], row["steps"] = ", ".join(sorted(row.pop("workers"))), len(row["steps"])
        row["in_flight_us"] = flight
        row["idle_us"] = max(flight - sum(row[f"{kind}_us"] for kind in KINDS), 0)
        row["computing"], row["waiting"] = (row[f"{kind}_us"] / flight if flight else 0.0
                                            for kind in ("compute", "wait"))
    return [stages[stage] for stage in sorted(stages)]


def table(rows):
    """Lines of text; times in ms."""
    lines = [f"{'stage':<5} {'worker':<16} {'steps':>7} {'compute':>10} {'wait':>10} {'send':>9} {'idle':>9} "
             f"{'computing':>10} {'waiting':>8}   (ms; shares of the time with steps in flight)"]
    for r in rows:
        times = [r[f"{kind}_us"] / 1e3 for kind in ("compute", "wait", "send", "idle")]
        lines.append(f"{r['stage']:<5} {r['worker']:<16} {r['steps']:>7} {times[0]:>10.1f} {times[1]:>10.1f} "
                     f"{times[2]:>9.1f} {times[3]:>9.1f} {r['computing']:>10.1%} {r['waiting']:>8.1%}")
    return lines


# --- the picture -------------------------------------------------------------------------------------------------

def choose_steps(traces, from_step, count):
    """The steps to draw: those from `from_step` on in the last epoch that has it, or those in the middle."""
    steps = sorted({s.step for trace in traces for s in trace.spans if s.kind == "compute"})
    if not steps:
        raise BadTrace("there is no step in these traces")
    if from_step is None:
        epoch = steps[-1][0]
        last = [s for s in steps if s[0] == epoch]
        return last[max(0, (len(last) - count) // 2):][:count]
    epochs = [epoch for epoch, step in steps if step == from_step]
    if not epochs:
        raise BadTrace(f"step {from_step} is not in these traces: they have {steps[0][1]} to {steps[-1][1]}")
    return [s for s in steps if s[0] == epochs[-1] and s[1] >= from_step][:count]


def fitting(labels, width):
    """The first label that fits into a box."""
    return next((label for label in labels if len(label) * LETTER + 6 <= width), "")


def tick_of(span_ms):
    """A round distance of ticks, for some ten of them."""
    unit = 0.001
    while True:
        for factor in (1, 2, 5):
            if span_ms / (unit * factor) <= 12:
                return unit * factor
        unit *= 10


class Picture:
    def __init__(self, traces, steps, width):
        chosen = [s for trace in traces for s in trace.spans if s.step in steps and s.kind == "compute"]
        self.traces, self.steps, self.width = traces, set(steps), width
        self.begin, self.end = min(s.begin for s in chosen), max(s.end for s in chosen)
        self.end = max(self.end, self.begin + 1)
        self.n_stages = 1 + max(s.stage for trace in traces for s in trace.spans)
        self.order = {step: i for i, step in enumerate(sorted({s.step for t in traces for s in t.spans}))}
        self.parts = []

    def x(self, us):
        return LEFT + (us - self.begin) / (self.end - self.begin) * (self.width - LEFT - RIGHT)

    def text(self, x, y, text, anchor="start", size=11, colour="#222222"):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
                          f'{html.escape(text)}</text>')

    def box(self, kind, y, begin, end, labels, title, step=None):
        x, width = self.x(begin), self.x(end) - self.x(begin)
        colour = COLOURS[kind][self.order.get(step, 0) % 2]
        pale = ' opacity="0.35"' if step is not None and step not in self.steps else ""
        self.parts.append(f'<g{pale}><rect x="{x:.2f}" y="{y}" width="{max(width, 0.3):.2f}" height="{BOX}" '
                          f'fill="{colour}" stroke="#ffffff" stroke-width="0.5">'
                          f'<title>{html.escape(title)}</title></rect>')
        light = not pale and kind in ("compute", "send")
        self.text(x + width / 2, y + BOX / 2 + 4, fitting(labels, width), "middle",
                  colour="#ffffff" if light else "#222222")
        self.parts.append("</g>")

    def span(self, y, span):
        begin, end, number = max(span.begin, self.begin), min(span.end, self.end), span.step[1]
        ms = f"{(span.end - span.begin) / 1e3:.3f} ms"
        if span.kind == "compute":
            labels = (f"step {number}", str(number))
        elif span.kind == "wait":
            before = (span.stage - 1) % self.n_stages
            labels = (f"bubble: waits for stage {before}", f"waits for stage {before}", f"stage {before}")
        else:
            labels = ("sends",)
        self.box(span.kind, y, begin, end, labels, f"step {number}, {labels[0]}: {ms}, rows {span.rows}", span.step)

    def lane(self, index, trace):
        y, at = TOP + index * LANE, self.begin
        stages = sorted({s.stage for s in trace.spans if s.step in self.steps})
        self.text(8, y + BOX / 2, f"stage {', '.join(map(str, stages)) or '-'}", size=13)
        self.text(8, y + BOX / 2 + 15, trace.name[:20], colour="#666666")
        least = (self.end - self.begin) / self.width  # a pixel
        for span in [s for s in trace.spans if s.end > self.begin and s.begin < self.end]:
            self.idle(y, at, span.begin, least)
            self.span(y, span)
            at = span.end
        self.idle(y, at, self.end, least)

    def idle(self, y, begin, end, least):
        if end - begin > least:
            self.box("idle", y, begin, end, ("idle: nothing to run", "idle"),
                     f"idle: nothing to run, {(end - begin) / 1e3:.3f} ms")

    def axis(self):
        y, span = TOP + len(self.traces) * LANE, (self.end - self.begin) / 1e3
        tick = tick_of(span)
        for i in range(int(span / tick + 1e-9) + 1):
            x = self.x(self.begin + i * tick * 1e3)
            self.parts.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{y}" stroke="#999999" '
                              f'stroke-width="0.4"/>')
            self.text(x, y + 14, f"{i * tick:g}", "middle")
        self.text(self.width - RIGHT, y + 30, "ms", "end")

    def legend(self, rows, y):
        x = LEFT
        for kind, words in LEGEND.items():
            self.parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[kind][0]}"/>')
            self.text(x + 17, y, words)
            x += 40 + len(words) * LETTER
        for row in rows:
            y += 17
            self.text(LEFT, y, f"stage {row['stage']}, {row['steps']} steps in all: computing {row['computing']:.1%}, "
                               f"waiting {row['waiting']:.1%} of the time with steps in flight")
        return y + 14

    def draw(self, rows):
        first, last = min(self.steps), max(self.steps)
        self.text(8, 22, f"Steps {first[1]} to {last[1]} of epoch {first[0]}", size=15)
        self.axis()
        for index, trace in enumerate(self.traces):
            self.lane(index, trace)
        height = self.legend(rows, TOP + len(self.traces) * LANE + 50)
        return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{height}" '
                          f'font-family="sans-serif"><rect width="100%" height="100%" fill="#ffffff"/>',
                          *self.parts, "</svg>"]) + "\n"


def draw(traces, rows, from_step=None, steps=3, width=1400):
    """The picture as SVG; lanes by stage."""
    chosen = choose_steps(traces, from_step, steps)
    shown = [trace for trace in traces if trace.spans]
    shown.sort(key=lambda t: min((s.stage for s in t.spans if s.step in chosen), default=1 << 30))
    return Picture(shown, chosen, width).draw(rows)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("traces", nargs="+", metavar="TRACE", help="the files of all workers of a pool")
    p.add_argument("-o", "--out", type=pathlib.Path, help="where the picture goes (SVG); without it only the table")
    p.add_argument("--steps", type=int, default=3, help="how many steps are drawn (default: 3)")
    p.add_argument("--from-step", type=int, help="the first of them (default: in the middle of the trace)")
    p.add_argument("--width", type=int, default=1400, help="of the picture, in pixels")
    a = p.parse_args()
    if a.steps < 1 or a.width < 400:
        p.error("--steps is at least 1, --width at least 400")
    return a


def main():
    a = parse()
    try:
        traces = [Trace(path) for path in a.traces]
        rows = summarize(traces)
        picture = draw(traces, rows, a.from_step, a.steps, a.width)
        print("\n".join(table(rows)))
        if a.out:
            a.out.write_text(picture)
    except BadTrace as problem:
        sys.exit(f"pipeline_timeline.py: {problem}")
    except OSError as problem:
        sys.exit(f"pipeline_timeline.py: {a.out} cannot be written: {problem.strerror}")


if __name__ == "__main__":
    main()
