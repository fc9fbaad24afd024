"""Users read sentences; programmers' mistakes keep their traceback."""

import errno
import os
import subprocess
import sys
import time

import pytest
from fault_table import Count

from asda.data.audio.waves import AudioError
from asda.errors import (
    BUG_EXIT,
    INTERRUPTED_EXIT,
    LOST_PEER_EXIT,
    STOPPED_EXIT,
    UNREAD_EXIT,
    USER_ERROR_EXIT,
    UserError,
    failure_of,
)


def run(raised: str, **environment: str) -> tuple[int, str]:
    code = f"import os\nfrom asda.errors import *\ndef main():\n    raise {raised}\nexit_with_sentence(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("raised", "exit_code", "line"),
    [
        ("UserError('shard x is cut')", USER_ERROR_EXIT, "error: shard x is cut\n"),
        (
            "RuntimeError('[gloo] Connection closed by peer [127.0.0.1]')",
            LOST_PEER_EXIT,
            "stopped, because another rank",
        ),
        (
            "PermissionError(13, 'Permission denied', 'out.json')",
            USER_ERROR_EXIT,
            "error: out.json: Permission denied\n",
        ),
        *[
            (f"OSError({number}, os.strerror({number}))", USER_ERROR_EXIT, f"error: {os.strerror(number)}; free space")
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
        ],
        ("KeyboardInterrupt", INTERRUPTED_EXIT, "interrupted\n"),
    ],
)
def test_an_expected_end_is_one_line(raised: str, exit_code: int, line: str) -> None:
    assert run(raised)[0] == exit_code
    assert run(raised)[1].startswith(line)
    code, text = run(raised, RANK="1", WORLD_SIZE="2")
    assert code == exit_code
    assert text.startswith(f"[rank 1] {line}")
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("a.wav is cut"), "a.wav is cut"),
        (AudioError("is cut"), "is cut"),
        (PermissionError(13, "Permission denied", "a.wav"), "Permission denied: a.wav"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError("odd"), "OSError: odd (unexpected; please report it with this file)"),
        (ZeroDivisionError("division\nby zero"), "ZeroDivisionError: division by zero (unexpected; please report it"),
        (MemoryError(), "MemoryError: no message (unexpected; please report it with this file)"),
    ],
    ids=repr,
)
def test_the_failure_of_a_file_is_one_line_and_names_what_nobody_expected(error: Exception, reason: str) -> None:
    assert failure_of(error).startswith(reason)
    assert "\n" not in failure_of(error)


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")], ids=repr
)
def test_what_ends_a_run_is_no_failure_of_a_file(error: OSError) -> None:
    with pytest.raises(type(error)):
        failure_of(error)


def test_our_own_mistakes_keep_their_traceback() -> None:
    code, text = run("RuntimeError('shapes differ')")
    assert code == 1
    assert "Traceback" in text


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "in the middle"])
def test_a_reader_that_leaves_ends_a_command_quietly(
    lines: int, unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    code = f"from asda.errors import *\nexit_with_sentence(lambda: [print('a line') for _ in range({lines})])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.close()
        assert command.stderr.read() == b""
    assert command.returncode == UNREAD_EXIT


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "in the middle"])
def test_a_full_disk_behind_stdout_is_one_sentence(lines: int) -> None:
    code = f"from asda.errors import *\nexit_with_sentence(lambda: [print('a line') for _ in range({lines})])"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == USER_ERROR_EXIT
    assert done.stderr == "error: No space left on device; free space, or choose another place to write to\n"


def test_a_failure_of_the_system_that_is_nobody_s_fault_keeps_its_traceback() -> None:
    code, text = run("OSError(5, 'Input/output error')")
    assert code == 1
    assert "Traceback" in text


def test_another_pipe_that_breaks_keeps_its_traceback() -> None:
    code, text = run("BrokenPipeError(32, 'Broken pipe')")
    assert code == 1
    assert "Traceback" in text


PROGRAM = """
import multiprocessing, os, resource, signal, sys, threading, time
from asda.errors import Stopped, UserError, end_at_once, exit_with_sentence, say
def wait_for_ever(): time.sleep(600)
def main():
    {body}
exit_with_sentence(main, prints={prints})
"""


def program(body: str, *, prints: bool = False, through: str = '"$@"', limit: float = 30) -> tuple[int, str]:
    """Run a program through a shell that may take its streams away; return its exit code and what it told."""
    code = PROGRAM.format(body=body, prints=prints)
    argv = ["bash", "-c", through, "bash", sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=limit, check=False)
    return done.returncode, done.stdout + done.stderr


UNWRITABLE = ['"$@" 2>&-', '"$@" 2>/dev/full', '"$@" 2> >(true)', '"$@" <&- >&- 2>&-', '"$@" >/dev/full 2>/dev/full']


