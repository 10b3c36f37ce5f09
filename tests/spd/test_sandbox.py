"""Generated code: what passes, what fails and why, and that hostile programs neither pass, nor get out, nor live on."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from spd import sandbox
from spd.errors import InputError
from spd.sandbox import run, seccomp

PROC = Path("/proc")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="generated code runs where there is fork")

LAYERS = {  # what a machine may lack, and what must hold nevertheless
    "everything": (),
    "no namespaces": ("namespaces",),
    "no seccomp": ("seccomp",),
    "no landlock": ("landlock",),
    "rlimits and reaping": ("namespaces", "seccomp", "landlock"),
}


@pytest.fixture
def place(monkeypatch):
    """Where the sandboxes of one test put their folders. Their processes carry its name in their environment."""
    folder = Path(tempfile.mkdtemp(prefix="spd-place-"))
    folder.chmod(0o711)  # a user of the sandbox's own must be able to reach what is below
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    left = processes_of(folder), sorted(each.name for each in folder.glob("spd-sandbox-*"))
    for pid in left[0]:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder)
    assert left == ([], []), "processes and folders left behind"


@pytest.fixture(params=LAYERS)
def layers(request, monkeypatch):
    monkeypatch.setattr(run, "switched_off", frozenset(LAYERS[request.param]))


def processes_of(place):
    """Ids of living processes that a sandbox below `place` has started."""
    found = []
    for folder in PROC.glob("[0-9]*"):
        try:
            if str(place).encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def need(*names):
    """Skip where the machine, with the layers that are on, does not enforce a measure; the reason says why."""
    for measure in sandbox.enforcement():
        if measure.name in names and not measure.enforced:
            pytest.skip(f"{measure.name} is not enforced here: {measure.detail}")


def test_a_right_program_passes(place):
    verdict = sandbox.run_tests(
        "def f(x):\r\n\treturn x + 1\r\nprint('hé')", "import math\nassert f(1) == math.ceil(1.5)"
    )
    assert verdict == sandbox.Verdict(True, "passed", verdict.seconds, "hé\n")
    assert 0 <= verdict.seconds < 5


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("x = 1", "assert x == 1\nassert x == 2", "AssertionError: assert x == 2"),
        ("x = 1", "assert x == 2, 'x is\\n  1'", "AssertionError: x is 1"),
        ("assert 0", "", "AssertionError: in the program"),
        ("def f(:", "assert f", r"SyntaxError: .*<program>, line 1"),
        ("x = 1", "assert x ==", r"SyntaxError: .*<tests>, line 1"),
        ("pass", "assert f(1)", "NameError: name 'f' is not defined"),
        ("def f(): return f()\nf()", "", "RecursionError: maximum"),
        ("x = '\0'", "", "(Syntax|Value)Error: source code string cannot contain null bytes"),
        ("x = '\ud800'", "", "UnicodeEncodeError"),
        ("(" * 500, "", "(SyntaxError|MemoryError|RecursionError): .*"),
        ("input()", "", "EOFError: EOF when reading a line"),
        ("class E(Exception):\n def __str__(self): raise E\nraise E", "", "E"),
        ("raise ValueError('long ' * 1000)", "", "ValueError: (long )+"),
        ("import time\ntime.sleep(9)", "", r"timed out after 0\.5 s"),
        ("while True: pass", "", r"timed out after 0\.5 s"),
        ("x = []\nwhile True: x.append(bytearray(1 << 24))", "", r"out of memory \(limit 128 MiB\)"),
        ("while True: print('x' * 1000)", "", "wrote more than 16 MiB of output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "", "wrote more than 16 MiB of output"),
        ("import sys\nsys.exit(0)", "", r"ended before the last test \(SystemExit: 0\)"),
        ("import os\nos._exit(0)", "", r"ended before the last test \(exit status 0\)"),
        ("import os\nos.abort()", "", "killed by SIGABRT"),
        ("import ctypes\nctypes.string_at(0)", "", "killed by SIGSEGV"),
        ("import os, time\nos.closerange(0, 64)\ntime.sleep(9)", "", "closed the channel to its supervisor"),
    ],
)
def test_a_wrong_program_fails_and_the_reason_says_why(program, tests, reason, place):
    timeout = 0.5 if "timed out" in reason else 30
    verdict = sandbox.run_tests(program, tests, timeout=timeout, memory=128 << 20)
    assert not verdict.passed
    assert re.match(reason, verdict.reason), verdict.reason
    assert len(verdict.reason) <= 300 and "\n" not in verdict.reason
    assert len(verdict.output) < 5000 and verdict.seconds < 20


def test_the_output_keeps_its_beginning_its_end_and_the_traceback(place):
    verdict = sandbox.run_tests("for i in range(100_000): print(i)\ndef f(): 1 / 0", "f()")
    assert verdict.output.startswith("0\n1\n2\n") and "bytes ...]" in verdict.output
    assert "99999\nTraceback" in verdict.output and 'File "<tests>", line 1' in verdict.output
    assert str(Path(run.__file__).parent) not in verdict.output
    assert len(verdict.output) < 5000
    short = sandbox.run_tests("print('a' * 3000 + 'b')", "")
    assert short.output == "a" * 3000 + "b\n"


def test_a_program_is_a_module_that_is_imported(place):
    program = """
