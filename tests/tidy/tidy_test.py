#!/usr/bin/python3
"""The house rules as a test: form of the files, who may include whom, and words that must not be left behind.

Prints every breach as path:line: sentence and fails if there is one. Exit code 77 when the sources are not there.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(os.environ.get("STRATA_TEST_SOURCE") or pathlib.Path(__file__).resolve().parents[2])

LINE_COLUMNS = 120
FILE_LINES = 800
TEST_FILE_LINES = 900
FUNCTION_LINES = 70
TEXT = {".c", ".h", ".cu", ".cuh", ".cpp", ".py", ".sh", ".proto", ".cmake", ".txt", ".md", ".yaml", ".yml", ""}
SOURCE = {".c", ".h", ".cu", ".cuh", ".cpp"}

# Folder -> folders whose headers it may include. Folders not named here (tests, examples) may include anything.
MAY_INCLUDE = {
    "common": {"common"},
    "proto": {"common", "proto"},
    "kernels": {"common", "kernels"},
    "coordinator": {"common", "proto", "coordinator"},
    "cli": {"common", "proto", "cli"},
    "worker": {"common", "proto", "kernels", "worker"},
}
PRODUCT = set(MAY_INCLUDE)

# The one door of each foreign header: what is included -> which files may.
DOORS = [
    (re.compile(r"<grpc/"), re.compile(r"common/rpc_\w+\.[ch]$"), "common/rpc_*.c"),
    (re.compile(r"pb-c\.h[>\"]"), re.compile(r"proto/wire\w*\.[ch]$"), "proto/wire*.c"),
    (re.compile(r"<nccl"), re.compile(r"worker/link_nccl\.c$"), "worker/link_nccl.c"),
    (re.compile(r"<(cuda|cublas|cooperative_groups)"), re.compile(r"kernels/cuda/|worker/link_nccl\.c$"),
     "kernels/cuda (and worker/link_nccl.c)"),
]

# Rooms of the coordinator: a file belongs to the room whose name it begins with. The hall (coordinator*) calls each;
# rooms do not include one another, but for these.
ROOMS = ["service", "request", "scheduler", "kv_ledger", "pipeline", "worker_pool", "token_stream", "chat_template",
         "metrics"]
ROOM_MAY_INCLUDE = {"service": {"request"}, "scheduler": {"request", "kv_ledger"}, "pipeline": {"worker_pool"}}

# Written in two halves, so that this file does not breach its own rule.
LEFT_BEHIND = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b|[Pp]lace" + r"holder|"
                         r"[Nn]ot imple" + r"mented")
MACHINE_PATH = re.compile(r"(?<![\w.$}])/(wo" + r"rk|ro" + r"ot|ho" + r"me|Us" + r"ers)/")

breaches = []


def breach(path, line, sentence):
    breaches.append(f"{path}:{line}: {sentence}")


def tracked_files():
    """Paths relative to the root: what git knows or would add; in a tree without git, everything but build output."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others",
                   "--exclude-standard"]
        listing = subprocess.run(command, capture_output=True, check=True).stdout.decode()
        return sorted(p for p in listing.split("\0") if p and (ROOT / p).is_file())
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if not f.startswith("build") and f not in (".git", ".cache", "__pycache__")]
        found += [str((pathlib.Path(folder) / name).relative_to(ROOT)) for name in names]
    return sorted(found)


def check_text(path, text):
    suffix = pathlib.Path(path).suffix
    if text and not text.endswith("\n"):
        breach(path, text.count("\n") + 1, "no newline at the end")
    for number, line in enumerate(text.split("\n"), 1):
        if line != line.rstrip():
            breach(path, number, "blanks at the end of the line")
        if "\t" in line and not path.endswith("Makefile"):
            breach(path, number, "a tab")
        if len(line) > LINE_COLUMNS and suffix != ".md":
            breach(path, number, f"{len(line)} columns, the limit is {LINE_COLUMNS}")
        if LEFT_BEHIND.search(line):
            breach(path, number, f"'{LEFT_BEHIND.search(line).group()}' is not to be left behind")
        if MACHINE_PATH.search(line):
            breach(path, number, "the path of one machine")


def check_functions(path, lines):
    """Functions begin with '{' and end with '}' in the first column."""
    start = None
    for number, line in enumerate(lines, 1):
        if line == "{":
            start = number
        elif line.startswith("}") and start:
            if number - start - 1 > FUNCTION_LINES:
                breach(path, start, f"a function of {number - start - 1} lines, the limit is {FUNCTION_LINES}")
            start = None