@pytest.mark.parametrize("shell", UNWRITABLE)
@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("pass", 0),
        ("raise UserError('x')", USER_ERROR_EXIT),
        ("raise Stopped('x')", STOPPED_EXIT),
        ("raise KeyboardInterrupt", INTERRUPTED_EXIT),
        ("raise ValueError('x')", BUG_EXIT),
        ("end_at_once('x', 143)", 143),
    ],
)
def test_the_exit_code_is_right_though_nothing_can_be_told(shell: str, end: str, code: int, count_fault: Count) -> None:
    tells = "time.sleep(0.3); say('one'); print('two', flush=True); print('three', file=sys.stderr)"
    assert program(f"{tells}; {end}", through=shell)[0] == code
    count_fault("45", "exit codes of programs whose streams are closed, full, or read by nobody", 1, 1)


@pytest.mark.parametrize(("shell", "code"), [('"$@" >/dev/full', USER_ERROR_EXIT), ('"$@" | true', 0)])
def test_a_result_that_is_printed_must_be_written(shell: str, code: int) -> None:
    found, told = program("print('the result')", prints=True, through=shell)
    assert found == code
    assert "Traceback" not in told


def test_a_file_that_is_opened_is_never_taken_for_a_closed_stream(tmp_path) -> None:
    path = tmp_path / "file"
    body = f"kept = open({str(path)!r}, 'w', encoding='utf-8'); print('out'); os.write(2, b'err')"
    assert program(body, through='"$@" <&- >&- 2>&-')[0] == 0
    assert path.read_text() == ""


@pytest.mark.parametrize(
    "raised",
    [
        "MemoryError()",
        "RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory: you tried 134217728 bytes')",
        "RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')",
        "ImportError('libx.so: failed to map segment from shared object')",
        "RuntimeError('can\\'t start new thread')",
        "RuntimeError('Critical error when building pipeline: Resource temporarily unavailable')",
    ],
)
def test_memory_that_has_run_out_is_one_sentence(raised: str, count_fault: Count) -> None:
    code, told = program(f"raise {raised}")
    assert code == USER_ERROR_EXIT
    assert told.startswith("error: memory has run out (")
    assert told.count("\n") == 1
    count_fault("49", "memory that has run out", 1, 1)


def test_a_sentence_needs_no_thread() -> None:
    no_threads = "resource.setrlimit(resource.RLIMIT_NPROC, (0, 0)); os.getuid() or os.setuid(65534)"
    code, told = program(f"{no_threads}; raise MemoryError")
    assert code == USER_ERROR_EXIT
    assert told.count("\n") == 1


def test_a_line_of_a_library_that_cannot_be_written_is_no_traceback() -> None:
    body = "import logging; logging.StreamHandler(open('/dev/full', 'w')).handle(logging.makeLogRecord({'msg': 'x'}))"
    assert program(body) == (0, "")


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_bug_ends_the_workers_with_the_program(method: str, count_fault: Count) -> None:
    worker = f"multiprocessing.get_context({method!r}).Process(target=time.sleep, args=(600,)).start()"
    code, told = program(f"{worker}; threading.Thread(target=wait_for_ever).start(); raise ValueError('a bug')")
    assert code == BUG_EXIT
    assert told.rstrip().endswith("ValueError: a bug")
    count_fault("46", "an unforeseen error while workers and threads run", 1, 1)


@pytest.mark.parametrize(
    ("raised", "told"),
    [("OSError(2, 'No such file', 'events')", "warning: a thread has ended: [Errno 2] No such file: 'events'\n"),
     ("KeyError('a bug')", "Exception in thread")],
)  # fmt: skip
def test_a_thread_that_cannot_write_is_one_line_and_a_bug_keeps_its_traceback(raised: str, told: str) -> None:
    thread = "threading.Thread(target=lambda: (_ for _ in ()).throw({}))"
    code, stderr = program(f"thread = {thread.format(raised)}; thread.start(); thread.join()")
    assert code == 0
    assert stderr.startswith(told)
    assert ("Traceback" in stderr) == raised.startswith("KeyError")


def test_a_stderr_that_nobody_reads_holds_no_end_up() -> None:
    started = time.monotonic()
    fills = 'exec 3> >(sleep 20); "$@" 2>&3'
    body = "os.set_blocking(2, False)\n    try:\n        while True: os.write(2, b'x' * 4096)\n    except OSError: pass"
    body += "\n    os.set_blocking(2, True)\n    end_at_once('told to nobody', 143)"
    argv = ["bash", "-c", fills, "bash", sys.executable, "-c", PROGRAM.format(body=body, prints=False)]
    ended = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30, check=False)
    assert ended.returncode == 143
    assert time.monotonic() - started < 15