import dataclasses, pickle, typing
@dataclasses.dataclass
class Point:
    x: "int"
if __name__ == "__main__":
    raise SystemExit("not skipped")
"""
    tests = """
from __main__ import Point as same
from program import Point as again
assert same is again is Point and typing.get_type_hints(Point) == {"x": int}
assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
"""
    assert sandbox.run_tests(program, tests).reason == "passed"


def test_what_harmless_programs_need_is_there(place):
    program = """
import asyncio, hashlib, os, random, sqlite3, tempfile, threading, zoneinfo
async def later():
    await asyncio.sleep(0.01)
    return 3
found = []
threads = [threading.Thread(target=found.append, args=(i,)) for i in range(20)]
for each in threads: each.start()
for each in threads: each.join()
with tempfile.TemporaryDirectory() as folder:
    with open(folder + "/a", "w") as file: file.write("text")
    os.rename(folder + "/a", "b")
"""
    tests = """
assert asyncio.run(later()) == 3
assert sorted(found) == list(range(20))
assert os.listdir(".") == ["b"] and open("b").read() == "text"
assert os.getcwd() == os.environ["HOME"] == tempfile.gettempdir()
assert len(hashlib.sha256(random.randbytes(3)).digest()) == 32
assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
"""
    assert sandbox.run_tests(program, tests).reason == "passed"


def test_a_verdict_repeats(place):
    program = "order = list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})\nprint(order)"
    assert len({sandbox.run_tests(program, "").output for _ in range(3)}) == 1


# None of these should pass whatever it does: f(), which the test asks for, is wrong.
WRONG = "def f(): return 2\n"
TEST = "assert f() == 1"
HOSTILE = {
    "fork bomb": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "fork bomb whose parents leave": """
import os
while True:
    try:
        if os.fork(): os._exit(0)
    except OSError: pass
""",
    "thread bomb": """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(600,)).start()
    except RuntimeError: pass
""",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        time.sleep(600)
    os._exit(0)
os.wait()
""",
    "daemon and a clean exit": """
import os, time
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 64)
    time.sleep(600)
os._exit(0)
""",
    "another program": """
import os, sys
os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)"])
""",
    "endless output": "while True: print('x' * 100_000, flush=True)",
    "endless errors": "import os\nwhile True: os.write(2, b'x' * 100_000)",
    "memory hog": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "memory hog that goes on": """
x = []
while True:
    try: x.append(bytearray(1 << 24))
    except MemoryError: pass
""",
    "one huge number": "x = 10 ** 10 ** 10",
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "exit by a handler": "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit(0)",
    "exit by a thread": """
import os, threading, time
threading.Thread(target=os._exit, args=(0,)).start()
time.sleep(600)
""",
    "SystemExit in handlers and threads": """
import atexit, sys, threading
atexit.register(sys.exit, 0)
threading.Thread(target=sys.exit).start()
""",
    "threads left behind": """
import threading, time
for _ in range(3): threading.Thread(target=time.sleep, args=(600,)).start()
""",
    "busy loop": "while True: pass",
    "busy loop in C": "import re\nre.match('(a*)*b', 'a' * 200)",
    "sleep": "import time\ntime.sleep(600)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "ignores signals": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