def check_source(path, text):
    lines = text.rstrip("\n").split("\n")
    limit = FILE_LINES if path.split("/")[0] in PRODUCT else TEST_FILE_LINES
    if not lines[0].startswith(("//", "/*")):
        breach(path, 1, "a source file opens with a comment that says what it is")
    if len(lines) > limit:
        breach(path, len(lines), f"{len(lines)} lines, the limit is {limit}: split it by purpose")
    if path.endswith(".h") and not re.search(r"^#ifndef STRATA_\w+_H\n#define STRATA_\w+_H$", text, re.M):
        breach(path, 1, "no include guard STRATA_..._H")
    if path.split("/")[0] in PRODUCT and path != "common/config.c":
        for number, line in enumerate(lines, 1):
            if re.search(r"\b(secure_)?getenv\s*\(", line):
                breach(path, number, "getenv belongs to common/config.c")
    check_functions(path, lines)


def room_of(name):
    """The longest room name that a file's name begins with."""
    rooms = [room for room in ROOMS if name.startswith((room + "_", room + "."))]
    return max(rooms, key=len, default=None)


def check_rooms(path, number, header):
    ours, theirs = room_of(pathlib.Path(path).name), room_of(pathlib.Path(header).name)
    if ours and theirs and ours != theirs and theirs not in ROOM_MAY_INCLUDE.get(ours, set()):
        breach(path, number, f"the room {ours} includes the room {theirs}: coordinator.c is the hall between them")


def check_includes(path, text):
    folder = path.split("/")[0]
    for number, line in enumerate(text.split("\n"), 1):
        if not re.match(r"\s*#\s*include\b", line):
            continue
        for foreign, door, name in DOORS:
            if folder in PRODUCT and foreign.search(line) and not door.search(path):
                breach(path, number, f"this header has its one door in {name}")
        ours = re.search(r'"((\w+)/[^"]+)"', line)
        if folder not in PRODUCT or not ours:
            continue
        if ours.group(2) in PRODUCT | {"tests", "examples"} and ours.group(2) not in MAY_INCLUDE[folder]:
            breach(path, number, f"{folder} may not include {ours.group(2)}")
        if ours.group(1).endswith("_internal.h") and ours.group(2) != folder:
            breach(path, number, f"{ours.group(1)} is internal to {ours.group(2)}")
        if folder == "coordinator" and ours.group(2) == "coordinator":
            check_rooms(path, number, ours.group(1))


def check_names(paths):
    """A source's name says where it is: no two files share one (build and package files apart)."""
    seen = {}
    for path in paths:
        name = pathlib.Path(path).name
        if pathlib.Path(path).suffix in SOURCE | {".py", ".sh", ".proto"} and name != "__init__.py":
            if name in seen:
                breach(path, 1, f"has the name of {seen[name]}")
            seen[name] = path


def check_format(paths):
    """clang-format decides where it has the version that formatted the tree; other versions differ in details."""
    tool = shutil.which("clang-format-14") or shutil.which("clang-format")
    sources = [str(ROOT / p) for p in paths if pathlib.Path(p).suffix in SOURCE]
    version = subprocess.run([tool, "--version"], capture_output=True).stdout.decode() if tool else ""
    if not re.search(r"version 14\.", version):
        print("clang-format 14 is not here: format not checked")
        return
    result = subprocess.run([tool, "--dry-run", "-Werror", *sources], capture_output=True, cwd=ROOT).stderr.decode()
    wrong = {line.split(":")[0]: line.split(":")[1] for line in reversed(result.split("\n")) if "error:" in line}
    for path, line in sorted(wrong.items()):
        breach(pathlib.Path(path).relative_to(ROOT), line, "clang-format -i would change it")


def main():
    if not (ROOT / "CMakeLists.txt").exists():
        print("no sources here")
        return 77
    paths = tracked_files()
    for path in paths:
        if pathlib.Path(path).suffix not in TEXT or path == "LICENSE" or "/fixtures/" in path or "/corpus/" in path:
            continue
        try:
            text = (ROOT / path).read_bytes().decode()
        except UnicodeDecodeError:
            breach(path, 1, "not UTF-8")
            continue
        check_text(path, text)
        if pathlib.Path(path).suffix in SOURCE:
            check_source(path, text)
            check_includes(path, text)
    check_names(paths)
    check_format(paths)
    for line in breaches:
        print(line)
    print(f"{len(paths)} files, {len(breaches)} breaches")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
