"""Standard output belongs to the command: with --json to its one document."""

import json
import os
import subprocess
import sys

LOUD = """
import ctypes, os, subprocess, sys
from specmpc_cli.cli.console import Output, only_documents

with only_documents():
    print("Python")
    print("the stream of before, which keeps it back", file=sys.__stdout__)
    os.write(1, b"a descriptor\\n")
    ctypes.CDLL(None).printf(b"C, which keeps it back\\n")
    subprocess.run(["echo", "a child"], check=True)
    Output(as_json=True, quiet=False).document({"schema": 1})
print("after it")
"""


def test_what_others_print_goes_to_standard_error() -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    run = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True, check=True, env=buffered)
    document, _, after = run.stdout.rpartition("}")
    assert json.loads(document + "}") == {"schema": 1} and after.split() == ["after", "it"]
    assert all(one in run.stderr for one in ("Python", "the stream of before", "a descriptor", "C, which keeps it back", "a child"))