time.sleep(600)
""",
    "kills its parent": """
import os
for number in (2, 15, 9):
    try: os.kill(os.getppid(), number)
    except OSError: pass
""",
    "kills everything": """
import os
for target in (-1, 1, 0):
    try: os.kill(target, 9)
    except OSError: pass
""",
    "closes everything": "import os\nos.closerange(0, 1024)",
    "overflows the stack": """
import sys
sys.setrecursionlimit(1 << 30)
x = []
for _ in range(10 ** 6): x = [x]
repr(x)
""",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "guesses": """
import os, secrets
for end in range(64):
    for text in ("started", "ended", secrets.token_hex(16), "", "passed"):
        try: os.write(end, text.encode() + b"\\n")
        except OSError: pass
os._exit(0)
""",
    "floods its supervisor": """
import os
while True:
    for end in range(3, 64):
        try: os.write(end, b"x" * 1000)
        except OSError: pass
""",
    "replaces what is built in": """
import builtins, os, sys
builtins.exec = builtins.compile = builtins.print = builtins.isinstance = lambda *a, **k: None
os.write = os.read = os._exit = sys.exit = lambda *a: None
builtins.AssertionError = SystemExit
""",
    "many and deep folders": """
import os
for _ in range(1500):
    os.mkdir("d")
    os.chdir("d")
""",
    "folders without rights": """
import os
os.makedirs("a/b")
open("a/b/c", "w").close()
os.mkdir("locked", 0)
""",
}
NEEDED = {  # without which trying would hurt this machine
    "fork bomb": "processes",
    "fork bomb whose parents leave": "processes",
    "kills its parent": "others",
    "kills everything": "others",
}


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        *((layers, name) for layers in ("everything", "no namespaces", "no seccomp") for name in HOSTILE),
        *(("rlimits and reaping", name) for name in ("daemon", "daemon and a clean exit")),
    ],
    indirect=["layers"],
)
def test_a_hostile_program_does_not_pass_and_leaves_nothing(name, layers, place):
    need("left behind", NEEDED.get(name))
    began = time.monotonic()
    verdict = sandbox.run_tests(WRONG + HOSTILE[name], TEST, timeout=0.25, memory=256 << 20)
    assert not verdict.passed
    assert time.monotonic() - began < 15
    assert len(verdict.output) < 5000


def test_threads_left_behind_do_not_delay_a_pass(place):
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\ndef f(): return 1"
    began = time.monotonic()
    assert sandbox.run_tests(program, TEST).passed
    assert time.monotonic() - began < 5


def test_exit_handlers_do_not_undo_a_pass(place):
    assert sandbox.run_tests("import atexit, os\natexit.register(os._exit, 3)\ndef f(): return 1", TEST).passed


def test_the_environment_is_hidden(layers, place, monkeypatch):
    monkeypatch.setenv("SPD_TEST_SECRET", "hunter2")
    verdict = sandbox.run_tests("import os\nprint(dict(os.environ), os.environb)", "")
    assert verdict.passed and "hunter2" not in verdict.output
    assert "LANG" in verdict.output


def test_other_processes_are_out_of_reach(layers, place, monkeypatch):
    """Signals, /proc and ptrace: of its parent and of this process."""
    need("others")
    monkeypatch.setenv("SPD_TEST_SECRET", "hunter2")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={"SECRET": "hunter2"})
    program = f"""
