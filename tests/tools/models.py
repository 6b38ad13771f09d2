"""Small generated models for tests, made once and kept.

    import models
    path = models.make(arch="qwen2", mix="q8_0", layers=2, vocab_size=300, tied=True)
    path = models.make(arch="llama", split=3)          # the first of three parts

Keywords are make_gguf.py's options. The file lies in the build folder ($STRATA_TEST_BIN/models), named after the
options and the generator's own text, so that a changed generator makes new files. Tests that run at once may ask for
the same model: each writes its own copy and renames it into place.
"""
import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile

import make_gguf

HERE = pathlib.Path(__file__).resolve().parent


def folder():
    root = os.environ.get("STRATA_TEST_BIN") or HERE.parent.parent / "build"
    path = pathlib.Path(root) / "models"
    path.mkdir(parents=True, exist_ok=True)
    return path


def arguments_of(options):
    arguments = []
    for key, value in sorted(options.items()):
        if value is True:
            arguments.append("--" + key.replace("_", "-"))
        elif value not in (False, None):
            arguments += ["--" + key.replace("_", "-"), str(value)]
    return arguments


def make(**options):
    """The path of a model with these options, generated when it is not there yet."""
    arguments = arguments_of(options)
    text = (HERE / "make_gguf.py").read_bytes() + "\0".join(arguments).encode()
    if options.get("vocab"):
        text += hashlib.sha256(pathlib.Path(options["vocab"]).read_bytes()).digest()
    name = f"{options.get('arch', options.get('shape', 'llama'))}-{hashlib.sha256(text).hexdigest()[:16]}"
    home = folder() / name
    if not home.exists():
        scratch = tempfile.mkdtemp(prefix=name, dir=folder())
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            make_gguf.generate([os.path.join(scratch, "model.gguf")] + arguments)
        with contextlib.suppress(OSError):  # another test was first
            os.rename(scratch, home)
        shutil.rmtree(scratch, ignore_errors=True)
    return str(sorted(home.glob("*.gguf"))[0])
