import ctypes
import os
import sys

import pytest

from spectrim.files import printing_to_stderr


@pytest.mark.skipif(sys.platform == "win32", reason="there the C library cannot be told to write out what it holds")
def test_what_compiled_code_prints_goes_to_stderr_and_later_output_does_not(capfd):
    printf = ctypes.CDLL(None).printf
    print("before", flush=True)
    with printing_to_stderr(unless=b"noise"):
        printf(b"noise of a solver\nsolver at work\nnoise\n")
    os.write(1, b"after\n")
    printf(b"at the end\n")
    ctypes.CDLL(None).fflush(None)
    out, err = capfd.readouterr()
    assert out.split("\n") == ["before", "after", "at the end", ""]
    assert err == "solver at work\n"


def test_an_error_inside_gives_stdout_back(capfd):
    with pytest.raises(KeyError), printing_to_stderr(unless=b"noise"):
        raise KeyError
    os.write(1, b"back\n")
    assert capfd.readouterr() == ("back\n", "")