import ctypes, os
for pid in ({victim.pid}, os.getppid()):
    try: os.kill(pid, 9)
    except OSError: pass
    for name in ("environ", "mem", "maps"):
        try: print(open(f"/proc/{{pid}}/{{name}}", "rb").read(100_000))
        except OSError: pass
    ctypes.CDLL(None).ptrace(16, pid, 0, 0)
"""
    try:
        verdict = sandbox.run_tests(WRONG + program, TEST)
        assert verdict.reason == "AssertionError: assert f() == 1"
        assert "hunter2" not in verdict.output
        assert victim.poll() is None
        status = (PROC / str(victim.pid) / "status").read_text()
        assert "TracerPid:\t0" in status and "stop)" not in status and "(stopped)" not in status
    finally:
        victim.kill()
        victim.wait()


def test_files_of_the_user_are_not_read(layers, place, monkeypatch):
    need("reading")
    home = place / "home"
    home.mkdir(mode=0o700)
    (home / "secret").write_text("hunter2")
    (home / "secret").chmod(0o600)
    monkeypatch.setenv("HOME", str(home))
    program = f"""
import os, pathlib
for path in ({str(home)!r}, {os.path.expanduser("~")!r}, pathlib.Path.home(), "/root", "/home", {str(place)!r}):
    try: print(path, [*os.walk(path)])
    except OSError: pass
    try: print(open(f"{{path}}/secret").read())
    except OSError: pass
try: os.symlink({str(home)!r}, "link"); print(open("link/secret").read())
except OSError: pass
"""
    verdict = sandbox.run_tests(program, "")
    assert verdict.passed and "hunter2" not in verdict.output and "secret" not in verdict.output


def test_nothing_is_changed_outside_the_folder(layers, place):
    need("writing")
    outside = place / "outside"
    outside.mkdir(mode=0o777)
    outside.chmod(0o777)
    file = outside / "file"
    file.write_text("kept")
    file.chmod(0o666)
    before = file.stat()
    program = f"""
import os, shutil
path, folder = {str(file)!r}, {str(outside)!r}
for change in (
    lambda: open(path, "w"), lambda: open(path, "a").write("x"), lambda: open(folder + "/new", "w"),
    lambda: os.unlink(path), lambda: os.truncate(path, 0), lambda: os.rename(path, folder + "/moved"),
    lambda: os.rename(path, "mine"), lambda: os.link(path, "mine"), lambda: os.symlink("x", folder + "/link"),
    lambda: os.mkdir(folder + "/sub"), lambda: os.chmod(path, 0), lambda: os.chmod(folder, 0), lambda: os.utime(path),
    lambda: os.chown(path, 1, 1), lambda: os.mkfifo(folder + "/fifo"), lambda: shutil.rmtree(folder),
    lambda: os.setxattr(path, "user.a", b"b"), lambda: open("/tmp/{place.name}-new", "w"),
    lambda: open("/dev/shm/{place.name}-new", "w"),
):
    try: change()
    except OSError: continue
    print("changed")
"""
    assert sandbox.run_tests(program, "").output == ""
    after = file.stat()
    assert file.read_text() == "kept" and [each.name for each in outside.iterdir()] == ["file"]
    assert (after.st_mode, after.st_mtime_ns, after.st_uid) == (before.st_mode, before.st_mtime_ns, before.st_uid)
    assert not any(Path(folder, f"{place.name}-new").exists() for folder in ("/tmp", "/dev/shm"))


def test_the_size_of_files_is_limited(layers, place):
    need("file size")
    program = """
with open("huge", "wb") as file:
    for _ in range(1000): file.write(bytes(1 << 20))
"""
    verdict = sandbox.run_tests(program, "")
    assert re.match(r"OSError: \[Errno 27\] File too large", verdict.reason)


def test_the_space_of_all_files_is_limited(layers, place):
    need("disk")
    program = """
for number in range(100):
    with open(str(number), "wb") as file: file.write(bytes(10 << 20))
"""
    assert re.match(r"OSError: \[Errno 28\] No space left", sandbox.run_tests(program, "").reason)


def test_there_is_no_network(layers, place):
    need("network")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        tcp.settimeout(0.2)
        udp.settimeout(0.2)
        local = place / "local"
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(local))
            local.chmod(0o777)
            unix.listen()
            unix.settimeout(0.2)
            program = f"""
import socket
targets = (
    (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", {tcp.getsockname()[1]})),
    (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", {udp.getsockname()[1]})),
)
for family, kind, address in targets:
    try:
        client = socket.socket(family, kind)
        client.settimeout(1)
        client.connect(address)
        client.send(b"here")
        print("sent")
    except OSError: pass
"""
            verdict = sandbox.run_tests(program, "")
            assert verdict.passed and verdict.output == ""
            for server in (tcp.accept, lambda: udp.recv(10), unix.accept):
                with pytest.raises(TimeoutError):
                    server()


@pytest.mark.parametrize(
    ("layer", "measures"),
    [
        ("seccomp", {"processes", "network", "left behind"}),
        ("landlock", {"reading"}),
        ("namespaces", {"others", "network", "disk", "writing", "left behind"}),
        ("user", {"rights"}),
    ],
)
def test_a_layer_alone_holds_what_is_said_of_it(layer, measures, place, monkeypatch):
    monkeypatch.setattr(run, "switched_off", frozenset({"seccomp", "landlock", "namespaces", "user"} - {layer}))
    report = run.supervised("", "", timeout=10, memory=1 << 30)
    assert report["passed"]
    for name in {layer, "mounts"} if layer == "namespaces" else {layer}:
        if why := report["layers"][name]:
            pytest.skip(f"{name} is not available here: {why}")
    held = {each.name for each in sandbox.enforcement() if each.enforced}
    assert held >= measures | {"environment", "memory", "file size"}


def test_what_is_not_enforced_is_said_aloud(place, monkeypatch):
    monkeypatch.setattr(run, "switched_off", frozenset({"seccomp", "landlock", "namespaces", "user"}))
    measures = {each.name: each for each in sandbox.enforcement()}
    assert not measures["reading"].enforced and not measures["writing"].enforced and not measures["network"].enforced
    assert "switched off" in measures["network"].detail
    said = sandbox.describe()
    assert said.index("NOT enforced") < said.index("there is no network: this machine's own address was reached")
    assert said.index("memory is limited") < said.index("NOT enforced")
    assert "a container or a virtual machine" in said


def test_every_measure_is_tried_and_said(place):
    measures, said = sandbox.enforcement(), sandbox.describe()
    names = ["environment", "others", "processes", "memory", "disk", "network", "writing", "reading", "rights"]
    assert [each.name for each in measures if " " not in each.name] == names
    assert all(each.detail for each in measures)
    assert ("NOT enforced" in said) == any(not each.enforced for each in measures)
    assert "a container or a virtual machine" in said


def test_verdicts_keep_the_order_of_the_programs(place):
    programs = [
        (f"import time\ntime.sleep({0.3 if i == 0 else 0})\nx = {i}", "print(x)\nassert x % 3") for i in range(12)
    ]
    verdicts = sandbox.run_many(programs, workers=4, progress=False)
    assert [verdict.output.split()[0] for verdict in verdicts] == [str(i) for i in range(12)]
    assert [verdict.passed for verdict in verdicts] == [bool(i % 3) for i in range(12)]
    assert sandbox.run_many([], progress=False) == []


def test_bad_input_is_named(place):
    with pytest.raises(InputError, match=r"timeout: .* got 0"):
        sandbox.run_tests("", "", timeout=0)
    with pytest.raises(InputError, match=r"timeout: .* got inf"):
        sandbox.run_tests("", "", timeout=float("inf"))
    with pytest.raises(InputError, match=r"memory: .*64 MiB.* got 1000"):
        sandbox.run_tests("", "", memory=1000)
    with pytest.raises(InputError, match="tests: expected Python source, got None"):
        sandbox.run_tests("", None)
    with pytest.raises(InputError, match=r"workers: .* got 0"):
        sandbox.run_many([("", "")], workers=0)
    with pytest.raises(InputError, match="program: expected Python source"):
        sandbox.run_many([("", ""), (b"", "")], progress=False)


def test_the_smallest_memory_runs_python(place):
    assert sandbox.run_tests("x = 1", "assert x", memory=64 << 20).passed


def until(condition):
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.mark.skipif(not PROC.is_dir(), reason="processes are found in /proc")
def test_a_program_ends_with_its_caller(layers, place):
    """A user who kills spd, or a machine that is short of memory, leaves no program running."""
    need("left behind")
    code = (
        f"import tempfile; tempfile.tempdir = {str(place)!r}\n"
        f"from spd.sandbox import run; run.switched_off = frozenset({sorted(run.switched_off)!r})\n"
        "run.run_tests('import time; time.sleep(600)', '', timeout=600)"
    )
    path = os.pathsep.join([str(Path(run.__file__).parents[2]), *sys.path])
    caller = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    until(lambda: len(processes_of(place)) >= 2)
    caller.kill()
    caller.wait()
    until(lambda: not processes_of(place))
    shutil.rmtree(next(place.glob("spd-sandbox-*")))  # which only the caller could


@pytest.mark.skipif(not PROC.is_dir(), reason="processes are found in /proc")
def test_a_killed_supervisor_is_no_pass(layers, place):
    verdicts = []
    caller = threading.Thread(
        target=lambda: verdicts.append(sandbox.run_tests("import time\ntime.sleep(600)", "", timeout=600))
    )
    caller.start()
    until(lambda: len(processes_of(place)) >= 2)
    mine = [pid for pid in processes_of(place) if (PROC / str(pid) / "stat").read_text().split()[3] == str(os.getpid())]
    os.kill(mine[0], signal.SIGKILL)
    caller.join(20)
    assert [(verdict.passed, verdict.reason) for verdict in verdicts] == [(False, "its supervisor was killed")]
    until(lambda: not processes_of(place))


@pytest.mark.parametrize(
    ("column", "header"),
    [
        (0, Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")),
        (1, Path("/usr/include/asm-generic/unistd.h")),
    ],
    ids=["x86_64", "aarch64"],
)
def test_numbers_of_system_calls_are_the_kernels(column, header):
    if not header.is_file():
        pytest.skip(f"the kernel's headers are not installed: no {header}")
    known = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())}
    others = {"clone": seccomp.CLONE, "clone3": seccomp.CLONE3, "kill": seccomp.KILL, "tgkill": seccomp.TGKILL}
    table = seccomp.REFUSED | others | {"prlimit64": seccomp.PRLIMIT}
    ours = {name: numbers[column] for name, numbers in table.items()}
    newer = {"fchmodat2"}  # than some headers
    assert {name: known.get(name) for name in ours.keys() - newer} == {name: ours[name] for name in ours.keys() - newer}


def mbpp(path, *fields):
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        parts = [record[field] for field in fields]
        yield record["code"], "\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts)


@pytest.mark.parametrize(
    ("files", "fields", "count", "workers"),
    [
        (["mbpp_sanitized/test"], ("test_imports", "test_list"), 257, 1),  # task 123 computes for 3 s of its 10
        (["mbpp/train", "mbpp/validation"], ("test_setup_code", "test_list"), 464, None),
    ],
)
def test_every_reference_solution_passes(files, fields, count, workers, records, place):
    programs = [pair for name in files for pair in mbpp(records / f"{name}.jsonl", *fields)]
    assert len(programs) == count
    verdicts = sandbox.run_many(programs, workers=workers, progress=False)
    failed = {position: verdict for position, verdict in enumerate(verdicts) if not verdict.passed}
    assert not failed
    wrong = [(program, tests + "\nassert False") for program, tests in programs[:5]]
    assert {verdict.reason for verdict in sandbox.run_many(wrong, progress=False)} == {"AssertionError: assert False"}
